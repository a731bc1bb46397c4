from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.contract.digest import Digest
from edge_agent.contract.errors import BadDigest, BadVersion
from edge_agent.contract.version import Version


def test_a_digest_is_the_sha256_of_the_content(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    known = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert Digest.of_bytes(b"abc") == known
    assert Digest.of_file(tmp_path / "f") == known


@pytest.mark.parametrize(
    "text", ["", "sha256:", "sha256:" + "A" * 64, "sha256:" + "a" * 63, "md5:" + "a" * 64]
)
def test_a_malformed_digest_cannot_be_held(text):
    with pytest.raises(BadDigest, match="expected sha256"):
        Digest(text)


# https://semver.org/#spec-item-11, its own example
ORDER = ["1.0.0-alpha", "1.0.0-alpha.1", "1.0.0-alpha.beta", "1.0.0-beta", "1.0.0-beta.2", "1.0.0-beta.11",
         "1.0.0-rc.1", "1.0.0", "1.9.0", "1.10.0", "2.0.0"]  # fmt: skip


def test_versions_order_by_precedence_not_by_text():
    assert sorted(sorted(ORDER), key=Version) == ORDER


@pytest.mark.parametrize(
    "text", ["1", "1.0", "01.0.0", "1.0.0+build", "v1.0.0", "1.0.0-", "1.0.0/../x", "1" * 80]
)
def test_a_malformed_version_cannot_be_held(text):
    with pytest.raises(BadVersion, match=r"MAJOR\.MINOR\.PATCH"):
        Version(text)


@given(st.tuples(*[st.integers(0, 999)] * 3), st.tuples(*[st.integers(0, 999)] * 3))
def test_release_versions_order_like_their_numbers(a, b):
    left, right = (Version(".".join(map(str, numbers))) for numbers in (a, b))
    assert (left < right) == (a < b)
    assert (left == right) == (a == b)
