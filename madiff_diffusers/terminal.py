"""What the terminal that a command runs in can show."""

import os
import sys
from contextlib import suppress
from typing import Any, Dict

COLUMNS, ROWS = 80, 24  # of one that does not tell its size


def bar_size() -> Dict[str, Any]:
    """Settings of a tqdm bar on stderr. A terminal that does not tell its size, as one of a container or a serial line may not, has
    usual ones: by itself, tqdm would draw nothing there."""
    with suppress(OSError):
        if os.get_terminal_size(sys.stderr.fileno()).columns:
            return {"dynamic_ncols": True}
    return {"ncols": COLUMNS, "nrows": ROWS}
