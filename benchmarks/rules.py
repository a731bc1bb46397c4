"""What a row of 512 features costs by rules alone: ``python -m benchmarks.rules``. CPU time, one core."""

from __future__ import annotations

import time

import numpy as np

from benchmarks import machine
from edge_agent.rules.evaluate import Centre, Distance, Limit, Of, Rule, RuleSet, RuleState, Stuck, When

WIDTH = 512
FEATURES = tuple(f"f{number}" for number in range(WIDTH))
DISTANCE = Distance(2.0, {name: Centre(0.0, 1.0) for name in FEATURES})


def rule_sets() -> dict[str, RuleSet]:
    limits = {name: Limit(-3, 3, -9, 9) for name in FEATURES}
    weighted = {name: Limit(-3, 3, -9, 9, weight=1.0 + at % 3) for at, name in enumerate(FEATURES)}
    slow = {name: Limit(-3, 3, -9, 9, deadband=0.1, on_delay=3.0, latch=True) for name in FEATURES}
    some = {f"r{at}": Rule(When(f"f{at} > 3 and f{at + 1} < 2"), "none") for at in range(16)}
    named = {**some, "two": Rule(Of(tuple(some), 2))}
    stuck = {name: Rule(Stuck(name, 60.0), "vote") for name in FEATURES[:100]}
    return {
        "limits, 1 vote": RuleSet(FEATURES, "fail", limits=limits),
        "limits, 8 votes": RuleSet(FEATURES, "fail", limits=limits, votes=8),
        "distance": RuleSet(FEATURES, "fail", distance=DISTANCE),
        "limits, 8 votes, distance": RuleSet(FEATURES, "fail", limits=limits, votes=8, distance=DISTANCE),
        "weighted limits, 8 votes, distance": RuleSet(
            FEATURES, "fail", limits=weighted, votes=8, distance=DISTANCE
        ),
        "the same, 16 expressions, 2 of 16": RuleSet(
            FEATURES, "fail", limits=limits, votes=8, distance=DISTANCE, rules=named
        ),
        "2048 alarms over time, 8 votes": RuleSet(FEATURES, "fail", limits=slow, votes=8),
        "100 stuck sensors, 1 vote, distance": RuleSet(FEATURES, "fail", distance=DISTANCE, rules=stuck),
    }


def microseconds(rules: RuleSet, rows: np.ndarray) -> float:
    """The best of many runs, per row; with history where the rules have one."""
    state: RuleState | None = RuleState() if rules.stateful else None
    best = float("inf")
    for run in range(15):
        begin = time.process_time()
        for turn in range(200):
            state = rules.evaluate(rows, state=state, now=run * 200.0 + turn).state
        best = min(best, (time.process_time() - begin) / 200 / len(rows))
    return best * 1e6


def main() -> None:
    print(f"\nMeasured on {machine.describe()}: microseconds a row of {WIDTH} features.\n")
    print("| rules | one row | one row, 2 % missing | of 64 rows |\n|---|---:|---:|---:|")
    rng = np.random.default_rng(0)
    row = rng.normal(size=(1, WIDTH)).astype(np.float32)
    gaps = np.where(rng.random(row.shape) < 0.02, np.float32(np.nan), row)
    many = rng.normal(size=(64, WIDTH)).astype(np.float32)
    for name, rules in rule_sets().items():
        figures = [microseconds(rules, rows) for rows in (row, gaps, many)]
        print(f"| {name} | " + " | ".join(f"{figure:.1f}" for figure in figures) + " |")


if __name__ == "__main__":
    main()
