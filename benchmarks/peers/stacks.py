"""The same work behind different HTTP stacks: decode, run, encode, one request at a time.

``python stacks.py uvicorn|granian|protocol asyncio|uvloop``. A JSON body is ``{"features": [...]}``, one of
``application/octet-stream`` is the row's float32 values; the answer is JSON, or the score's float32.
``/constant`` answers without any work.
"""

import asyncio
import os
import sys

import msgspec
import numpy as np
import onnxruntime as ort

CONSTANT = b'{"decision":"pass","score":0.123456789}'
BINARY = b"application/octet-stream"


class Row(msgspec.Struct):
    features: list[float]


options = ort.SessionOptions()
options.intra_op_num_threads = 1
options.add_session_config_entry("session.intra_op.allow_spinning", "0")
session = ort.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])
decoder = msgspec.json.Decoder(Row)
encoder = msgspec.json.Encoder()
PORT = int(os.environ.get("PORT", "0"))


def work(body: bytes, binary: bool) -> bytes:
    """What every stack does with a body."""
    if binary:
        rows = np.frombuffer(body, np.float32)[None]
    else:
        rows = np.array([decoder.decode(body).features], np.float32)
    scores = session.run(["score"], {"x": rows})[0]
    if binary:
        return scores.tobytes()
    score = float(scores[0])
    return encoder.encode({"decision": "fail" if score > 1.0 else "pass", "score": score})


async def app(scope, receive, send):
    """Bare ASGI, no framework."""
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    if scope["path"] == "/constant":
        answer, binary = CONSTANT, False
    else:
        binary = any(name == b"content-type" and value == BINARY for name, value in scope["headers"])
        answer = work(body, binary)
    headers = [
        (b"content-type", BINARY if binary else b"application/json"),
        (b"content-length", str(len(answer)).encode()),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


class Protocol(asyncio.Protocol):
    """Httptools on asyncio, nothing else; no batching."""

    def connection_made(self, transport):
        import httptools

        self.transport = transport
        self.parser = httptools.HttpRequestParser(self)

    def data_received(self, data):
        self.parser.feed_data(data)

    def on_message_begin(self):
        self.body, self.binary, self.url = b"", False, b""

    def on_url(self, url):
        self.url += url

    def on_header(self, name, value):
        if name.lower() == b"content-type":
            self.binary = value == BINARY

    def on_body(self, data):
        self.body += data

    def on_message_complete(self):
        answer = CONSTANT if self.url == b"/constant" else work(self.body, self.binary)
        kind = BINARY if self.binary else b"application/json"
        self.transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n%b"
            % (kind, len(answer), answer)
        )


def main(stack: str, loop: str) -> None:
    """Serve until killed."""
    if stack == "uvicorn":
        import uvicorn

        uvicorn.run(app, host="127.0.0.1", port=PORT, loop=loop, http="httptools", log_level="error")
    elif stack == "granian":
        from granian import Granian

        Granian(
            "stacks:app", address="127.0.0.1", port=PORT, interface="asgi", loop=loop, workers=1,
            log_enabled=False,
        ).serve()  # fmt: skip
    else:

        async def serve():
            listener = await asyncio.get_running_loop().create_server(Protocol, "127.0.0.1", PORT)
            await listener.serve_forever()

        if loop == "uvloop":
            import uvloop

            uvloop.run(serve())
        else:
            asyncio.run(serve())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
