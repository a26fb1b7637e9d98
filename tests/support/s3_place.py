"""The part of S3's protocol that writing and reading objects needs, over HTTP, in memory: no signatures, no listing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class Bucket:
    """``objects``: key -> bytes. ``refuse``: a status for every PUT whose key has this suffix. ``puts``: keys in order."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.puts: list[str] = []
        self.refuse: tuple[str, int] | None = None
        self.lock = threading.Lock()
        self.url = ""


@contextmanager
def s3_place(name: str) -> Iterator[Bucket]:
    """A server of one bucket; ``url`` is a store URL of it."""
    bucket = Bucket()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def do_HEAD(self) -> None:
            self._get()

        def do_GET(self) -> None:
            self._get()

        def do_PUT(self) -> None:
            key, query = self._asked()
            data = self.rfile.read(int(self.headers["Content-Length"]))
            if bucket.refuse is not None and key.endswith(bucket.refuse[0]):
                self._answer(bucket.refuse[1], b"<Error><Code>Secret</Code></Error>")
                return
            with bucket.lock:
                if "uploadId" in query:
                    bucket.parts[query["uploadId"][0]][int(query["partNumber"][0])] = data
                else:
                    self._store(key, data)
            self._answer(200, b"")

        def do_POST(self) -> None:
            key, query = self._asked()
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            with bucket.lock:
                if "uploadId" in query:
                    parts = bucket.parts.pop(query["uploadId"][0])
                    self._store(key, b"".join(parts[number] for number in sorted(parts)))
                    text = "<CompleteMultipartUploadResult><ETag>x</ETag></CompleteMultipartUploadResult>"
                else:
                    upload = str(len(bucket.parts) + len(bucket.puts))
                    bucket.parts[upload] = {}
                    text = f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"
            self._answer(200, text.encode())

        def do_DELETE(self) -> None:
            self._answer(204, b"")

        def _get(self) -> None:
            key, _ = self._asked()
            data = bucket.objects.get(key)
            self._answer(404, b"<Error/>") if data is None else self._answer(200, data)

        def _asked(self) -> tuple[str, dict[str, list[str]]]:
            parts = urlsplit(self.path)
            return unquote(parts.path).removeprefix(f"/{name}/"), parse_qs(parts.query)

        def _store(self, key: str, data: bytes) -> None:
            bucket.objects[key] = data
            bucket.puts.append(key)

        def _answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", '"x"')
            self.send_header("Last-Modified", "Thu, 01 Jan 1970 00:00:01 GMT")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    bucket.url = f"s3://{name}/prefix?endpoint=http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield bucket
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
