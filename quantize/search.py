"""Step 4c: from the recipes that are possible to the one that is shipped.

Invariants: every candidate is written, loaded and run before anything is said of it; what is chosen is inside
the accuracy budget on the rows for choosing, smaller than FP32 and, by the cost model of the target, not
slower; if nothing is, FP32 is chosen and the candidates say why. No clock decides anything: the same input
gives the same file.

The idea, in order:

1. all layers INT8, with every way to choose ranges: the closest goes on;
2. equalization and least-squares rounding, each kept if it comes closer (``recover``);
3. all weights INT8 in the file and computed with in float: how layers rest that cannot be computed in INT8;
4. inside the budget: fewer scales where that costs next to nothing;
   outside: every layer is made INT8 alone, and what its noise buys in bytes and time orders the layers
   (``bargains``); the best bargains become dynamic, stored or float, as few as the budget needs, found by
   bisection;
5. the dynamic form of dense and recurrent layers, as a candidate of its own;
6. of those inside, the one whose size times time, and a little its memory, is least.

"Inside" is what the rows say of others (``confidence``), not what they are themselves.
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
from quantize.bargains import Form, Step, enough, modes_after, steps_of
from quantize.calibrate import RULES, Range, calibrate, ranges_by, ranges_each
from quantize.compare import Comparison
from quantize.config import Budget
from quantize.cost import Target
from quantize.errors import BadModel
from quantize.int8 import (
    Candidate,
    Int8Model,
    LayerFacts,
    Recipe,
    Rounded,
    nearest,
    static_recipe,
    weight_scale,
    write_int8,
)
from quantize.observe import Observed
from quantize.plan import Layer, Mode
from quantize.prepare import PreparedModel
from quantize.recover import WIDEST, equalize, round_weights
from quantize.weights import array_of, save

DYNAMIC: Final = "dynamic int8 (MatMul, Gemm, LSTM)"
FLOAT: Final = "fp32"
STORED: Final = "weights int8, computed in fp32"
_IMPROVES: Final = 0.1  # dB that make a recovery worth keeping
_LEAST_SQUARES: Final = "least-squares weights"
_STORED_SHARE: Final = 0.7  # of the noise allowed: 1.5 dB inside the budget, the rest is for activations
_MEMORY_WEIGHT: Final = 0.25  # of memory against file and time: half of it is worth a sixth of the file
_LEAST_WIN: Final = 1.05  # a layer's time and bytes count, even where all of them together win nothing
_SAME_TIME: Final = 1 + 1e-9  # the same nodes in another order add up to another last digit
_PER_TENSOR_COSTS: Final = 0.5  # dB: what fewer scales may cost
_FAST_RULES: Final = ("min-max", "min-max x2", "99.99 %")
_EACH: Final = "chosen per tensor"
_PROVEN: Final = 90.0  # dB: the equalized FP32 graph against the reference
_BISECTIONS: Final = 6
_PUT_BACK: Final = 3
_STRICTER: Final = (4.0, 8.0)  # dB: more careful candidates, in case the final judgement is less kind
_APART: Final = 2.0  # dB between a candidate and the next more careful one
_MOST_MODELS: Final = 5
_GRAM_ROWS: Final = 1024
_FEWEST_GRAM_ROWS: Final = 8
_FAST_GRAM_MACS: Final = 4e9  # multiply-accumulates of the rows that rounding looks at
_WIDEST_FAST: Final = 1152  # inputs of a layer that is rounded by least squares: 128 channels of 3 x 3


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
class Found:
    """What to judge finally: the best first, each more careful than the one before, FP32 last."""

    models: tuple[Int8Model, ...]


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
        if best is not None:
            best = work.recovered(best)
        work.nothing_computed(best)
        if best is not None:
            if best.comparison.inside(budget):
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
    loaded: int = 0  # bytes of weights and graph in memory, about
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
        self._rounded: Mapping[int, Rounded] = {}  # for the graph of the best static form
        self._stored: _Trial | None = None
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
        rules[_EACH] = ranges_each(rules.values(), self._observed.held_out)
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
        rule = best.name.rpartition("ranges ")[2]
        if not self._fast and (equalized := self._equalized(rule)) is not None:
            best = self._closer(best, equalized)
        self._round(best.graph, best.recipe)
        if self._rounded and not self._fast:
            name = f"{best.name}, {_LEAST_SQUARES}"
            recipe = replace(best.recipe, rounded=self._rounded)
            best = self._closer(best, self.attempt(name, recipe, best.graph))
        self._drop_files([best])
        return best

    def _round(self, graph: onnx.ModelProto, recipe: Recipe) -> None:
        rows, most = self._observed.rows, _GRAM_ROWS
        if self._fast:
            macs = max(self._observed.sizes.macs, 1.0)
            most = int(np.clip(_FAST_GRAM_MACS / macs, _FEWEST_GRAM_ROWS, _GRAM_ROWS // 16))
        rows = rows.take(np.arange(len(rows))[:: max(-(-len(rows) // most), 1)])
        widest = _WIDEST_FAST if self._fast else WIDEST
        self._rounded = round_weights(self._model, graph, self._plan, recipe, rows, widest)

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

    # -- int8 in the file only ------------------------------------------------------------------------

    def nothing_computed(self, best: _Trial | None) -> None:
        """All weights stored in INT8 and computed with in float: what layers rest in that cannot be INT8."""
        modes = self._plan.resting()
        if Mode.STORED not in modes.values():
            return
        graph = self._model.proto if best is None else best.graph
        plain = Recipe(modes=modes, ranges={})
        if best is None:
            self._round(graph, plain)
        wanted = [] if self._fast and self._rounded else [(STORED, plain, graph)]
        if self._rounded:
            wanted.append((f"{STORED}, {_LEAST_SQUARES}", replace(plain, rounded=self._rounded), graph))
        tried = [trial for trial in self.attempts(wanted) if trial is not None]
        self._stored = max(tried, key=_closeness, default=None)

    def _rests_stored(self) -> bool:
        """Whether storing every layer takes so little of the budget that no layer needs to be asked alone."""
        return self._stored is not None and self._noise_of(self._stored) <= _STORED_SHARE * self._allowed()

    def _allowed(self) -> float:
        """Noise power, relative, that the budget allows these rows to have."""
        return float(10 ** (-self._budget.min_sqnr / 10))

    @staticmethod
    def _noise_of(trial: _Trial) -> float:
        return float(10 ** (-trial.comparison.least_sqnr / 10))

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
        """Raise layers to dynamic, stored or float, the worst bargains first, as few as the budget needs."""
        self._probe_alone(best)
        steps = steps_of(self._forms(best))
        if not steps:
            return
        # The spread of the rows is about that of the best form in any other.
        sure = 10 ** ((best.comparison.least_sqnr - best.comparison.sqnr) / 10)
        floor = self._noise_of(self._stored) if self._stored is not None and self._rests_stored() else 0.0

        def expected(stricter: float) -> int:
            return enough(steps, floor * sure, self._allowed() * sure * 10 ** (-stricter / 10))

        low, high = 0, len(steps)  # low is outside; high is not known to be inside
        inside: _Trial | None = None
        first = expected(0.0)
        for turn in range(_BISECTIONS // (2 if self._fast else 1)):
            if high - low <= 1 and inside is not None:
                break
            middle = first if turn == 0 else (low + high + (inside is None)) // 2
            middle = min(max(middle, low + 1), high)
            trial = self._raised(best, steps[:middle])
            if trial is not None and trial.comparison.inside(self._budget):
                high, inside, used = middle, trial, steps[:middle]
            elif middle == high:
                break
            else:
                low = middle
        if inside is None:
            return
        stricter = _STRICTER[1:] if self._fast else _STRICTER
        counts = (len(used) + max(expected(more) - first, 1) for more in stricter)
        for count in dict.fromkeys(min(count, len(steps)) for count in counts):
            self._raised(best, steps[:count])
        if not self._fast:
            self._put_back(best, used)

    def _probe_alone(self, best: _Trial) -> None:
        """The noise of each layer alone, from its INT8 form with all others in float."""
        plan = self._plan
        if self._rests_stored():
            asked = (
                replace(layer, modes=tuple(mode for mode in layer.modes if mode is not Mode.STORED))
                for layer in plan.layers
            )
            plan = replace(plan, layers=tuple(layer for layer in asked if layer.modes))
        wanted = [
            (layer, mode)
            for layer in plan.layers
            for mode in layer.modes
            if (layer.node, mode) not in self._alone
        ]
        nothing = {layer.node: Mode.FLOAT for layer in self._plan.layers}
        try:
            together = open_alone(best.graph, plan, self._with_rounded(best.recipe))
        except Exception:  # whatever onnx or onnxruntime raises: one of them does not load, which one?
            together = None

        def noise(one: tuple[Layer, Mode]) -> float:
            layer, mode = one
            try:
                if together is not None:
                    found = self._judge.probe(together.switched(one))
                else:
                    recipe = self._with_rounded(replace(best.recipe, modes={**nothing, layer.node: mode}))
                    found = self._judge.probe(write_int8(best.graph, self._plan, recipe))
            except Exception:  # whatever onnx or onnxruntime raises: this layer stays float
                return math.inf
            return float(10 ** (-found.sqnr / 10))

        for (layer, mode), power in zip(wanted, in_threads(noise, wanted), strict=True):
            self._alone[layer.node, mode] = power

    def _forms(self, best: _Trial) -> Iterable[tuple[Layer, list[Form]]]:
        """Of every layer the forms it can take, that of ``best`` first, with noise and loss."""
        saved = {layer.node: self._saved(layer) for layer in self._plan.layers}
        seconds = sum(found[0] for found in saved.values()) or 1.0
        size = sum(found[1] for found in saved.values()) or 1.0
        # What is ranked in the end is size times time: how much of its logarithm all layers together win.
        wins_time = math.log(max(self._float_seconds / self._running(best)[0], _LEAST_WIN))
        wins_size = math.log(max(self._float_size / best.size, _LEAST_WIN))
        for layer in self._plan.layers:
            # Every layer in float costs something besides: Q and DQ at its borders.
            time = wins_time * (saved[layer.node][0] / seconds + 1 / len(self._plan.layers))
            memory = wins_size * saved[layer.node][1] / size
            losses = {
                Mode.DYNAMIC: (time + memory) / 4,  # most of the gain stays
                Mode.STORED: time,
                Mode.FLOAT: time + memory,
            }
            start = best.recipe.modes[layer.node]
            now = Form(start, self._alone.get((layer.node, start), 0.0), losses.get(start, 0.0))
            others = [
                # Not asked alone: what all of them together make is little, and known.
                Form(mode, self._alone.get((layer.node, mode), 0.0), losses[mode])
                for mode in layer.modes
                if mode is not start and mode is not Mode.STATIC
            ]
            yield layer, [now, *others, Form(Mode.FLOAT, 0.0, losses[Mode.FLOAT])]

    def _running(self, trial: _Trial) -> tuple[float, int]:
        """On the target: seconds of a row by the cost model, and bytes of the graph in memory."""
        fused = cost.fused_for(self._target, trial.path, self._folder / "arm.onnx")
        return cost.cost_of(fused, self._observed.sizes, self._target).seconds, fused.ByteSize()

    def _saved(self, layer: Layer) -> tuple[float, int]:
        """Seconds of a row and bytes that INT8 saves in this layer."""
        node = self._model.proto.graph.node[layer.node]
        return cost.saving_of(node, self._observed.sizes, self._weights, self._target)

    def _raised(self, best: _Trial, steps: Sequence[Step]) -> _Trial | None:
        modes = modes_after(best.recipe.modes, steps)
        recipe = self._with_rounded(replace(best.recipe, modes=modes))
        if all(mode is Mode.FLOAT for mode in modes.values()):
            return None
        base = best.name.removesuffix(f", {_LEAST_SQUARES}") + (
            f", {_LEAST_SQUARES}" if recipe.rounded else ""
        )
        return self.attempt(f"{base}, {_shares(recipe)}", recipe, best.graph)

    def _with_rounded(self, recipe: Recipe) -> Recipe:
        """The recipe with least-squares weights, if those alone are closer: noise of activations hides it."""
        if self._stored is None or not self._stored.recipe.rounded:
            return recipe
        return replace(recipe, rounded=self._rounded)

    def _put_back(self, best: _Trial, used: Sequence[Step]) -> None:
        """Of the layers raised, those that lose most may not have been needed after all."""
        kept = list(used)
        by_loss = sorted(
            used, key=lambda step: (*(-saved for saved in self._saved(step.layer)), step.layer.node)
        )
        for step in by_loss[:_PUT_BACK]:
            fewer = [other for other in kept if other.layer.node != step.layer.node]
            if not fewer or len(fewer) == len(kept):
                continue
            trial = self._raised(best, fewer)
            if trial is not None and trial.comparison.inside(self._budget):
                kept = fewer

    # -- the dynamic form, and the end ----------------------------------------------------------------

    def dynamic(self) -> None:
        """Dense and recurrent layers dynamic, the others stored or float."""
        tried: Mapping[int, Mode] = {}
        for rest in (Mode.STORED, Mode.FLOAT):
            modes = self._plan.dynamic(rest)
            if Mode.DYNAMIC not in modes.values() or (rest is Mode.FLOAT and modes == tried):
                return
            tried = modes
            recipe, graph = Recipe(modes=modes, ranges={}), self._model.proto
            if self._stored is not None and self._stored.recipe.rounded:
                recipe, graph = replace(recipe, rounded=self._rounded), self._stored.graph
            others = len(modes) > recipe.count(Mode.DYNAMIC)
            name = f"{DYNAMIC}, {_shares(recipe)}" if others else DYNAMIC
            trial = self.attempt(name, recipe, graph)
            if trial is not None and trial.problem is None:
                return

    def found(self) -> Found:
        """The best of what is inside, then more careful ones, then FP32."""
        inside = [trial for trial in self._trials if trial.problem is None and trial.path.exists()]
        if not inside:  # too few rows to be sure of anything: then what they are themselves
            inside = [trial for trial in self._trials if self._nearly(trial) and trial.path.exists()]
        for trial in inside:
            trial.problem = None
            trial.seconds, trial.loaded = self._running(trial)
            if trial.seconds > self._float_seconds * _SAME_TIME:
                trial.problem = (
                    f"slower than FP32 on {self._target.name}: {trial.seconds * 1e6:.0f} us instead of "
                    f"{self._float_seconds * 1e6:.0f} us a row by the cost model"
                )
            self._note(trial)
        chosen = self._ladder(sorted((trial for trial in inside if trial.problem is None), key=self._rank))
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

    def _ladder(self, ranked: Sequence[_Trial]) -> list[_Trial]:
        """The best, then ever more careful ones, by enough to make a difference; the most careful last."""
        careful = max(ranked, key=_surely, default=None)
        chosen: list[_Trial] = []
        for trial in ranked:
            above = not chosen or _surely(trial) >= _surely(chosen[-1]) + _APART
            last = trial is careful and (not chosen or _surely(trial) > _surely(chosen[-1]))
            if not last and (not above or len(chosen) >= _MOST_MODELS - 1):
                continue
            trial.comparison = self._judge.selection(trial.path)
            if trial.comparison.inside(self._budget, surely=False):
                chosen.append(trial)
            else:
                trial.problem = f"outside the budget on all rows for choosing: {trial.comparison.verdict()}"
            self._note(trial)
        return chosen

    def _nearly(self, trial: _Trial) -> bool:
        return trial.size < self._float_size and trial.comparison.inside(self._budget, surely=False)

    @staticmethod
    def _rank(trial: _Trial) -> float:
        assert trial.seconds is not None
        return math.log(trial.size) + math.log(trial.seconds) + _MEMORY_WEIGHT * math.log(trial.loaded)

    def _int8(self, trial: _Trial, candidates: tuple[Candidate, ...]) -> Int8Model:
        return Int8Model(
            path=trial.path,
            name=trial.name,
            precision="int8" if _computes(trial.recipe) else "int8 weights",
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
        computes = any(mode in (Mode.STATIC, Mode.DYNAMIC) for mode in modes.values())
        for layer in self._plan.layers:
            mode = modes.get(layer.node, Mode.FLOAT)
            power = self._alone.get((layer.node, layer.modes[0]))
            alone = None if power is None or not math.isfinite(power) else _db(power)
            why = None
            if mode is not layer.modes[0] and modes:
                why = "does not load in INT8" if power == math.inf else "costs more accuracy than it saves"
                if mode is Mode.STORED and not computes:
                    why = "INT8 in the file: computing in INT8 is worth less than it costs"
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


def _surely(trial: _Trial) -> float:
    return trial.comparison.least_sqnr


def _db(power: float) -> float:
    return round(-10 * math.log10(max(power, 1e-20)), 2)


def _shares(recipe: Recipe) -> str:
    total = len(recipe.modes)
    parts = [f"{recipe.count(Mode.FLOAT)} of {total} layers fp32"]
    parts += [f"{count} {mode}" for mode in (Mode.STORED, Mode.DYNAMIC) if (count := recipe.count(mode))]
    return ", ".join(parts)


def _computes(recipe: Recipe) -> bool:
    return bool(recipe.count(Mode.STATIC) + recipe.count(Mode.DYNAMIC))
