"""Which layers leave INT8 first where the budget cannot bear all of them. Pure: numbers in, an order out.

Each layer can take several forms; each has the noise that it makes at the output and what it loses in time
and bytes against INT8. Only forms on the lower convex hull of (loss, noise) are worth taking: between two
others with the same loss they have less noise. A step goes from one form of the hull to the next, and along a
hull steps only get worse. So all steps of all layers in the order of noise taken away per loss are a way of
ever more careful mixes, each with about the least noise for what it loses.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from quantize.plan import Layer, Mode

_DOES_NOT_LOAD: Final = 1e12  # noise power, relative: worse than anything that loads


@dataclass(frozen=True, slots=True)
class Form:
    """A form of one layer."""

    mode: Mode
    noise: float  # power at the output, relative to the signal, with this layer alone; inf: does not load
    loss: float  # of what INT8 gains in time and bytes, any unit


@dataclass(frozen=True, slots=True)
class Step:
    """A layer that takes a more careful form, and the noise that takes away."""

    layer: Layer
    mode: Mode
    saves: float


def steps_of(layers: Iterable[tuple[Layer, Sequence[Form]]]) -> list[Step]:
    """All steps worth taking, the best bargain first; the first form of a layer is where it starts."""
    found = []
    for layer, forms in layers:
        now, *others = [Form(form.mode, min(form.noise, _DOES_NOT_LOAD), form.loss) for form in forms]
        while better := [other for other in others if other.noise < now.noise]:
            following = max(better, key=lambda other, now=now: (_bargain(now, other), -other.loss))  # type: ignore[misc]
            step = Step(layer, following.mode, now.noise - following.noise)
            found.append((-_bargain(now, following), layer.node, following.loss, step))
            now = following
    found.sort(key=lambda entry: entry[:3])
    return [step for _, _, _, step in found]


def _bargain(now: Form, following: Form) -> float:
    loss = following.loss - now.loss
    return math.inf if loss <= 0 else (now.noise - following.noise) / loss


def enough(steps: Sequence[Step], floor: float, wanted: float) -> int:
    """How many steps should do if the noises of layers just add up.

    Args:
        steps: in order.
        floor: noise power that stays after all of them.
        wanted: noise power that is allowed.
    """
    left = floor + sum(step.saves for step in steps if step.saves < _DOES_NOT_LOAD / 2)
    for count, step in enumerate(steps):
        if left <= wanted:
            return count
        left -= step.saves if step.saves < _DOES_NOT_LOAD / 2 else 0.0
    return len(steps)


def modes_after(modes: Mapping[int, Mode], steps: Iterable[Step]) -> dict[int, Mode]:
    """The forms of all layers after some steps."""
    return {**modes, **{step.layer.node: step.mode for step in steps}}
