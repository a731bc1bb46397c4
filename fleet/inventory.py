"""devices.yaml: the devices of the fleet, as people wrote them."""

from __future__ import annotations

import re
import urllib.parse
from pathlib import Path
from typing import Final

import msgspec

from fleet.config import convert, read_yaml
from fleet.errors import FleetConfigError

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")  # what an agent accepts as `device`

TEMPLATE: Final = """\
# The devices of this fleet: id (the agent's `device`), address (base URL of the agent), labels.
# devices:
#   - {id: unit-01, address: "http://10.0.0.11:8080", labels: {site: eu, soc: rk3588}}
devices: []
"""


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One device. ``address`` is only needed where there is no Prometheus."""

    id: str
    address: str = ""
    labels: dict[str, str] = {}


class _Inventory(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    devices: tuple[Device, ...] = ()


def load(path: Path) -> tuple[Device, ...]:
    """The devices in the order of their ids.

    Raises:
        FleetConfigError: unreadable, unknown key, an id twice or not plain, an address that is no http URL.
    """
    devices = convert(read_yaml(path), _Inventory, str(path)).devices
    seen: set[str] = set()
    for device in devices:
        if not _ID.fullmatch(device.id):
            raise FleetConfigError(
                f"{path}: id {device.id[:80]!r}: expected 1-63 of letters, digits, '.', '_', '-'"
            )
        if device.id in seen:
            raise FleetConfigError(f"{path}: id {device.id} is there twice")
        seen.add(device.id)
        url = urllib.parse.urlsplit(device.address)
        if device.address and (url.scheme not in ("http", "https") or not url.netloc):
            raise FleetConfigError(
                f"{path}: {device.id}: address {device.address!r}: expected a URL such as http://10.0.0.11:8080"
            )
    return tuple(sorted(devices, key=lambda device: device.id))
