"""What was probably meant by a name that nobody knows."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def meant(name: str, known: Sequence[str]) -> str:
    """The second half of a message about an unknown name: the one it resembles, or some that exist."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]}?"
    listed = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
    return f"known: {listed}"
