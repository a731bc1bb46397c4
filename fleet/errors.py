"""Errors of the fleet side, by who must act.

::

    FleetError
    ├── FleetConfigError    the operator: fleet.yaml or devices.yaml is wrong, or there is no fleet here
    ├── KeyMissing          whoever holds the keys: the key for this step is not on this machine
    ├── RepositoryError     the operator: the release repository contradicts the request, or is damaged
    ├── GitError            the operator: git refused (.command, .returncode, .output)
    ├── RolloutError        the operator: the roll-out cannot do this now
    ├── MeasurementError    the monitoring: Prometheus cannot be asked
    ├── RegistryError       whoever runs the registry: it refused, or does not answer
    └── ServeError          the operator: the port is taken

Errors of the formats themselves are ``edge_agent.contract.errors.ContractError``. ``cli.py`` turns every
one of them into one line and exit code 1.
"""

from __future__ import annotations

from collections.abc import Sequence


class FleetError(Exception):
    """Root of the expected failures. The message is one sentence for the person who must act."""


class FleetConfigError(FleetError):
    """fleet.yaml or devices.yaml cannot be used, or the folder is no fleet."""


class KeyMissing(FleetError):
    """A private key is not on this machine, which for offline keys is how it should be."""


class RepositoryError(FleetError):
    """The release repository is damaged, or what was asked contradicts what it holds."""


class GitError(FleetError):
    """Git refused."""

    def __init__(self, command: Sequence[str], returncode: int, output: str) -> None:
        self.command = tuple(command)
        self.returncode = returncode
        self.output = output
        said = " ".join(output.split())[:400] or "nothing was said"
        super().__init__(f"`{' '.join(command)}` ended with {returncode}: {said}")


class RolloutError(FleetError):
    """The roll-out is not in a phase in which this makes sense."""


class MeasurementError(FleetError):
    """Prometheus cannot be reached or answers nonsense."""


class RegistryError(FleetError):
    """An OCI registry refused, or does not answer."""


class ServeError(FleetError):
    """The static server cannot start."""
