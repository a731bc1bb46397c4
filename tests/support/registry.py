"""A real OCI registry (Debian's docker-registry), a token server for it, and a door in front of it."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils

from tests.support.certificates import Authority
from tests.support.loopback import LoopbackServer
from tests.support.services import _OPENER, _Process, free_port, require

USER, PASSWORD = "plant", "let me in"
SERVICE, ISSUER = "registry.plant", "tokens.plant"
# bcrypt of the password: the only form that the registry takes.
_HTPASSWD = f"{USER}:$2y$05$abcdefghijklmnopqrstuu4h2R.N3/mVBA7Xh7aLzKSJDAsK61n52\n"
NAME = "plant/models"


class OciRegistry:
    """A registry on a free loopback port, its storage in ``folder``."""

    def __init__(
        self,
        folder: Path,
        *,
        tls: Authority | None = None,
        tokens: Tokens | None = None,
        password: bool = False,
    ) -> None:
        program = require("docker-registry")
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.host = f"127.0.0.1:{self.port}"
        self.address = f"oci{'' if tls else '+http'}://{self.host}/{NAME}"
        self.storage = folder / "storage"
        self._secure = tls is not None
        self._program, self._settings = program, folder / "registry.yml"
        http = {"addr": self.host}
        if tls is not None:
            pair = tls.issue("registry", folder)
            http["tls"] = {"certificate": str(pair.certificate), "key": str(pair.key)}  # type: ignore[assignment]
        settings = {
            "version": "0.1",
            "log": {"level": "warn", "accesslog": {"disabled": True}},
            "storage": {"filesystem": {"rootdirectory": str(self.storage)}, "delete": {"enabled": True}},
            "http": http,
        }
        if tokens is not None:
            bundle = folder / "issuers.pem"
            bundle.write_bytes(tokens.certificate)
            settings["auth"] = {
                "token": {
                    "realm": tokens.url, "service": SERVICE, "issuer": ISSUER, "rootcertbundle": str(bundle),
                }
            }  # fmt: skip
        elif password:
            (folder / "htpasswd").write_text(_HTPASSWD)
            settings["auth"] = {"htpasswd": {"realm": "plant", "path": str(folder / "htpasswd")}}
        self._settings.write_text(json.dumps(settings))  # JSON is YAML
        self._process = _Process([program, "serve", str(self._settings)], folder)

    def start(self) -> None:
        self._process.start(self._answers)

    def stop(self) -> None:
        self._process.stop()

    def __enter__(self) -> OciRegistry:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def blob_file(self, digest: str) -> Path:
        """Where it keeps a blob."""
        hex_ = digest.removeprefix("sha256:")
        return self.storage / f"docker/registry/v2/blobs/sha256/{hex_[:2]}/{hex_}/data"

    def collect_garbage(self) -> None:
        """What its operator runs at night: blobs that no tagged artifact names go."""
        command = [self._program, "garbage-collect", "--delete-untagged", str(self._settings)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)

    def _answers(self) -> bool:
        if self._secure:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return True
            return False
        try:
            with _OPENER.open(f"http://{self.host}/v2/", timeout=1):
                return True
        except urllib.error.HTTPError as error:
            error.close()
            return error.code == 401
        except OSError:
            return False


class Tokens(LoopbackServer):
    """A token server: whoever knows the password gets what he asks for, anybody else a token for nothing."""

    def __init__(self, folder: Path) -> None:
        pair = Authority(folder).issue("tokens", folder)
        self.certificate = pair.certificate.read_bytes()
        self._key = serialization.load_pem_private_key(pair.key.read_bytes(), None)
        self.lifetime = 300.0  # seconds
        self.scopes: list[str] = []
        self.refuses = False  # 401 for a wrong password, as most do
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.answer(self)

        super().__init__(Handler)
        self.url = f"http://{self.host}/token"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(request.path).query)
        assert query["service"] == [SERVICE]
        scope = query["scope"][0]
        self.scopes.append(scope)
        known = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        right = request.headers.get("Authorization") == f"Basic {known}"
        if self.refuses and not right:
            request.send_response(401)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        kind, name, actions = scope.split(":")
        access = [{"type": kind, "name": name, "actions": actions.split(",")}] if right else []
        body = json.dumps({"token": self._signed(access)}).encode()
        request.send_response(200)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    def _signed(self, access: list[dict[str, object]]) -> str:
        now = int(time.time())
        der = x509.load_pem_x509_certificate(self.certificate).public_bytes(serialization.Encoding.DER)
        header = {"typ": "JWT", "alg": "ES256", "x5c": [base64.b64encode(der).decode()]}
        claims = {
            "iss": ISSUER, "sub": USER, "aud": SERVICE, "iat": now, "nbf": now - 10_000,
            "exp": int(now + self.lifetime), "jti": str(now), "access": access,
        }  # fmt: skip
        text = ".".join(_url64(json.dumps(part).encode()) for part in (header, claims))
        assert isinstance(self._key, ec.EllipticCurvePrivateKey)
        r, s = utils.decode_dss_signature(self._key.sign(text.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{text}.{_url64(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


def _url64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


class Door(LoopbackServer):
    """Stands in front of a registry, passes GETs on, and does what a network or another server may do.

    Attributes:
        cut_after: bytes of a blob, then the connection ends.
        status: answered instead of asking the registry.
        elsewhere: blobs are redirected there, as registries with object storage do.
        asked: path, Range and Authorization of every request.
    """

    def __init__(self, registry: OciRegistry) -> None:
        self.cut_after: int | None = None
        self.status: int | None = None
        self.elsewhere: str | None = None
        self.asked: list[tuple[str, str | None, str | None]] = []
        door = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                door.pass_on(self, registry)

        super().__init__(Handler)
        self.address = f"oci+http://{self.host}/{NAME}"

    def pass_on(self, request: BaseHTTPRequestHandler, registry: OciRegistry) -> None:
        headers = {key: request.headers[key] for key in ("Range", "Authorization") if key in request.headers}
        self.asked.append((request.path, headers.get("Range"), headers.get("Authorization")))
        if self.status is not None:
            request.send_response(self.status)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        if self.elsewhere is not None:
            request.send_response(307)
            request.send_header("Location", f"{self.elsewhere}{request.path}?signature=abc")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        with _answer(f"http://{registry.host}{request.path}", headers) as (status, answered, body):
            request.send_response(status)
            for key in ("Content-Length", "Content-Range", "WWW-Authenticate"):
                if key in answered:
                    request.send_header(key, answered[key])
            request.end_headers()
            request.wfile.write(body[: self.cut_after])


@contextlib.contextmanager
def _answer(url: str, headers: dict[str, str]) -> Iterator[tuple[int, dict[str, str], bytes]]:
    try:
        with _OPENER.open(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            yield answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        with error:
            # Go writes it Www-Authenticate.
            yield error.code, {_canonical(key): value for key, value in error.headers.items()}, error.read()


def _canonical(key: str) -> str:
    return "WWW-Authenticate" if key.lower() == "www-authenticate" else key
