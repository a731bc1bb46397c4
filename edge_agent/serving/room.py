"""Room for models: who must leave the memory so that those that stay fit into it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from edge_agent.contract.bundle import MODEL
from edge_agent.contract.digest import Digest
from edge_agent.contract.manifest import Manifest

_MEMORY_PER_FILE: Final = 2  # onnxruntime keeps the weights and a packed copy of them


@dataclass(frozen=True, slots=True)
class Tenant:
    """A loaded model that may leave: of which name, what it is, and when it was asked last."""

    name: str
    manifest: Manifest
    asked: float


def who_leaves(budget: float, staying: Iterable[Manifest], others: Iterable[Tenant]) -> list[str]:
    """The names of those that must leave, the one not asked for longest first.

    Those who share a model file share its memory. They leave together, or not at all: alone, none of them
    would make room.

    Args:
        budget: bytes for all models together; 0: no limit.
        staying: what will be in memory whatever else must leave for it.
        others: what is in memory and may leave.
    """
    if not budget:
        return []
    stays = _by_file(staying)
    groups: dict[Digest, list[Tenant]] = {}
    for tenant in others:
        member = tenant.manifest.members[MODEL]
        if member.digest not in stays:
            groups.setdefault(member.digest, []).append(tenant)
    total = sum(stays.values()) + sum(_memory(group[0].manifest) for group in groups.values())
    leaving: list[str] = []
    for group in sorted(groups.values(), key=lambda group: max(tenant.asked for tenant in group)):
        if total <= budget:
            break
        leaving += [tenant.name for tenant in group]
        total -= _memory(group[0].manifest)
    return leaving


def fits(budget: float, models: Iterable[Manifest]) -> bool:
    """Whether these models fit into ``budget`` bytes; 0: no limit."""
    return not budget or sum(_by_file(models).values()) <= budget


def _by_file(manifests: Iterable[Manifest]) -> Mapping[Digest, int]:
    return {manifest.members[MODEL].digest: _memory(manifest) for manifest in manifests}


def _memory(manifest: Manifest) -> int:
    """Bytes that a loaded model takes, about."""
    return _MEMORY_PER_FILE * manifest.members[MODEL].size
