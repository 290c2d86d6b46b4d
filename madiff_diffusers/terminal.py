"""Progress bars that suit the terminal that a command runs in."""

import os
import sys
from contextlib import suppress
from typing import Any


COLUMNS, ROWS = 80, 24  # of a terminal that does not tell its size
LOG_SECONDS = 30  # from one line of progress to the next, where there is no terminal for a bar


def bar_size() -> dict[str, Any]:
    """Size settings of a tqdm bar on stderr. A terminal that does not tell its size, such as that of a container or a serial line,
    counts as one of 80 by 24; by itself, tqdm would draw nothing there."""
    with suppress(OSError, AttributeError):  # None is what programs without a console have for stderr
        if os.get_terminal_size(sys.stderr.fileno()).columns:
            return {"dynamic_ncols": True}
    return {"ncols": COLUMNS, "nrows": ROWS}


def bar_settings(unit: str, units: str) -> dict[str, Any]:
    """
    Settings of a tqdm bar on stderr, or of a line now and then where stderr is no terminal.

    Args:
        unit, units: name of what is counted, in the singular and in the plural.
    """
    if sys.stderr is not None and sys.stderr.isatty():
        return {"unit": unit, **bar_size()}
    line = f"{{desc}}: {{n_fmt}} of {{total_fmt}} {units}, {{elapsed}} gone, {{remaining}} left, {{rate_fmt}}"
    return {"unit": unit, "file": _Lines(), "mininterval": LOG_SECONDS, "bar_format": line, **bar_size()}


class _Lines:
    """A file that turns what a bar draws again and again in one place of a terminal into lines of a log."""

    def write(self, text: str) -> None:
        if text.strip() and sys.stderr is not None:
            sys.stderr.write(text.strip() + "\n")

    def flush(self) -> None:
        if sys.stderr is not None:
            sys.stderr.flush()
