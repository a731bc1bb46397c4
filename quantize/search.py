"""Step 4c: from the recipes that are possible to the one that is shipped.

Invariants: every candidate is written, loaded and run before anything is said of it; what is chosen is inside
the accuracy budget on the rows for choosing, smaller than FP32 and, by the cost model of the target, not
slower; if nothing is, FP32 is chosen and the candidates say why. No clock decides anything: the same input
gives the same file.

The idea, in order:

1. all layers INT8, with every way to choose ranges: the closest goes on;
2. equalization and least-squares rounding, each kept if it comes closer (``recover``);
3. inside the budget: fewer scales where that costs next to nothing;
   outside: every layer is made INT8 alone, and what its noise buys in bytes and time orders the layers; from
   the worst bargain on they go to dynamic or to float, as few as the budget needs, found by bisection;
4. the dynamic form of dense and recurrent layers, as a candidate of its own;
5. of those inside, the one whose size times time is least.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol, TypeVar

import numpy as np
import onnx

from quantize import cost, runtime
from quantize.alone import open_alone
from quantize.calibrate import RULES, Calibration, Range, calibrate, ranges_by, ranges_each
from quantize.compare import Comparison
from quantize.config import Budget
from quantize.cost import Sizes, Target
from quantize.errors import BadModel
from quantize.int8 import (
    Candidate,
    Int8Model,
    Layer,
    LayerFacts,
    Mode,
    Plan,
    Recipe,
    nearest,
    plan_of,
    static_recipe,
    weight_scale,
    write_int8,
)
from quantize.load import Rows
from quantize.prepare import PreparedModel
from quantize.recover import channel_axes, equalize, round_weights
from quantize.weights import array_of, save

DYNAMIC: Final = "dynamic int8 (MatMul, Gemm, LSTM)"
FLOAT: Final = "fp32"
_MARGIN: Final = 2.0  # dB: other rows than those that chose came out up to so much worse
_IMPROVES: Final = 0.1  # dB that make a recovery worth keeping
_PER_TENSOR_COSTS: Final = 0.5  # dB: what fewer scales may cost
_FAST_RULES: Final = ("min-max", "min-max x2", "99.99 %")
_EACH: Final = "chosen per tensor"
_PROVEN: Final = 90.0  # dB: the equalized FP32 graph against the reference
_BISECTIONS: Final = 6
_PUT_BACK: Final = 3
_STRICTER: Final = (4.0, 8.0)  # dB: more careful candidates, in case the final judgement is less kind
_APART: Final = 2.0  # dB between a candidate and the next more careful one
_MOST_MODELS: Final = 5
_RANGE_MACS: Final = 400e9  # multiply-accumulates of the pass that finds ranges; more rows are drawn from
_GRAM_ROWS: Final = 1024


T = TypeVar("T")
R = TypeVar("R")


class Judging(Protocol):
    """What the search asks: how far a file or graph is from the reference."""

    def probe(self, source: onnx.ModelProto | runtime.Session) -> Comparison:
        """On the fewest rows: for the sensitivity of one layer."""

    def few(self, source: Path) -> Comparison:
        """On as many rows for choosing as many candidates allow."""

    def selection(self, source: Path) -> Comparison:
        """On all rows for choosing."""

    def itself(self) -> Comparison:
        """The reference beside itself: whether it is finite."""


@dataclass(frozen=True, slots=True)
class Observed:
    """What calibration found: the plan and everything the search needs to know of the tensors."""

    plan: Plan
    ranges: Calibration  # of the rows that find ranges
    held_out: Calibration  # of the rows for choosing
    sizes: Sizes
    rows: Rows  # that found the ranges


@dataclass(frozen=True, slots=True)
class Found:
    """What to judge finally: the best first, each more careful than the one before, FP32 last."""

    models: tuple[Int8Model, ...]


def observe(
    model: PreparedModel, ranges: Rows, selection: Rows, sizes: Sizes, *, fast: bool = False
) -> Observed:
    """Find ranges and channels on ``ranges`` and look at the same tensors on ``selection``."""
    plan = plan_of(model.proto)
    most = _RANGE_MACS / (40 if fast else 1)
    ranges, selection = (_drawn(rows, sizes, most) for rows in (ranges, selection))
    axes = {} if fast else channel_axes(model.proto, plan)
    found = calibrate(model, plan.watched, ranges, axes=axes)
    held_out = calibrate(model, plan.watched, selection)
    both = {name for name in found.sketches if name in held_out.sketches}
    found = replace(found, sketches={name: found.sketches[name] for name in sorted(both)})
    return Observed(plan.limited_to(found.ranges()), found, held_out, sizes, ranges)


def _drawn(rows: Rows, sizes: Sizes, macs: float) -> Rows:
    most = max(int(macs / max(sizes.macs, 1.0)), 16)
    return rows if len(rows) <= most else rows.take(np.linspace(0, len(rows) - 1, most).round().astype(int))


def search(
    model: PreparedModel,
    observed: Observed,
    judge: Judging,
    budget: Budget,
    folder: Path,
    *,
    target: Target,
    fast: bool = False,
) -> Found:
    """Find the smallest and fastest INT8 form inside the budget.

    Args:
        model: the FP32 reference.
        observed: its calibration.
        judge: compares with the reference on rows kept for choosing.
        budget: how far a candidate may be off.
        folder: where candidates are written.
        target: what is not to become slower.
        fast: fewer candidates, no recovery.

    Raises:
        BadModel: the FP32 model gives outputs that are not finite.
    """
    work = _Search(model, observed, judge, budget, folder, target, fast=fast)
    if observed.plan.layers:
        best = work.best_ranges()
        if best is not None and not fast:
            best = work.recovered(best)
        if best is not None:
            if best.comparison.inside(budget, _MARGIN):
                work.fewer_scales(best)
            else:
                work.fewer_layers(best)
        work.dynamic()
    return work.found()


@dataclass(slots=True)
class _Trial:
    """A candidate in the works."""

    name: str
    recipe: Recipe
    graph: onnx.ModelProto
    path: Path
    size: int
    comparison: Comparison
    seconds: float | None = None
    problem: str | None = None


class _Search:
    """The candidates of one model, as they come."""

    def __init__(
        self,
        model: PreparedModel,
        observed: Observed,
        judge: Judging,
        budget: Budget,
        folder: Path,
        target: Target,
        *,
        fast: bool,
    ) -> None:
        self._model, self._observed, self._judge, self._budget = model, observed, judge, budget
        self._folder, self._target, self._fast = folder, target, fast
        self._plan = observed.plan
        self._trials: list[_Trial] = []
        self._candidates: dict[str, Candidate] = {}
        self._alone: dict[tuple[int, Mode], float] = {}  # noise power of one layer, relative
        self._float_path = folder / "fp32.onnx"
        save(model.proto, self._float_path)
        self._float_size = self._float_path.stat().st_size
        fused = cost.fused_for(target, model.proto, folder / "arm.onnx")
        self._float_seconds = cost.cost_of(fused, observed.sizes, target).seconds
        self._weights = {tensor.name: tensor for tensor in model.proto.graph.initializer}

    # -- candidates -----------------------------------------------------------------------------------

    def attempt(self, name: str, recipe: Recipe, graph: onnx.ModelProto) -> _Trial | None:
        """Write, load and run one; None if that fails."""
        return self.attempts([(name, recipe, graph)])[0]

    def attempts(self, wanted: Sequence[tuple[str, Recipe, onnx.ModelProto]]) -> list[_Trial | None]:
        """Write, load and run several; None for those that fail."""
        # On x86 only unsigned activations have int8 kernels.
        wanted = [
            (name, replace(recipe, signed=not self._target.blocked), graph) for name, recipe, graph in wanted
        ]
        named: list[tuple[str, Path]] = []
        for name, _, _ in wanted:
            again = sum(known == name or known.startswith(f"{name} (") for known in self._candidates)
            unique = f"{name} ({again + 1})" if again else name
            named.append((unique, self._folder / f"candidate{len(self._candidates)}.onnx"))
            self._candidates[unique] = Candidate(name=unique)  # keeps its place and its name

        def made(index: int) -> Comparison | str:
            (_, recipe, graph), (_, path) = wanted[index], named[index]
            try:
                save(write_int8(graph, self._plan, recipe), path)
                return self._judge.few(path)
            except OSError:
                raise
            except Exception as error:  # of onnx or onnxruntime: this candidate is not one, others may be
                return runtime.one_line(error)

        found = in_threads(made, range(len(wanted)))
        return [
            self._tried(name, path, recipe, graph, result)
            for (name, path), (_, recipe, graph), result in zip(named, wanted, found, strict=True)
        ]

    def _tried(
        self, name: str, path: Path, recipe: Recipe, graph: onnx.ModelProto, found: Comparison | str
    ) -> _Trial | None:
        if isinstance(found, str):
            self._candidates[name] = Candidate(name=name, problem=found)
            path.unlink(missing_ok=True)
            return None
        trial = _Trial(name, recipe, graph, path, path.stat().st_size, found)
        if trial.size >= self._float_size:
            trial.problem = f"not smaller than FP32 ({trial.size} of {self._float_size} bytes)"
        elif not found.inside(self._budget):
            trial.problem = f"outside the budget: {found.verdict()}"
        self._trials.append(trial)
        self._note(trial)
        return trial

    def _note(self, trial: _Trial) -> None:
        self._candidates[trial.name] = Candidate(
            name=trial.name,
            size=trial.size,
            comparison=trial.comparison,
            predicted_seconds=trial.seconds,
            problem=trial.problem,
        )

    def _drop_files(self, kept: Sequence[_Trial]) -> None:
        """Files of candidates that are out of the race: a search of a large model would fill the disk."""
        for trial in self._trials:
            if trial not in kept:
                trial.path.unlink(missing_ok=True)

    # -- ranges and recovery --------------------------------------------------------------------------

    def best_ranges(self) -> _Trial | None:
        """All layers INT8 with each way to choose ranges; the closest."""
        found = self._observed.ranges
        if not any(Mode.STATIC in layer.modes for layer in self._plan.layers):
            return None
        rules: dict[str, Mapping[str, Range]] = {
            rule: ranges_by(rule, found) for rule in (_FAST_RULES if self._fast else RULES)
        }
        rules[_EACH] = ranges_each(found, self._observed.held_out)
        tried = self.attempts(
            [
                (
                    f"static int8, per channel, ranges {rule}",
                    static_recipe(self._plan, ranges),
                    self._model.proto,
                )
                for rule, ranges in rules.items()
            ]
        )
        # max() takes the first of equals
        best = max((trial for trial in tried if trial is not None), key=_closeness, default=None)
        self._drop_files([best] if best else [])
        return best

    def recovered(self, best: _Trial) -> _Trial:
        """Equalize and round by least squares; each is kept if it comes closer."""
        rows = self._observed.rows
        rows = rows.take(np.arange(len(rows))[:: max(len(rows) // _GRAM_ROWS, 1)])
        rule = best.name.rpartition("ranges ")[2]
        if (equalized := self._equalized(rule)) is not None:
            best = self._closer(best, equalized)
        recipe = best.recipe
        rounded = round_weights(self._model, best.graph, self._plan, recipe, rows)
        if rounded:
            name = f"{best.name}, least-squares weights"
            best = self._closer(best, self.attempt(name, replace(recipe, rounded=rounded), best.graph))
        self._drop_files([best])
        return best

    def _equalized(self, rule: str) -> _Trial | None:
        graph = equalize(self._model.proto, self._plan, self._observed.ranges.channels)
        if graph is None or self._judge.probe(graph).sqnr < _PROVEN:
            return None
        watched = sorted(self._observed.ranges.sketches)
        found = calibrate(self._model, watched, self._observed.rows, proto=graph)
        ranges = ranges_by(rule, found) if rule in RULES else ranges_by("least error", found)
        name = f"static int8, per channel, ranges {rule}, equalized"
        return self.attempt(name, static_recipe(self._plan, ranges), graph)

    def _closer(self, best: _Trial, other: _Trial | None) -> _Trial:
        if other is None or _closeness(other) < _closeness(best) + _IMPROVES:
            return best
        return other

    # -- inside the budget ----------------------------------------------------------------------------

    def fewer_scales(self, best: _Trial) -> None:
        """One scale for all weights of a dense layer, where the whole loses next to nothing."""
        dense = [
            layer
            for layer in self._plan.layers
            if layer.kind in ("Gemm", "MatMul") and best.recipe.modes[layer.node] is Mode.STATIC
        ]
        choices = {"all dense layers": dense}
        even = [layer for layer in dense if self._costs_little(layer)]
        if len(even) < len(dense):
            choices[f"{len(even)} dense layers"] = even
        for what, layers in choices.items():
            if not layers:
                continue
            nodes = frozenset(layer.node for layer in layers)
            rounded = {node: kept for node, kept in best.recipe.rounded.items() if node not in nodes}
            recipe = replace(best.recipe, per_tensor=nodes, rounded=rounded)
            trial = self.attempt(f"{best.name}, per tensor in {what}", recipe, best.graph)
            if trial is None or trial.problem:
                continue
            if _closeness(trial) >= _closeness(best) - _PER_TENSOR_COSTS:
                return
            trial.problem = f"costs {_closeness(best) - _closeness(trial):.1f} dB, for a few scales"
            self._note(trial)

    def _costs_little(self, layer: Layer) -> bool:
        """Whether one scale rounds the weights about as well as one per channel."""
        values = array_of(self._weights[layer.weight]).astype(np.float64)
        errors = []
        for axis in (layer.axis, None):
            scale = weight_scale(values, axis)
            each = scale.astype(np.float64)
            if axis is not None:
                each = np.expand_dims(each, 1 - axis)
            errors.append(float(((nearest(values, scale, layer.axis) * each - values) ** 2).sum()))
        return errors[1] <= errors[0] * 10 ** (_PER_TENSOR_COSTS / 10)

    # -- outside the budget ---------------------------------------------------------------------------

    def fewer_layers(self, best: _Trial) -> None:
        """Raise layers to dynamic or float, the worst bargains first, as few as the budget needs."""
        self._probe_alone(best)
        steps = self._steps(best)
        if not steps:
            return
        low, high = 0, len(steps)  # low is outside; high is not known to be inside
        inside: _Trial | None = None
        first = self._expected(steps)
        for turn in range(_BISECTIONS):
            if high - low <= 1 and inside is not None:
                break
            middle = first if turn == 0 else (low + high + (inside is None)) // 2
            middle = min(max(middle, low + 1), high)
            trial = self._raised(best, steps[:middle])
            if trial is not None and trial.comparison.inside(self._budget, _MARGIN):
                high, inside, used = middle, trial, steps[:middle]
            elif middle == high:
                break
            else:
                low = middle
        if inside is None:
            return
        stricter = _STRICTER[1:] if self._fast else _STRICTER
        expected = [self._expected(steps, dB) for dB in (0.0, *stricter)]
        counts = (len(used) + max(more - expected[0], 1) for more in expected[1:])
        for count in dict.fromkeys(min(count, len(steps)) for count in counts):
            self._raised(best, steps[:count])
        if not self._fast:
            self._put_back(best, used)

    def _probe_alone(self, best: _Trial) -> None:
        """The noise of each layer alone, from its INT8 form with all others in float."""
        wanted = [
            (layer, mode)
            for layer in self._plan.layers
            for mode in layer.modes
            if (layer.node, mode) not in self._alone
        ]
        nothing = {layer.node: Mode.FLOAT for layer in self._plan.layers}
        try:
            together = open_alone(best.graph, self._plan, best.recipe)
        except Exception:  # whatever onnx or onnxruntime raises: one of them does not load, which one?
            together = None

        def noise(one: tuple[Layer, Mode]) -> float:
            layer, mode = one
            try:
                if together is not None:
                    found = self._judge.probe(together.switched(one))
                else:
                    recipe = replace(best.recipe, modes={**nothing, layer.node: mode})
                    found = self._judge.probe(write_int8(best.graph, self._plan, recipe))
            except Exception:  # whatever onnx or onnxruntime raises: this layer stays float
                return math.inf
            return float(10 ** (-found.sqnr / 10))

        for (layer, mode), power in zip(wanted, in_threads(noise, wanted), strict=True):
            self._alone[layer.node, mode] = power

    def _steps(self, best: _Trial) -> list[tuple[Layer, Mode, float]]:
        """Layers to raise with the form they get and the noise that takes away, worst bargain first."""
        graph = self._model.proto.graph
        saved = {
            layer.node: cost.saving_of(
                graph.node[layer.node], self._observed.sizes, self._weights, self._target
            )
            for layer in self._plan.layers
        }
        seconds = sum(found[0] for found in saved.values()) or 1.0
        size = sum(found[1] for found in saved.values()) or 1.0
        steps = []
        for layer in self._plan.layers:
            mode = best.recipe.modes[layer.node]
            now = self._alone.get((layer.node, mode), 0.0)
            dynamic = self._alone.get((layer.node, Mode.DYNAMIC), math.inf)
            # Every layer in float costs something besides: Q and DQ at its borders.
            gain = saved[layer.node][0] / seconds + saved[layer.node][1] / size + 1 / len(self._plan.layers)
            if mode is Mode.STATIC and dynamic < now / 2:
                steps.append((now - dynamic, gain / 4, layer, Mode.DYNAMIC))  # most of the gain stays
                steps.append((dynamic, gain, layer, Mode.FLOAT))
            else:
                steps.append((now, gain, layer, Mode.FLOAT))
        # A layer's second step is never a better bargain than its first: the order stays possible.
        steps.sort(key=lambda step: (-step[0] / step[1], step[2].node, step[3] is Mode.FLOAT))
        return [(layer, mode, noise) for noise, _, layer, mode in steps]

    def _expected(self, steps: Sequence[tuple[Layer, Mode, float]], stricter: float = 0.0) -> int:
        """How many steps should be enough for the budget and some dB if the noises of layers just add up."""
        wanted = 10 ** (-(self._budget.min_sqnr + _MARGIN + stricter) / 10)
        left = sum(noise for _, _, noise in steps if math.isfinite(noise))
        for count, (_, _, noise) in enumerate(steps):
            if left <= wanted:
                return count
            left -= noise if math.isfinite(noise) else 0.0
        return len(steps)

    def _raised(self, best: _Trial, steps: Sequence[tuple[Layer, Mode, float]]) -> _Trial | None:
        modes = dict(best.recipe.modes)
        for layer, mode, _ in steps:
            modes[layer.node] = mode
        recipe = replace(best.recipe, modes=modes)
        if all(mode is Mode.FLOAT for mode in modes.values()):
            return None
        return self.attempt(f"{best.name}, {_shares(recipe)}", recipe, best.graph)

    def _put_back(self, best: _Trial, used: Sequence[tuple[Layer, Mode, float]]) -> None:
        """Of the layers raised, the largest may not have been needed after all."""
        kept = list(used)
        by_size = sorted(used, key=lambda step: (-step[0].parameters, step[0].node))
        for step in by_size[:_PUT_BACK]:
            fewer = [other for other in kept if other[0].node != step[0].node]
            if not fewer or len(fewer) == len(kept):
                continue
            trial = self._raised(best, fewer)
            if trial is not None and trial.comparison.inside(self._budget, _MARGIN):
                kept = fewer

    # -- the dynamic form, and the end ----------------------------------------------------------------

    def dynamic(self) -> None:
        """Dense and recurrent layers dynamic, the others float."""
        modes = self._plan.dynamic()
        if any(mode is Mode.DYNAMIC for mode in modes.values()):
            self.attempt(DYNAMIC, Recipe(modes=modes, ranges={}), self._model.proto)

    def found(self) -> Found:
        """The best of what is inside, then more careful ones, then FP32."""
        inside = [trial for trial in self._trials if trial.problem is None and trial.path.exists()]
        for trial in inside:
            fused = cost.fused_for(self._target, trial.path, self._folder / "arm.onnx")
            trial.seconds = cost.cost_of(fused, self._observed.sizes, self._target).seconds
            if trial.seconds > self._float_seconds:
                trial.problem = (
                    f"slower than FP32 on {self._target.name}: {trial.seconds * 1e6:.0f} us instead of "
                    f"{self._float_seconds * 1e6:.0f} us a row by the cost model"
                )
            self._note(trial)
        chosen: list[_Trial] = []
        for trial in sorted((trial for trial in inside if trial.problem is None), key=self._rank):
            # Each is more careful than the one before, by enough to make a difference.
            if len(chosen) == _MOST_MODELS or (
                chosen and _closeness(trial) < _closeness(chosen[-1]) + _APART
            ):
                continue
            trial.comparison = self._judge.selection(trial.path)
            if not trial.comparison.inside(self._budget):
                trial.problem = f"outside the budget on all rows for choosing: {trial.comparison.verdict()}"
            else:
                chosen.append(trial)
            self._note(trial)
        comparison = self._judge.itself()
        if comparison.sqnr < 0:
            raise BadModel("the FP32 model itself gives outputs that are not finite on the calibration rows")
        if not chosen:
            self._candidates[FLOAT] = Candidate(
                name=FLOAT,
                size=self._float_size,
                comparison=comparison,
                predicted_seconds=self._float_seconds,
            )
        candidates = tuple(self._candidates.values())
        return Found((*(self._int8(trial, candidates) for trial in chosen), self._fp32(candidates)))

    def _rank(self, trial: _Trial) -> tuple[bool, float]:
        assert trial.seconds is not None
        careful = trial.comparison.inside(self._budget, _MARGIN)
        return not careful, math.log(trial.size) + math.log(trial.seconds)

    def _int8(self, trial: _Trial, candidates: tuple[Candidate, ...]) -> Int8Model:
        return Int8Model(
            path=trial.path,
            name=trial.name,
            precision="int8",
            size=trial.size,
            plan=self._plan,
            candidates=candidates,
            recipe=trial.recipe,
            graph=trial.graph,
            layers=self._facts(trial.recipe.modes),
            predicted_seconds=trial.seconds,
            predicted_seconds_fp32=self._float_seconds,
        )

    def _fp32(self, candidates: tuple[Candidate, ...]) -> Int8Model:
        return Int8Model(
            path=self._float_path,
            name=FLOAT,
            precision="fp32",
            size=self._float_size,
            plan=self._plan,
            candidates=candidates,
            recipe=None,
            graph=self._model.proto,
            layers=self._facts({}),
            predicted_seconds=self._float_seconds,
            predicted_seconds_fp32=self._float_seconds,
        )

    def _facts(self, modes: Mapping[int, Mode]) -> tuple[LayerFacts, ...]:
        facts = []
        for layer in self._plan.layers:
            mode = modes.get(layer.node, Mode.FLOAT)
            power = self._alone.get((layer.node, layer.modes[0]))
            alone = None if power is None or not math.isfinite(power) else _db(power)
            why = None
            if mode is not layer.modes[0] and modes:
                why = "does not load in INT8" if power == math.inf else "costs more accuracy than it saves"
            facts.append(
                LayerFacts(
                    name=layer.name,
                    kind=layer.kind,
                    mode=mode,
                    parameters=layer.parameters,
                    alone_sqnr=alone,
                    why=why,
                )
            )
        return tuple(facts)


def in_threads(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """``work`` of every item, in order, on as many threads as there are cores to spare."""
    threads = ThreadPoolExecutor(runtime.THREADS)
    try:
        return list(threads.map(work, items))
    finally:
        threads.shutdown(cancel_futures=True)  # Ctrl-C waits for what runs, not for all


def _closeness(trial: _Trial) -> float:
    return trial.comparison.sqnr


def _db(power: float) -> float:
    return round(-10 * math.log10(max(power, 1e-20)), 2)


def _shares(recipe: Recipe) -> str:
    total = len(recipe.modes)
    parts = [f"{recipe.count(Mode.FLOAT)} of {total} layers fp32"]
    if dynamic := recipe.count(Mode.DYNAMIC):
        parts.append(f"{dynamic} dynamic")
    return ", ".join(parts)
