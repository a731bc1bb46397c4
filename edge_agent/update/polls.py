"""When to ask the repository: spread over a site, and more seldom while it fails.

Pure but for the generator, which the caller seeds: the same device asks at the same moments after each start,
and a test knows them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

LONGEST_BACKOFF: Final = 900.0  # seconds between two tries of something that keeps failing, or the interval
_DOUBLINGS: Final = 10


def pauses(interval: float, jitter: float, rng: random.Random) -> Iterator[float]:
    """Seconds until the first poll, then between each and the next, for ever.

    Args:
        interval: what they are on average, in seconds.
        jitter: by which share of it each may be shorter or longer. The first one is that share at most: a
            site that was switched on does not ask all at once.
        rng: where chance comes from.
    """
    spread = interval * jitter
    yield rng.uniform(0.0, spread)
    while True:
        yield interval + rng.uniform(-spread, spread)


@dataclass(slots=True)
class Backoff:
    """When to try again what failed. Doubles, with jitter, up to a limit."""

    interval: float
    rng: random.Random
    failures: int = 0
    not_before: float = float("-inf")  # monotonic

    def failed(self, now: float) -> None:
        """Wait longer than the last time."""
        self.failures += 1
        longest = max(LONGEST_BACKOFF, self.interval)
        wait = min(self.interval * 2 ** min(self.failures, _DOUBLINGS), longest)
        self.not_before = now + wait * self.rng.uniform(0.5, 1.0)

    def succeeded(self) -> None:
        """Begin anew."""
        self.failures, self.not_before = 0, float("-inf")
