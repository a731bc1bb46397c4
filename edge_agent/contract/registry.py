"""OCI registries: how a release lies in one, and how one is asked.

A registry keeps members and parcels as blobs under the digests they have everywhere else. For each release an
artifact (image-spec 1.1, "Guidelines for Artifact Usage") names them, so that the registry's garbage
collection keeps them, and ``oras pull`` gives the bundle. What they are worth is decided by the signed
manifest, never by the registry: a device reads blobs only, no tag and no artifact.

Distribution spec: https://github.com/opencontainers/distribution-spec/blob/v1.1.0/spec.md; tokens:
https://distribution.github.io/distribution/spec/auth/token/.

Pure: no network, no disk.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable
from typing import Any, Final, NamedTuple
from urllib.parse import urlencode, urlsplit

import msgspec

from edge_agent.contract import wire
from edge_agent.contract.digest import Digest
from edge_agent.contract.version import Version

MANIFEST_TYPE: Final = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT_TYPE: Final = "application/vnd.edge-inference.release.v1"
SIGNED_TYPE: Final = "application/vnd.edge-inference.manifest.v1+json"  # manifest.json
MEMBER_TYPE: Final = "application/vnd.edge-inference.member.v1"
PARCEL_TYPE: Final = "application/vnd.edge-inference.parcel.v1+zstd"
EMPTY_TYPE: Final = "application/vnd.oci.empty.v1+json"
EMPTY: Final = b"{}"  # the config of an artifact that has none
TITLE: Final = "org.opencontainers.image.title"
BASE: Final = "io.github.edge-inference.parcel.base"  # the digest that a difference is to

_NAME = re.compile(r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*)*")
_PARAMETER = re.compile(r'([A-Za-z]+)\s*=\s*(?:"([^"]*)"|([^\s,"]+))')
_TOKEN = re.compile(r"[!-~]{1,65536}")  # what fits in a header
_MAX_NAME: Final = 255  # characters, as the specification says
_MAX_TAG: Final = 128
MAX_ANSWER: Final = 1 << 20  # bytes of a token server's answer


class Place(NamedTuple):
    """A repository of a registry."""

    secure: bool  # TLS
    host: str  # with its port
    name: str

    @property
    def base(self) -> str:
        """What its URLs begin with."""
        return f"{'https' if self.secure else 'http'}://{self.host}/v2/{self.name}"

    def blob(self, digest: Digest) -> str:
        """The URL of a blob."""
        return f"{self.base}/blobs/{digest}"

    def __str__(self) -> str:
        return f"oci{'' if self.secure else '+http'}://{self.host}/{self.name}"


def is_registry(text: str) -> bool:
    """Whether an address means a registry."""
    return text.startswith(("oci://", "oci+http://"))


def parse_place(text: str) -> Place:
    """Read ``oci://host[:port]/name``, or ``oci+http://...`` for plain HTTP.

    Raises:
        ValueError: it is no such address.
    """
    parts = urlsplit(text)
    name = parts.path.strip("/")
    right = (
        is_registry(text)
        and parts.hostname
        and not (parts.query or parts.fragment or "@" in parts.netloc)
        and _NAME.fullmatch(name)
        and len(name) <= _MAX_NAME
    )
    if not right:
        raise ValueError(
            f"{text[:200]!r}: expected oci://host[:port]/name, the name of a-z, 0-9, '.', '_', '-' and '/', "
            "or oci+http:// for a registry without TLS"
        )
    return Place(parts.scheme == "oci", parts.netloc, name)


class Challenge(NamedTuple):
    """How a registry wants to be asked (RFC 9110, 11.6.1)."""

    scheme: str  # "bearer" or "basic"
    realm: str = ""
    service: str = ""


def parse_challenge(headers: Iterable[str]) -> Challenge | None:
    """The challenge of a 401's ``WWW-Authenticate`` headers, a token before a password; None if neither."""
    found: dict[str, Challenge] = {}
    for header in headers:
        scheme, _, rest = header.strip().partition(" ")
        values = {key.lower(): quoted or plain for key, quoted, plain in _PARAMETER.findall(rest)}
        challenge = Challenge(scheme.lower(), values.get("realm", ""), values.get("service", ""))
        found.setdefault(challenge.scheme, challenge)
    return found.get("bearer") or found.get("basic")


def token_url(place: Place, challenge: Challenge, actions: str) -> str:
    """Where a token for ``actions`` (``pull`` or ``pull,push``) on the place is given.

    No more is asked for than is needed, whatever the challenge suggests.

    Raises:
        ValueError: the realm is no URL, or has no TLS where the registry itself has.
    """
    parts = urlsplit(challenge.realm)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"its token server {challenge.realm[:200]!r} is no URL")
    if parts.scheme == "http" and place.secure:
        raise ValueError(f"its token server {challenge.realm[:200]} is without TLS")
    query = {"scope": f"repository:{place.name}:{actions}"}
    if challenge.service:
        query["service"] = challenge.service
    return f"{challenge.realm}{'&' if parts.query else '?'}{urlencode(query)}"


def bearer(answer: bytes) -> str:
    """The ``Authorization`` of a token server's answer.

    Raises:
        ValueError: it holds no token.
    """
    content = wire.from_json(answer, dict)
    token = content.get("token") or content.get("access_token")
    if not isinstance(token, str) or not _TOKEN.fullmatch(token):
        raise ValueError("the token server's answer holds no token")
    return f"Bearer {token}"


def basic(content: bytes, place: Place) -> str | None:
    """The ``Authorization`` that a credentials file has for a registry; None if it has none.

    The file is Docker's ``config.json`` (also that of a Kubernetes ``imagePullSecret``), or one line
    ``user:password`` for whatever registry it is given with.

    Raises:
        ValueError: it is neither, or keeps its passwords elsewhere.
    """
    if not content.lstrip().startswith(b"{"):
        line = content.strip()
        if b":" not in line or b"\n" in line:
            raise ValueError("expected one line user:password, or Docker's config.json")
        return _basic(line)
    try:
        config = wire.from_json(content, _DockerConfig)
        for key, entry in config.auths.items():
            if _host(key) != place.host:
                continue
            if entry.auth:
                return _basic(base64.b64decode(entry.auth, validate=True))
            if entry.username:
                return _basic(f"{entry.username}:{entry.password}".encode())
    except (ValueError, binascii.Error) as error:
        raise ValueError(f"it is no Docker config.json: {error}") from error
    if config.credsStore or place.host in config.credHelpers:
        raise ValueError("it names a credential helper, which is not asked; give user:password in a file")
    return None


def _basic(pair: bytes) -> str:
    return "Basic " + base64.b64encode(pair).decode()


def _host(key: str) -> str:
    """Keys are hosts, or URLs as those of Docker Hub."""
    return urlsplit(key if "://" in key else f"//{key}").netloc


class _DockerAuth(msgspec.Struct, frozen=True):
    auth: str = ""
    username: str = ""
    password: str = ""


class _DockerConfig(msgspec.Struct, frozen=True):
    auths: dict[str, _DockerAuth] = {}
    credsStore: str = ""  # noqa: N815 - Docker's name
    credHelpers: dict[str, str] = {}  # noqa: N815


class Layer(NamedTuple):
    """A blob that an artifact keeps alive."""

    media_type: str
    digest: Digest
    size: int  # bytes
    title: str
    base: Digest | None = None


def tag(model: str, version: Version) -> str:
    """The tag of a release. No version has an underscore, so no two releases share one."""
    text = f"{model}_{version}"
    return text if len(text) <= _MAX_TAG else Digest.of_bytes(text.encode()).hex


def artifact(model: str, version: Version, layers: Iterable[Layer]) -> bytes:
    """The artifact of a release: the same bytes for the same blobs."""

    def descriptor(layer: Layer) -> dict[str, Any]:
        notes = {TITLE: layer.title} if layer.base is None else {TITLE: layer.title, BASE: str(layer.base)}
        size = {"digest": str(layer.digest), "size": layer.size}
        return {"mediaType": layer.media_type, **size, "annotations": notes}

    return wire.to_json(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "artifactType": ARTIFACT_TYPE,
            "config": {"mediaType": EMPTY_TYPE, "digest": str(Digest.of_bytes(EMPTY)), "size": len(EMPTY)},
            "layers": [descriptor(layer) for layer in layers],
            "annotations": {TITLE: model, "org.opencontainers.image.version": str(version)},
        }
    )
