import sys

from .commands.madiff_cli import main


sys.exit(main())
