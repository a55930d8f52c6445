"""A web server that does what a good one does not, and its certificate."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Reply = tuple[int, dict[str, str], bytes]


class Feed:
    """A web server that answers as it is told, and remembers what it was asked."""

    def __init__(self, certificate: Path | None = None) -> None:
        self.reply: Callable[[BaseHTTPRequestHandler], Reply] = lambda asked: (404, {}, b"")
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        feed = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                headers = {key.lower(): value for key, value in self.headers.items()}
                feed.asked.append((self.command, self.path, headers | {"body": body.decode()}))
                status, more, content = feed.reply(self)
                self.send_response(status)
                for key, value in {"Content-Length": str(len(content)), **more}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PROPFIND = do_REPORT = answer

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.handle_error = lambda *gone: None  # type: ignore[method-assign]
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = (
            f"{'https' if certificate else 'http'}://127.0.0.1:{self._server.server_port}/c.ics"
        )
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def serve(self, content: bytes, status: int = 200, **headers: str) -> None:
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        self.reply = lambda asked: (status, named, content)

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def self_signed(folder: Path, days: int = 20) -> Path:
    """A certificate for this machine that nobody has signed, with its key."""
    openssl = shutil.which("openssl")
    assert openssl, "openssl is needed"
    file = folder / f"{days}.pem"
    command = (
        f"{openssl} req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days {days} "
        f"-keyout {file}.key -out {file} -subj /CN=127.0.0.1 "
        "-addext subjectAltName=IP:127.0.0.1,DNS:localhost"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    file.write_text(file.read_text() + Path(f"{file}.key").read_text())
    return file
