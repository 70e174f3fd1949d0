"""A real server for webhooks, for tests."""

from __future__ import annotations

import contextlib
import http.server
import threading
import time
from collections.abc import Iterator


@contextlib.contextmanager
def listening(status: int = 200, seconds: float = 0) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """A server that answers so, and what it was told: content type and body."""
    told: list[tuple[str, bytes]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append((self.headers["Content-Type"], self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.send_header("Content-Length", "10")
            self.end_headers()
            # As slow as it is, no single wait is long.
            for _ in range(10):
                time.sleep(seconds / 10)
                with contextlib.suppress(OSError):
                    self.wfile.write(b".")

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/secret", told
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
