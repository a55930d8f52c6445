"""A model server that records what it is asked, and always says the same."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REPLY = "understood, said the model"
BASE = {"id": "c1", "created": 1, "model": "echo"}
USAGE = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}


class FakeModel:
    """The part of OpenAI's completions API that OpenClaw uses, on a free loopback port."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.delay = 0.0  # seconds that an answer takes
        model = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                model.requests.append(asked)
                time.sleep(model.delay)
                if asked.get("stream"):
                    self.answer("text/event-stream", b"".join(events()))
                else:
                    message = {"role": "assistant", "content": REPLY}
                    choice = {"index": 0, "message": message, "finish_reason": "stop"}
                    whole = BASE | {
                        "object": "chat.completion",
                        "choices": [choice],
                        "usage": USAGE,
                    }
                    self.answer("application/json", json.dumps(whole).encode())

            def do_GET(self) -> None:
                listed = {"object": "list", "data": [{"id": "echo", "object": "model"}]}
                self.answer("application/json", json.dumps(listed).encode())

            def answer(self, kind: str, body: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Nothing: what counts is recorded."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def lines_read(self) -> list[str]:
        """Every line that agents read so far, as they read it, without OpenClaw's own prefix."""
        return [
            re.sub(r"^(System: )?(\[[^]]*UTC\] )?", "", line)
            for text in texts_of(self.requests)
            for part in text.split("\n")
            for line in unquoted(part).split("\n")
        ]


def events() -> Iterator[bytes]:
    chunk = BASE | {"object": "chat.completion.chunk"}
    first = {"index": 0, "delta": {"role": "assistant", "content": REPLY}, "finish_reason": None}
    last = {"index": 0, "delta": {}, "finish_reason": "stop"}
    for content in (chunk | {"choices": [first]}, chunk | {"choices": [last], "usage": USAGE}):
        yield b"data: " + json.dumps(content).encode() + b"\n\n"
    yield b"data: [DONE]\n\n"


def texts_of(requests: list[dict[str, Any]]) -> Iterator[str]:
    """The last messages of each request, after the model's own: what is new to the agent."""
    for request in [*requests]:
        for message in reversed(request["messages"]):
            if message["role"] != "user":
                break
            content = message["content"]
            for part in content if isinstance(content, list) else [{"text": content}]:
                yield part.get("text", "")


def unquoted(part: str) -> str:
    """OpenClaw quotes an event as a JSON string on a line of its own."""
    if part.startswith('"System: '):
        try:
            return str(json.loads(part))
        except ValueError:
            pass
    return part
