"""What ``quantize-model`` starts: what is the process's own first, then the imports that take their time."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from typing import Final

from quantize import interrupts

_M_ARENA_MAX: Final = -8  # of malloc.h
_ARENAS: Final = 2  # as many as threads run batches


def main() -> int:
    """Run the command in this process, which is its own."""
    interrupts.quietly()
    _few_arenas()
    from quantize import cli

    try:
        code = cli.main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def _few_arenas() -> None:
    """Threads come and go, and each would leave a heap of what it freed: glibc makes eight a core."""
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _ARENAS)


if __name__ == "__main__":
    sys.exit(main())
