"""Serves the report of a run on this machine's loopback interface alone."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from experiments.report.page import report_page
from upge.errors import ConfigError, UserError

HOST = "127.0.0.1"
#: Seconds after which a browser loads the page again.
REFRESH = 30


class Report:
    """The report's page, rebuilt when the run has written something since."""

    _FILES = ("metrics.jsonl", "evaluations.jsonl", "alarms.jsonl", "run.json")

    def __init__(self, folder: Path) -> None:
        self._folder, self._made, self._page = folder, -1.0, ""

    def page(self) -> str:
        """The page as HTML."""
        changed = max((_changed(self._folder / name) for name in self._FILES), default=0.0)
        if changed != self._made or not self._page:
            try:
                self._page = report_page(self._folder)
            except UserError as error:
                return f"<!doctype html><meta charset=utf-8><title>upge</title><p>There is no report yet: {error}"
            self._made = changed
        return self._page


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


@contextlib.contextmanager
def serving(folder: Path, port: int) -> Iterator[str]:
    """Serve the report in the block and yield its address. `port` 0 = a free one.

    Raises:
        ConfigError: the port is in use or may not be used.
    """
    report = Report(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # Another name for this machine would let a page on the web read the report through the browser.
            host = (self.headers.get("Host") or "").rpartition(":")[0] or self.headers.get("Host")
            if host not in (HOST, "localhost") or self.path.partition("?")[0] not in ("/", "/report.html"):
                self.send_error(404)
                return
            content = report.page().encode()
            self.send_response(200)
            for name, value in {
                "Content-Type": "text/html; charset=utf-8",
                "Content-Length": str(len(content)),
                "Cache-Control": "no-store",
                "Refresh": str(REFRESH),
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Print nothing, because the terminal shows the run."""

    try:
        server = HTTPServer((HOST, port), Handler)
    except OSError as error:
        raise ConfigError(
            f"{port} cannot be used ({error.strerror}); give another, or 0 for a free one", "port"
        ) from error
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        yield f"http://{HOST}:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
