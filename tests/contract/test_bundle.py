from __future__ import annotations

import io
import tarfile

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.contract import bundle as bundles
from edge_agent.contract import manifest as manifests
from edge_agent.contract.errors import BadBundle, BadManifest, ContractError
from edge_agent.contract.manifest import Datatype, Decision, Manifest, Task, TensorSpec
from edge_agent.contract.version import Version

MANIFEST = Manifest(
    name="demo",
    version=Version("1.0.0"),
    task=Task.ANOMALY,
    inputs=(TensorSpec("x", Datatype.FP32, (-1, 2), features=("a", "b")),),
    outputs=(TensorSpec("score", Datatype.FP32, (-1,)),),
    members={},
    decision=Decision("score", 0.5),
)
FILES = {"model.onnx": b"\0" * 1000, "rules.yaml": b"default: fail\n"}


@pytest.fixture
def bundle(tmp_path):
    folder = tmp_path / "bundle"
    folder.mkdir()
    return bundles.write_bundle(folder, MANIFEST, FILES)


def test_a_written_bundle_reads_back_and_verifies(bundle):
    again = bundles.open_bundle(bundle.path)
    again.verify()
    assert again == bundle
    assert again.manifest.format == manifests.FORMAT
    assert again.read("rules.yaml") == FILES["rules.yaml"]
    assert again.manifest.size == sum(map(len, FILES.values()))


def test_the_same_content_has_the_same_digest_and_the_same_tar(bundle, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    twin = bundles.write_bundle(other, MANIFEST, dict(reversed(FILES.items())))
    assert twin.digest == bundle.digest
    bundles.pack(bundle, tmp_path / "1.tar")
    bundles.pack(twin, tmp_path / "2.tar")
    assert (tmp_path / "1.tar").read_bytes() == (tmp_path / "2.tar").read_bytes()


def test_a_packed_bundle_unpacks_to_the_same_bundle(bundle, tmp_path):
    bundles.pack(bundle, tmp_path / "b.tar")
    folder = tmp_path / "out"
    folder.mkdir()
    assert bundles.unpack(tmp_path / "b.tar", folder).digest == bundle.digest


def tampered(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (tampered, "digest"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "999 bytes, expected 1000"),
        (lambda path: path.unlink(), "No such file"),
    ],
)
def test_a_damaged_member_is_named(bundle, damage, says):
    damage(bundle.path / "model.onnx")
    for prove in (bundle.verify, lambda: bundle.read("model.onnx")):
        with pytest.raises(BadBundle, match=rf"model\.onnx.*{says}"):
            prove()


def tar_of(path, entries):
    with tarfile.open(path, "w") as tar:
        for info, data in entries:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def entry(name, kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "hostile",
    [
        entry("../outside"),
        entry("/tmp/outside"),
        entry("folder/file"),
        entry("link", tarfile.SYMTYPE, "/etc/passwd"),
        entry("hard", tarfile.LNKTYPE, "model.onnx"),
        entry("pipe", tarfile.FIFOTYPE),
        entry("model.onnx"),
        entry("unlisted"),
    ],
    ids=lambda info: f"{info.name}-{info.type.decode()}",
)
def test_a_hostile_tar_is_refused_and_nothing_leaves_the_folder(bundle, tmp_path, hostile):
    contents = {name: (bundle.path / name).read_bytes() for name in ("manifest.json", *FILES)}
    tar_of(tmp_path / "b.tar", [*((entry(name), data) for name, data in contents.items()), (hostile, b"")])
    folder = tmp_path / "in" / "out"
    folder.mkdir(parents=True)
    with pytest.raises(BadBundle):
        bundles.unpack(tmp_path / "b.tar", folder)
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["out"]
    assert not any(path.is_symlink() for path in folder.iterdir())


@given(cut=st.integers(0, 20_000), flip=st.integers(0, 20_000))
def test_a_truncated_or_altered_tar_never_passes(tmp_path_factory, cut, flip):
    tmp_path = tmp_path_factory.mktemp("tar")
    folder = tmp_path / "bundle"
    folder.mkdir()
    bundle = bundles.write_bundle(folder, MANIFEST, FILES)
    bundles.pack(bundle, tmp_path / "b.tar")
    data = bytearray((tmp_path / "b.tar").read_bytes())
    data[flip % len(data)] ^= 0x55
    (tmp_path / "b.tar").write_bytes(data[: cut % len(data) + 1])
    out = tmp_path / "out"
    out.mkdir()
    try:
        got = bundles.unpack(tmp_path / "b.tar", out)
    except ContractError:
        return
    # Only padding and unused header fields may differ without anybody noticing.
    assert got.digest == bundle.digest


CHANGES = {
    "format version 2, this program reads 1": {"format": 2},
    "model name": {"name": "../up"},
    "MAJOR.MINOR.PATCH": {"version": "one"},
    "Invalid enum value 'magic'": {"task": "magic"},
    "not a plain file name": {"members": {"../x": {"digest": "sha256:" + "0" * 64, "size": 1}}},
    "is not an output": {"decision": {"output": "other", "threshold": 1.0}},
    "has 1 features for a last dimension of 2": {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2], "features": ["a"]}]
    },
    "two inputs have the same name": {"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}] * 2},
    "needs a decision block": {"decision": None},
    "expected 1 to": {"outputs": []},
}


@pytest.mark.parametrize("says", CHANGES)
def test_a_manifest_that_makes_no_sense_is_refused(bundle, says):
    document = msgspec.json.decode((bundle.path / "manifest.json").read_bytes())
    with pytest.raises(BadManifest, match=says):
        manifests.parse(msgspec.json.encode(document | CHANGES[says]))


def test_an_unknown_field_is_kept_out_of_the_way(bundle):
    document = msgspec.json.decode((bundle.path / "manifest.json").read_bytes())
    assert manifests.parse(msgspec.json.encode(document | {"invented_later": 1})) == bundle.manifest


@given(st.binary(max_size=200))
def test_any_bytes_as_manifest_raise_nothing_but_ours(data):
    with pytest.raises(BadManifest):
        manifests.parse(data)


def test_deeply_nested_json_is_refused_not_a_crash():
    with pytest.raises(BadManifest):
        manifests.parse(b'{"name":' + b"[" * 100_000)
