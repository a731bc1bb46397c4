"""``report.html``: the report as one page that needs nothing else. Pure: facts in, text out.

Invariants: no script, no network (a content security policy forbids both), every plot is SVG drawn here and
has its figures in words beside it; colours come from variables that follow the reader's light or dark scheme,
and no meaning hangs on colour alone.
"""

# ruff: noqa: E501 - markup reads better unbroken
from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

from quantize.compare import IDENTICAL

_WIDTH: Final = 720
_HEIGHT: Final = 300
_COMPUTED_IN_FLOAT: Final = ("fp32", "stored")
_LEFT: Final = 64
_RIGHT: Final = 20
_TOP: Final = 28
_BOTTOM: Final = 44
_BAR: Final = 22
_MOST_BARS: Final = 60
_LONGEST: Final = 28  # characters of a name beside its bar

_STYLE: Final = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1f24; --soft: #57606a; --line: #d5dae0;
  --one: #0a58ca; --two: #b04a00; --fill: #0a58ca26; --card: #f5f7f9; }
@media (prefers-color-scheme: dark) { :root { --paper: #10151b; --ink: #e6edf3; --soft: #a0abb6; --line: #333d47;
  --one: #79b8ff; --two: #ffb066; --fill: #79b8ff33; --card: #18202a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 60rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p, li { max-width: 46rem; } .soft { color: var(--soft); } code { font-size: .9em; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .93rem; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child, td:first-child, td.text, th.text { text-align: left; } thead th { color: var(--soft);
  font-weight: 600; } .wide { overflow-x: auto; }
.note { background: var(--card); border-left: .3rem solid var(--two); padding: .5rem .9rem; margin: .8rem 0; }
.plot { overflow-x: auto; }
svg { display: block; width: 100%; height: auto; min-width: 36rem; max-width: 48rem; } svg text { fill: var(--ink); font-size: 13px; }
svg .soft { fill: var(--soft); } .axis { stroke: var(--soft); } .grid { stroke: var(--line); }
.one { fill: var(--one); } .two { fill: var(--two); } .path { fill: none; stroke: var(--one); stroke-width: 2; }
.bars { fill: var(--fill); stroke: var(--one); } .hollow { fill: none; stroke: var(--two); stroke-width: 2; }
.limit { stroke: var(--ink); stroke-width: 2; stroke-dasharray: 6 4; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--soft); }
@media print { body { max-width: none; padding: 0; font-size: .85rem; print-color-adjust: exact; }
  svg, tr, .note { break-inside: avoid; } h2 { break-after: avoid; } svg { min-width: 0; } .plot, .wide { overflow: visible; }
  details::details-content { content-visibility: visible; block-size: auto; } }
"""


def render(facts: Mapping[str, Any]) -> str:
    """The page for the facts of ``report.json``, with or without the times beside the bundle."""
    model = facts["model"]
    title = f"{model['name']} {model['version']}"
    parts = [
        _head(facts, title),
        _before_after(facts),
        _curve(facts),
        _layers(facts),
        _scores(facts),
        _in_float(facts),
        _arm(facts),
        _checks(facts),
        _origin(facts),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}: quantization report</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


# -- figures ----------------------------------------------------------------------------------------------


def ratio(before: float, after: float, less: str, more: str, same: str) -> str:
    """``3.2x smaller``, ``1.2x larger``: how many times, and which way; ``same`` within five in a hundred."""
    times = before / max(after, 1e-12)
    if 0.95 <= times <= 1.05:
        return same
    return f"{times:.1f}x {less}" if times > 1 else f"{1 / max(times, 1e-12):.1f}x {more}"


def decibels(sqnr: float) -> str:
    """An SQNR for people."""
    return "no difference" if sqnr >= IDENTICAL else f"{sqnr:.1f} dB"


# -- sections ---------------------------------------------------------------------------------------------


def _head(facts: Mapping[str, Any], title: str) -> str:
    int8, found = facts["int8"], facts["comparison"]
    size = ratio(facts["source"]["bytes"], int8["bytes"], "smaller than", "larger than", "as large as")
    sentence = (
        f"{escape(int8['chosen'])}: {_bytes(int8['bytes'])}, {size} the file that came; "
        f"{decibels(found['sqnr'])} from the FP32 reference on {found['rows']} held-out rows."
    )
    digest = facts.get("bundle", {}).get("digest")
    lines = [f"<h1>{escape(title)}</h1>", f"<p>{sentence}</p>"]
    if digest:
        lines.append(f'<p class="soft">Bundle <code>{escape(digest)}</code></p>')
    lines += [f'<p class="note" role="note">{escape(text)}</p>' for text in facts.get("warnings", ())]
    return "\n".join(lines)


def _before_after(facts: Mapping[str, Any]) -> str:
    int8, found = facts["int8"], facts["comparison"]
    chosen = int8["precision"].upper()
    rows = [("Size", _bytes(facts["source"]["bytes"]), _bytes(int8["bytes"]))]
    latency = facts.get("latency")
    if latency:
        rows.append(
            (
                f"Latency here ({escape(latency['machine'])}, one thread)",
                _seconds(latency["fp32_seconds"]),
                _seconds(latency["chosen_seconds"]),
            )
        )
    predicted = int8.get("predicted_seconds"), int8.get("predicted_seconds_fp32")
    if None not in predicted:
        target = (facts.get("arm") or {}).get("target", "target")
        rows.append((f"Cost model for {escape(target)}", _seconds(predicted[1]), _seconds(predicted[0])))
    for name, before, after, form in (
        ("ROC-AUC", "auc_reference", "auc", "{:.4f}"),
        ("Bad rows caught", "caught_reference", "caught", "{:.1%}"),
        ("False alarms", "false_alarms_reference", "false_alarms", "{:.1%}"),
        ("Mean score", "mean_score_reference", "mean_score", "{:.5g}"),
    ):
        if found.get(after) is not None:
            rows.append((name, form.format(found[before]), form.format(found[after])))
        if after == "auc" and found.get("drops_high"):
            most = max(found["drops_high"]["auc"], 0.0)
            rows.append(("ROC-AUC falls on other rows by at most (95 of 100 times)", "", form.format(most)))
    if found.get("agreement") is not None:
        rows.append(("Same decision as FP32", "", f"{found['agreement']:.1%}"))
    rows.append(("Signal to quantization noise", "", decibels(found["sqnr"])))
    if found.get("sqnr_low") is not None:
        rows.append(
            ("Signal to noise on other rows above (95 of 100 times)", "", decibels(found["sqnr_low"]))
        )
    note = ""
    if latency and latency["timed"] != "the bundle's model":
        note = f'<p class="soft">Latency of INT8 is that of {escape(latency["timed"])}.</p>'
    return "<h2>Before and after</h2>" + _table(["", "FP32", chosen], rows) + note


def _curve(facts: Mapping[str, Any]) -> str:
    points = []  # (bytes, dB, label, kind, auc)
    for tried in facts["int8"]["candidates"]:
        comparison = tried.get("comparison")
        if tried.get("size") and comparison and comparison["sqnr"] < 199:
            kind = "chosen" if tried["name"] == facts["int8"]["chosen"] else "tried"
            points.append((tried["size"], comparison["sqnr"], tried["name"], kind, comparison.get("auc")))
    pruning = facts.get("pruning") or {}
    curve = [
        (
            point["bytes"],
            point["sqnr"],
            f"pruned to {point['share']:.0%} of the weights"
            + (", distilled" if point.get("distilled") else ""),
            "pruned",
            point.get("auc"),
        )
        for point in pruning.get("curve", ())
    ]
    if not points and not curve:
        return ""
    everything = points + curve
    width = _Axis([math.log10(point[0]) for point in everything], _LEFT, _WIDTH - _RIGHT, ticks=False)
    height = _Axis([point[1] for point in everything], _HEIGHT - _BOTTOM, _TOP)
    marks = [*height.grid(), _x_title("size of model.onnx (logarithmic)"), _y_title("SQNR in dB")]
    sizes = _decades([point[0] for point in everything])
    marks += [_x_tick(width.at(math.log10(size)), _bytes(size)) for size in sizes]
    if len(curve) > 1:
        path = " ".join(f"{width.at(math.log10(p[0])):.1f},{height.at(p[1]):.1f}" for p in sorted(curve))
        marks.append(f'<polyline class="path" points="{path}"/>')
    order = ("pruned", "tried", "chosen")  # the chosen one on top
    for size, sqnr, label, kind, _ in sorted(everything, key=lambda point: order.index(point[3])):
        x, y = width.at(math.log10(size)), height.at(sqnr)
        text = f"<title>{escape(label)}: {_bytes(size)}, {sqnr:.1f} dB</title>"
        if kind == "pruned":
            marks.append(
                f'<rect class="one" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8">{text}</rect>'
            )
        elif kind == "chosen":
            marks.append(f'<circle class="two" cx="{x:.1f}" cy="{y:.1f}" r="7">{text}</circle>')
        else:
            marks.append(f'<circle class="hollow" cx="{x:.1f}" cy="{y:.1f}" r="5">{text}</circle>')
    described = (
        f"Accuracy in dB against file size for {len(everything)} variants; the table below has the figures."
    )
    rows = [
        (escape(label) + (" (chosen)" if kind == "chosen" else ""), _bytes(size), f"{sqnr:.1f} dB", _auc(auc))
        for size, sqnr, label, kind, auc in sorted(everything, key=lambda point: -point[0])
    ]
    legend = "Filled circle: chosen. Open circles: INT8 candidates." + (
        " Squares: pruned, before INT8 (size estimated)." if curve else ""
    )
    widths = pruning.get("widths") or ()
    pruned = ""
    if widths:
        listed = ", ".join(f"{escape(w['layer'])} {w['before']} to {w['after']}" for w in widths)
        pruned = f"<p>Channels: {listed}.</p>"
    return (
        "<h2>Size and accuracy</h2>"
        + _svg("size-accuracy", "Size and accuracy", described, marks)
        + f'<p class="soft">{legend}</p>{pruned}<details><summary>All variants</summary>'
        + _table(["variant", "size", "SQNR", "AUC"], rows)
        + "</details>"
    )


def _layers(facts: Mapping[str, Any]) -> str:
    layers = facts["int8"].get("layer_facts") or []
    errors = [
        (layer, layer.get("sqnr") if layer.get("sqnr") is not None else layer.get("alone_sqnr"))
        for layer in layers
    ]
    known = [(layer, value) for layer, value in errors if value is not None and value < 199]
    worst = sorted(range(len(known)), key=lambda index: known[index][1])[:_MOST_BARS]
    drawn = [known[index] for index in sorted(worst)]
    if not layers:
        return ""
    svg = ""
    names = _short([layer["name"] for layer, _ in drawn])
    if drawn:
        top = max(value for _, value in drawn)
        low = min([0.0, *(value for _, value in drawn)])
        left, right = 220, _WIDTH - 70
        scale = (right - left) / max(top - low, 1e-9)
        marks = []
        for index, (layer, value) in enumerate(drawn):
            y = _TOP + index * _BAR
            start, end = sorted((left + (0 - low) * scale, left + (value - low) * scale))
            kind = "hollow" if layer["mode"] in _COMPUTED_IN_FLOAT else "bars"
            marks.append(f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{escape(names[index])}</text>')
            marks.append(
                f'<rect class="{kind}" x="{start:.1f}" y="{y + 3}" width="{max(end - start, 1):.1f}" '
                f'height="{_BAR - 6}"><title>{escape(layer["name"])}: {value:.1f} dB</title></rect>'
            )
            marks.append(f'<text class="soft" x="{end + 6:.1f}" y="{y + 15}">{value:.0f} dB</text>')
        height = _TOP * 2 + len(drawn) * _BAR
        described = (
            f"Signal to noise of {len(drawn)} layers, in graph order; the table below has the figures."
        )
        svg = _svg("layer-error", "Error per layer", described, marks, height)
    rows = [
        (
            f"<code>{escape(layer['name'])}</code>",
            escape(layer["kind"]),
            escape(layer["mode"]),
            f"{layer['parameters']:,}",
            "" if layer.get("alone_sqnr") is None else f"{layer['alone_sqnr']:.1f} dB",
            "" if layer.get("sqnr") is None else f"{layer['sqnr']:.1f} dB",
        )
        for layer in layers
    ]
    fewer = f" Drawn are the {len(drawn)} worst of {len(known)}." if len(drawn) < len(known) else ""
    return (
        "<h2>Error per layer</h2>"
        + svg
        + '<p class="soft">Signal to noise at each layer\'s output in the written file, everything before it included; '
        f"higher is better. Open bars are computed in FP32.{fewer}</p><details><summary>All layers</summary>"
        + _table(["layer", "kind", "runs as", "weights", "alone", "in the file"], rows)
        + "</details>"
    )


def _scores(facts: Mapping[str, Any]) -> str:
    found = facts.get("scores")
    if not found:
        return ""
    edges, good, bad = found["edges"], found["good"], found.get("bad")
    tallest = max([1, *good, *(bad or ())])
    x = _Axis(edges, _LEFT, _WIDTH - _RIGHT)
    y = _Axis([0, tallest], _HEIGHT - _BOTTOM, _TOP)
    marks = [*y.grid(), *x.ticks(_HEIGHT - _BOTTOM), _x_title("score"), _y_title("rows")]
    for counts, kind, name in ((good, "bars", "good"), (bad, "hollow", "bad")):
        for index, count in enumerate(counts or ()):
            if count:
                left, right, top = x.at(edges[index]), x.at(edges[index + 1]), y.at(count)
                marks.append(
                    f'<rect class="{kind}" x="{left:.1f}" y="{top:.1f}" width="{max(right - left - 1, 1):.1f}" '
                    f'height="{y.at(0) - top:.1f}"><title>{count} {name} rows from {edges[index]:.4g} to '
                    f"{edges[index + 1]:.4g}</title></rect>"
                )
    threshold = found["threshold"]
    if edges[0] <= threshold <= edges[-1]:
        at = x.at(threshold)
        side = "end" if at > _WIDTH / 2 else "start"
        marks.append(
            f'<line class="limit" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'
        )
        shift = -6 if side == "end" else 6
        marks.append(
            f'<text x="{at + shift:.1f}" y="{_TOP + 12}" text-anchor="{side}">threshold {threshold:.4g}</text>'
        )
    beyond = "" if edges[0] <= threshold <= edges[-1] else " (not in the plot: no row comes near)"
    described = (
        f"Histogram of scores of {sum(good)} {'good' if bad else 'held-out'} rows"
        + (f" and {sum(bad)} bad rows" if bad else "")
        + f"; rows above {threshold:.4g} fail{beyond}."
    )
    legend = described + (" Filled: good. Outlined: bad." if bad else "")
    if found.get("beyond"):
        legend += f" {found['beyond']} rows with higher scores are counted in the last bar."
    return (
        "<h2>Scores</h2>"
        + _svg("scores", "Scores", described, marks)
        + f'<p class="soft">{escape(legend)}</p>'
    )


def _in_float(facts: Mapping[str, Any]) -> str:
    lines = [
        f"<li><code>{escape(layer['name'])}</code> ({escape(layer['kind'])}, {escape(layer['mode'])}): "
        f"{escape(layer.get('why') or 'has no INT8 form')}</li>"
        for layer in facts["int8"].get("layer_facts") or ()
        if layer["mode"] in _COMPUTED_IN_FLOAT
    ]
    passed = [
        f"<li>{escape(tried['name'])}: {escape(tried['problem'])}</li>"
        for tried in facts["int8"]["candidates"]
        if tried.get("problem")
    ]
    text = "<h2>What is computed in FP32, and why</h2>"
    if facts["int8"]["precision"] == "fp32":
        text += "<p>Everything: no INT8 candidate was good enough, so the bundle carries the FP32 model.</p>"
    elif lines:
        text += f"<ul>{''.join(lines)}</ul>"
    else:
        text += "<p>No convolution, dense or recurrent layer: all of them run in INT8.</p>"
    if passed:
        text += f"<details><summary>Candidates passed over ({len(passed)})</summary><ul>{''.join(passed)}</ul></details>"
    return text


def _arm(facts: Mapping[str, Any]) -> str:
    arm = facts.get("arm")
    if not arm:
        return ""
    bound = arm["bound"]
    cached = {True: "the weights fit its last cache level", False: "the weights do not fit its caches"}.get(
        bound["cached"], "its caches are not known"
    )
    text = (
        f"<h2>On {escape(arm['target'])}</h2><p>{escape(arm['board'][:1].upper() + arm['board'][1:])}: {escape(arm['mlas'])}. One row touches "
        f"{_bytes(bound['bytes'])} and takes {bound['macs'] / 1e6:.3g} million multiply-accumulates: at the stated "
        f"rates of one core at least {_seconds(bound['from_memory'])} if all of it comes from memory and "
        f"{_seconds(bound['arithmetic'])} of arithmetic; {cached}. This is a bound, not a promise: nothing was "
        "measured on a board.</p>"
    )
    kernels = ", ".join(
        f"{count} {escape(kind)}" for kind, count in facts["int8"]["kernels_on_arm64"].items()
    )
    text += f"<p>The graph as ARM64 runs it: {kernels}.</p>"
    rows = [
        (
            f"<code>{escape(layer['name'])}</code>",
            escape(layer["kernel"]),
            _bytes(layer["weight_bytes"]),
            _bytes(layer["activation_bytes"]),
            f"{layer['macs']:,}",
            f"{layer['macs'] / max(1, layer['weight_bytes'] + layer['activation_bytes']):.1f}",
        )
        for layer in arm["layers"]
    ]
    head = ["layer", "kernel", "weights", "activations", "MACs", "MACs a byte"]
    text += f"<details><summary>Bytes and arithmetic of each layer</summary>{_table(head, rows)}</details>"
    left = [
        (f"<code>{escape(one['tensor'])}</code>", escape(one["node"]), escape(one["reason"]))
        for one in arm["left_over"]
    ]
    if left:
        head = ["tensor", "node", "why it stays"]
        text += f"<details><summary>Q/DQ left over ({len(left)})</summary>{_table(head, left)}</details>"
    return text


def _checks(facts: Mapping[str, Any]) -> str:
    checks = facts.get("verification")
    if not checks:
        return ""
    words = {True: "passed", False: "failed", None: "skipped"}
    rows = [(escape(one["name"]), words[one["passed"]], escape(one["detail"])) for one in checks]
    return "<h2>Checks of the written bundle</h2>" + _table(["check", "result", "found"], rows, text=(1, 2))


def _origin(facts: Mapping[str, Any]) -> str:
    data, golden = facts["data"], facts["golden"]
    tools = ", ".join(f"{escape(name)} {escape(version)}" for name, version in facts["tools"].items())
    rows = [
        ("Command", f"<code>{escape(facts['model']['command'])}</code>"),
        ("Model", f"{escape(facts['source']['file'])} <code>{escape(facts['source']['digest'])}</code>"),
        ("Calibration", f"{escape(data['calibration'])}, {data['rows']['calibration']} rows"),
        ("Judged on", f"{data['rows']['judgement']} rows that had no part in making the model"),
        ("Golden vectors", f"{golden['rows']} rows, {escape(_word(golden['agreement']))}"),
        ("Tools", tools),
    ]
    return "<h2>Where it comes from</h2>" + _table(["", ""], rows, text=(1,))


# -- drawing ----------------------------------------------------------------------------------------------


class _Axis:
    """Values to pixels, with round ticks."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, ticks: bool = True) -> None:
        low, high = min(values), max(values)
        room = (high - low) * 0.06 or max(abs(high) * 0.1, 0.05)
        if ticks:
            self.step = _round_step((high - low or 1.0) / 5)
            low = math.floor(low / self.step) * self.step
            high = math.ceil(high / self.step) * self.step
            high = high if high > low else low + self.step
        else:
            low, high = low - room, high + room
            self.step = high - low
        self._low, self._high, self._start, self._end = low, high, start, end

    def at(self, value: float) -> float:
        return self._start + (value - self._low) / (self._high - self._low) * (self._end - self._start)

    def _values(self) -> list[float]:
        count = round((self._high - self._low) / self.step)
        return [self._low + index * self.step for index in range(count + 1)]

    def grid(self) -> list[str]:
        """Horizontal lines with their figures."""
        lines = []
        for value in self._values():
            y = self.at(value)
            lines.append(
                f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
            lines.append(
                f'<text class="soft" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>'
            )
        return lines

    def ticks(self, bottom: float) -> list[str]:
        """Figures below."""
        return [_x_tick(self.at(value), f"{value:.4g}", bottom) for value in self._values()]


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * factor for factor in (1, 2, 5, 10) if step <= power * factor * 1.0001)


def _decades(sizes: Sequence[float]) -> list[float]:
    """A few round sizes over the range."""
    low, high = min(sizes), max(sizes)
    found = [
        factor * 10**power
        for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for factor in (1, 2, 5)
        if low * 0.93 <= factor * 10**power <= high * 1.07
    ]
    return found if len(found) > 1 else sorted({low, high})


def _x_tick(x: float, text: str, bottom: float = _HEIGHT - _BOTTOM) -> str:
    return f'<text class="soft" x="{x:.1f}" y="{bottom + 18:.1f}" text-anchor="middle">{escape(text)}</text>'


def _x_title(text: str) -> str:
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    return f'<text class="soft" x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(text)}</text>'


def _y_title(text: str) -> str:
    return f'<text class="soft" x="4" y="12">{escape(text)}</text>'


def _svg(name: str, title: str, described: str, marks: Sequence[str], height: int = _HEIGHT) -> str:
    return (
        f'<div class="plot"><svg role="img" viewBox="0 0 {_WIDTH} {height}" aria-labelledby="{name}-title {name}-text">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-text">{escape(described)}</desc>'
        + "".join(marks)
        + "</svg></div>"
    )


def _short(names: Sequence[str]) -> list[str]:
    """Names that fit beside a bar: without the parts that all begin and end with; else without their middle."""
    parts = [re.split(r"(?<=[/.])", name) for name in names]
    if len(names) > 1 and max(map(len, names)) > _LONGEST:
        first = max(_alike(parts) - 1, 0)  # a number alone would not say of what
        last = _alike([each[first:][::-1] for each in parts])
        parts = [each[first : len(each) - last] or each for each in parts]
    half = (_LONGEST - 1) // 2
    shown = ("".join(each).rstrip("/.") for each in parts)
    return [name if len(name) <= _LONGEST else f"{name[:half]}…{name[-half:]}" for name in shown]


def _alike(rows: Sequence[Sequence[str]]) -> int:
    """How many parts all begin with."""
    return sum(1 for _ in itertools.takewhile(lambda each: len(set(each)) == 1, zip(*rows, strict=False)))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, text: Sequence[int] = ()) -> str:
    def cell(tag: str, index: int, value: str) -> str:
        kind = ' class="text"' if index in text else ""
        scope = ' scope="col"' if tag == "th" else ""
        return f"<{tag}{scope}{kind}>{value}</{tag}>"

    top = ""
    if any(head):
        top = f"<thead><tr>{''.join(cell('th', i, escape(h)) for i, h in enumerate(head))}</tr></thead>"
    body = "".join(f"<tr>{''.join(cell('td', i, v) for i, v in enumerate(row))}</tr>" for row in rows)
    return f'<div class="wide"><table>{top}<tbody>{body}</tbody></table></div>'


def _bytes(size: float) -> str:
    if size >= 1e6:
        return f"{size / 1e6:.3g} MB"
    return f"{size / 1e3:.3g} kB" if size >= 1e3 else f"{size:.0f} B"


def _seconds(value: float) -> str:
    if value >= 1e-3:
        return f"{value * 1e3:.3g} ms"
    return f"{value * 1e6:.3g} µs" if value >= 1e-7 else "under 0.1 µs"


def _auc(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _word(value: Any) -> str:
    return str(getattr(value, "value", value))
