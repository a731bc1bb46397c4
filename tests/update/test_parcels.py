"""Only what changed moves: compressed members and differences, made at publish time, proven on the device."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from edge_agent.contract import transfers as documents
from edge_agent.contract.bundle import MODEL, RULES
from edge_agent.contract.digest import Digest
from edge_agent.contract.errors import BadManifest
from edge_agent.contract.manifest import Manifest, Member
from edge_agent.contract.repository import transfers_target
from edge_agent.contract.transfers import MAX_MEMORY, Parcel, Transfers
from edge_agent.store.state import State
from edge_agent.update.fetch import fetch_members
from edge_agent.update.parcel import BadParcel, fits, open_parcel
from edge_agent.update.source import FolderSource
from fleet import parcels
from fleet.repository import Keys, Repository
from tests.fleet.releases import bundle
from tests.update.devices import Device, Publisher

zstandard = pytest.importorskip("zstandard", reason="parcels need the zstandard package")

NOISE = np.random.default_rng(1).integers(0, 256, 200_000, np.uint8).tobytes()
RETRAINED = np.random.default_rng(2).integers(0, 256, 200_000, np.uint8).tobytes()
TUNED = NOISE[:-20_000] + RETRAINED[-20_000:]
TEXT = b"feature mean_radius above 21.0\n" * 1000


def test_a_small_change_is_kept_as_a_difference_and_a_large_one_is_not() -> None:
    patch = parcels.difference(NOISE, TUNED)
    assert patch is not None
    assert len(patch) < 22_000
    assert parcels.difference(NOISE, RETRAINED) is None


def test_a_member_is_compressed_where_that_pays() -> None:
    assert parcels.compressed(NOISE) is None
    assert len(parcels.compressed(TEXT) or TEXT) < 200


def test_a_difference_too_large_for_a_devices_memory_is_not_made() -> None:
    assert parcels.difference(bytes(MAX_MEMORY), b"x") is None


def member_of(data: bytes) -> Member:
    return Member(Digest.of_bytes(data), len(data))


@pytest.mark.parametrize("base", [NOISE, None])
def test_a_parcel_gives_its_member(tmp_path: Path, base: bytes | None) -> None:
    data = TUNED if base else TEXT
    frame = parcels.difference(base, data) if base else parcels.compressed(data)
    (tmp_path / "frame").write_bytes(frame or b"")
    (tmp_path / "base").write_bytes(base or b"")
    open_parcel(tmp_path / "frame", tmp_path / "base" if base else None, member_of(data), tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == data


@pytest.mark.parametrize(
    "what", ["other base", "cut", "noise", "empty", "longer", "shorter", "two frames", "window"]
)
def test_a_parcel_that_does_not_give_its_member_is_refused_and_writes_no_more(
    tmp_path: Path, what: str
) -> None:
    frame = parcels.difference(NOISE, TUNED) or b""
    base, member = NOISE, member_of(TUNED)
    match what:
        case "other base":
            base = RETRAINED
        case "cut":
            frame = frame[:-100]
        case "noise":
            frame = RETRAINED[:500]
        case "empty":
            frame = b""
        case "longer":
            member = member_of(TUNED[:-1])
        case "shorter":
            member = member_of(TUNED + b"x")
        case "two frames":
            member, frame = member_of(TUNED), frame + frame
            (tmp_path / "frame").write_bytes(frame)
        case "window":
            window = zstandard.ZstdCompressionParameters.from_level(3, window_log=28)
            frame = zstandard.ZstdCompressor(compression_params=window).compressobj().compress(TUNED)
    (tmp_path / "frame").write_bytes(frame)
    (tmp_path / "base").write_bytes(base)
    try:
        open_parcel(tmp_path / "frame", tmp_path / "base", member, tmp_path / "out")
    except BadParcel:
        pass
    else:
        assert what == "two frames", "one frame is read, the rest is not looked at"
        assert (tmp_path / "out").read_bytes() == TUNED
    assert not (tmp_path / "out").exists() or (tmp_path / "out").stat().st_size <= member.size


def test_a_bomb_ends_where_the_member_ends(tmp_path: Path) -> None:
    (tmp_path / "frame").write_bytes(zstandard.ZstdCompressor().compress(bytes(100 << 20)))
    with pytest.raises(BadParcel):
        open_parcel(tmp_path / "frame", None, Member(Digest.of_bytes(b""), 1000), tmp_path / "out")
    assert (tmp_path / "out").stat().st_size <= 1000


def test_a_base_that_is_absent_or_too_large_does_not_fit(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"base")
    assert fits(tmp_path / "base", Member(Digest.of_bytes(b""), 1000))
    assert not fits(tmp_path / "base", Member(Digest.of_bytes(b""), MAX_MEMORY))
    assert not fits(tmp_path / "absent", Member(Digest.of_bytes(b""), 1000))


@pytest.mark.parametrize(
    "data", [b"", b"{", b'{"format":2}', b'{"members":{"a":[{"size":0}]}}', b" " * (1 << 19)]
)
def test_a_transfers_document_that_cannot_be_read_is_refused(data: bytes) -> None:
    with pytest.raises(BadManifest, match="transfers"):
        documents.parse(data)


# Publishing


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository.create(tmp_path / "repository", Keys(tmp_path / "keys"))


def transfers_of(repository: Repository, version: str) -> Transfers | None:
    found = list(repository.path.glob(f"targets/transfers/pump/*.{version}.json"))
    return documents.parse(found[0].read_bytes()) if found else None


def test_publishing_makes_differences_to_the_version_before(repository: Repository, tmp_path: Path) -> None:
    first = bundle(tmp_path / "1", "1.0.0", model=NOISE)
    second = bundle(tmp_path / "2", "1.1.0", model=TUNED)
    assert repository.publish(first).parcels == 0
    assert repository.publish(second).parcels == 1
    transfers = transfers_of(repository, "1.1.0")
    assert transfers is not None
    (parcel,) = transfers.members[MODEL]
    assert parcel.base == first.manifest.members[MODEL].digest
    assert parcel.size < 0.15 * len(TUNED)
    assert repository.publish(second).new is False
    assert list(repository.releases()) == ["pump"]
    assert [str(release.version) for release in repository.releases()["pump"]] == ["1.0.0", "1.1.0"]


def test_a_damaged_base_gives_no_difference_and_no_failure(repository: Repository, tmp_path: Path) -> None:
    first = bundle(tmp_path / "1", "1.0.0", model=NOISE)
    repository.publish(first)
    (repository.path / "blobs" / "sha256" / first.manifest.members[MODEL].digest.hex).write_bytes(b"rot")
    assert repository.publish(bundle(tmp_path / "2", "1.1.0", model=TUNED)).parcels == 0
    assert transfers_of(repository, "1.1.0") is None


# On the device


@pytest.fixture
def way(tmp_path: Path) -> Way:
    return Way(tmp_path)


class Way:
    """A member on its way from a folder, with what is there instead of it, and what the device has."""

    def __init__(self, folder: Path) -> None:
        for name in ("repository/blobs/sha256", "store", "staged", "partial"):
            (folder / name).mkdir(parents=True)
        self.repository, self.store = folder / "repository" / "blobs" / "sha256", folder / "store"
        self.staged, self.partial = folder / "staged", folder / "partial"
        whole = bundle(folder / "bundle", "1.0.0", model=TUNED).manifest
        self.manifest: Manifest = whole
        (self.repository / whole.members[MODEL].digest.hex).write_bytes(TUNED)
        (self.store / Digest.of_bytes(NOISE).hex).write_bytes(NOISE)
        frame = parcels.difference(NOISE, TUNED) or b""
        self.parcel = Parcel(Digest.of_bytes(frame), len(frame), Digest.of_bytes(NOISE))
        (self.repository / self.parcel.digest.hex).write_bytes(frame)

    def fetch(self, spare: int | None = None) -> int:
        """Bytes moved; afterwards the member is right, whatever way it came."""
        moved = fetch_members(
            FolderSource(self.repository.parents[1]), self.manifest, [MODEL], self.staged, self.partial,
            lambda _: None, Transfers({MODEL: (self.parcel,)}), self.store, spare,
        )  # fmt: skip
        assert (self.staged / MODEL).read_bytes() == TUNED
        assert not list(self.partial.iterdir())
        return moved


def test_the_difference_is_all_that_moves(way: Way) -> None:
    assert way.fetch() == way.parcel.size


def test_where_the_disk_has_no_room_for_a_parcel_beside_its_member_the_member_comes_whole(way: Way) -> None:
    assert way.fetch(way.parcel.size - 1) == len(TUNED)
    (way.staged / MODEL).unlink()
    assert way.fetch(way.parcel.size) == way.parcel.size


def test_without_its_base_the_member_comes_whole(way: Way) -> None:
    (way.store / Digest.of_bytes(NOISE).hex).unlink()
    assert way.fetch() == len(TUNED)


@pytest.mark.parametrize("what", ["base", "frame", "absent"])
def test_whatever_is_wrong_with_a_parcel_the_member_comes_whole(way: Way, what: str) -> None:
    match what:
        case "base":
            (way.store / Digest.of_bytes(NOISE).hex).write_bytes(RETRAINED)
        case "frame":
            (way.repository / way.parcel.digest.hex).write_bytes(b"x" * way.parcel.size)
        case "absent":
            (way.repository / way.parcel.digest.hex).unlink()
    assert way.fetch() >= len(TUNED)


def test_a_download_that_has_begun_goes_on_where_less_is_left(way: Way) -> None:
    (way.partial / way.manifest.members[MODEL].digest.hex).write_bytes(TUNED[:-100])
    assert way.fetch() == 100


@pytest.mark.parametrize("in_process", [True, False])
def test_a_device_updates_by_parcels(tmp_path: Path, in_process: bool) -> None:
    """Real bundles, real TUF: the document is signed, and devices see less of the repository."""
    publisher = Publisher(tmp_path / "fleet")
    device = Device(tmp_path / "store", publisher, in_process=in_process)

    async def scenario() -> None:
        publisher.assign(publisher.publish("1.0.0", features=64))
        await device.follow()
        second = publisher.publish("2.0.0", features=64)
        target = transfers_target("demo", second.version).rsplit("/", 1)[0]
        assert list((publisher.path / "targets" / target).iterdir())
        manifest = (tmp_path / "fleet" / "bundle-2" / "manifest.json").read_bytes()
        assert RULES.encode() in manifest
        # Every plain member that differs goes away: only the parcels are left to fetch.
        for name in ("rules.yaml", "golden.msgpack", "model.onnx", "baseline.msgpack"):
            data = (tmp_path / "fleet" / "bundle-2" / name).read_bytes()
            old = (tmp_path / "fleet" / "bundle-1" / name).read_bytes()
            if data != old and len(data) >= parcels.SMALLEST:
                (publisher.path / "blobs" / "sha256" / Digest.of_bytes(data).hex).unlink()
        publisher.assign(second)
        await device.follow()
        assert (device.version(), device.state()) == ("2.0.0", State.COMMITTED)

    asyncio.run(scenario())
