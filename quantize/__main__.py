"""What ``quantize-model`` starts: signals first, then the imports that take their time."""

from __future__ import annotations

import os
import sys

from quantize import interrupts


def main() -> int:
    """Run the command in this process, which is its own."""
    interrupts.quietly()
    from quantize import cli

    try:
        code = cli.main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
