"""docs/fleet.md names every policy field and every verb."""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec
import pytest

from fleet import config
from fleet.cli import _parser
from fleet.machine import Phase
from fleet.registry import RegistryConfig

GUIDE = (Path(__file__).parents[2] / "docs" / "fleet.md").read_text()


@pytest.mark.parametrize(
    "section",
    [
        config.MetricConfig,
        config.AnalysisConfig,
        config.CanaryConfig,
        config.Policy,
        config.FleetConfig,
        RegistryConfig,
    ],
)
def test_every_field_is_explained(section: type[msgspec.Struct]) -> None:
    for field in msgspec.structs.fields(section):
        assert field.name in GUIDE, f"{section.__name__}.{field.name}"


def test_every_verb_and_phase_is_explained() -> None:
    def verbs(parser: argparse.ArgumentParser) -> list[str]:
        found = []
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, sub in action.choices.items():
                    found += [name, *verbs(sub)]
        return found

    for word in (*verbs(_parser()), *(phase.value for phase in Phase)):
        assert word in GUIDE, word
