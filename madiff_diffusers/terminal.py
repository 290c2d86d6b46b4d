"""What the terminal that a command runs in can show."""

import os
import sys
from contextlib import suppress
from typing import Any


COLUMNS, ROWS = 80, 24  # of one that does not tell its size
LOG_SECONDS = 30  # between lines about how far it is, where there is no terminal for a bar


def bar_size() -> dict[str, Any]:
    """Settings of a tqdm bar on stderr. A terminal that does not tell its size, as one of a container or a serial line may not, has
    usual ones: by itself, tqdm would draw nothing there."""
    with suppress(OSError):
        if os.get_terminal_size(sys.stderr.fileno()).columns:
            return {"dynamic_ncols": True}
    return {"ncols": COLUMNS, "nrows": ROWS}


def bar_settings(unit: str, units: str) -> dict[str, Any]:
    """
    Settings of a tqdm bar on stderr; where that is no terminal, of a line now and then.

    Args:
        unit, units: of what is counted, in the singular and in the plural.
    """
    if sys.stderr.isatty():
        return {"unit": unit, **bar_size()}
    line = f"{{desc}}: {{n_fmt}} of {{total_fmt}} {units}, {{elapsed}} gone, {{remaining}} left, {{rate_fmt}}"
    return {"unit": unit, "file": _Lines(), "mininterval": LOG_SECONDS, "bar_format": line, **bar_size()}


class _Lines:
    """What a bar draws again and again in one place of a terminal, as lines of a log."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self) -> None:
        sys.stderr.flush()
