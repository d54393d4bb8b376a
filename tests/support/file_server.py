"""A web server for made-up files, which behaves as badly as a test asks."""

from __future__ import annotations

import http.server
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class FileServer:
    """What the server does; tests change it while it runs.

    Attributes:
        files: Contents by path ("/a.zip").
        ranges: Whether it understands the header Range.
        break_after: Bytes of a body after which it closes the connection; None for never.
        status: Answer to every request, instead of the file.
        requests: Path, Range and User-Agent of each request so far.
        url: Where it is.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    break_after: int | None = None
    status: int | None = None
    requests: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    url: str = ""


@contextmanager
def serving(**files: bytes) -> Iterator[FileServer]:
    """Serves files by name on a port of this machine."""
    server = FileServer({f"/{name}": data for name, data in files.items()})

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.requests.append((self.path, self.headers["Range"], self.headers["User-Agent"]))
            data = server.files.get(self.path)
            if server.status is not None or data is None:
                self.send_error(server.status or 404)
                return
            start = 0
            match = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
            if server.ranges and match:
                start = int(match[1])
                if start >= len(data):
                    self.send_error(416)
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            self.wfile.write(data[start:][: server.break_after])

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        server.url = f"http://127.0.0.1:{httpd.server_port}"
        try:
            yield server
        finally:
            httpd.shutdown()
            thread.join()
