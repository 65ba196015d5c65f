"""A small server on this machine, from which the real clients download: files, ranges, ETags, and faults on demand."""

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Server:
    """`files`: path -> bytes. `requests` records every request: (method, path, Range or None)."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.ranges = True  # whether the server understands Range
        self.cut: list[int] = []  # each of the next answers ends after so many bytes
        self.token: str | None = None  # a client must send it
        self.url = ""

    def etag(self, path: str) -> str:
        return hashlib.sha256(self.files[path]).hexdigest()


@contextmanager
def serving() -> Iterator[Server]:
    """A server on a free port of 127.0.0.1 until the block ends."""
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(send=False)

        def do_GET(self) -> None:
            self._answer(send=True)

        def _answer(self, send: bool) -> None:
            path, asked = self.path.partition("?")[0], self.headers.get("Range")
            server.requests.append((self.command, path, asked))
            if server.token is not None and self.headers.get("Authorization") != f"Bearer {server.token}":
                self.send_error(401)
                return
            # the name of a file of a Hugging Face dataset includes its revision
            body = server.files.get(path)
            if body is None:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start, stop = self._part(path, asked, len(body))
            if start == len(body):
                self.send_response(416)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            part = (start, stop) != (0, len(body))
            self.send_response(206 if part else 200)
            if part:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(body)}")
            self.send_header("Content-Length", str(stop - start))
            self.send_header("ETag", f'"{server.etag(path)}"')
            if found := re.search("/resolve/([0-9a-f]{40})/", path):
                self.send_header("X-Repo-Commit", found[1])
            self.end_headers()
            if send:
                end = start + server.cut.pop(0) if server.cut else stop
                self.wfile.write(body[start:end])
                self.close_connection = end < stop

        def _part(self, path: str, asked: str | None, size: int) -> tuple[int, int]:
            """First byte of the answer, and the byte after its last."""
            found = re.fullmatch(r"bytes=(\d+)-(\d*)", asked or "")
            same = self.headers.get("If-Range") in (None, f'"{server.etag(path)}"')
            if not (found and same and server.ranges):
                return 0, size
            return min(int(found[1]), size), min(int(found[2]) + 1, size) if found[2] else size

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
