"""The model servers that coding agents ask, on loopback: they record, and call tools as told.

The newest user text may hold `@@CALL tool {json}@@`, any number of times: those tools are called
one after the other, then the results are said back.  A tool's name is the client's own:
mcp__hive__ask (Claude Code), mcp__hive::ask (Codex), mcp_hive_ask (Gemini), hive_ask (OpenCode).
In the json $ID stands for the id that a result gave last.
"""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

ORDER = re.compile(r"@@CALL (\S+) (\{.*?\})@@", re.S)
TEXTS = ("text", "input_text", "output_text")
KINDS = {"user": "user", "tool": "tool", "assistant": "model"}  # by role
NUMBERS = itertools.count(1)
Json = dict[str, Any]


class Item(NamedTuple):
    """One piece of what a model is given."""

    kind: str  # "user", "tool" for a result, "model" for what it said itself, "other"
    text: str


class Turn(NamedTuple):
    """What a model does: it says a text, or it calls a tool."""

    text: str = ""
    tool: str = ""
    arguments: Json = {}  # noqa: RUF012  # never changed


def text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = [part.get("text", "") for part in content or [] if part.get("type") in TEXTS]
    return "\n".join(parts)


def next_turn(items: list[Item]) -> Turn:
    """The first order of the newest user text that has any, and no result yet."""
    orders: list[tuple[str, str]] = []
    results: list[str] = []
    for item in items:
        found = ORDER.findall(item.text.replace('\\"', '"')) if item.kind == "user" else []
        if found:
            orders, results = found, []
        elif item.kind == "tool":
            results.append(item.text)
    if len(results) < len(orders):
        tool, arguments = orders[len(results)]
        ids = re.findall(r"\bid[ =]([0-9a-f-]{36})", "\n".join(item.text for item in items))
        return Turn("", tool, json.loads(arguments.replace("$ID", ids[-1] if ids else "")))
    return Turn("DONE " + " || ".join(results))


def items_of(body: Json) -> list[Item]:
    """What a model reads, whichever of the four APIs it is asked in."""
    if "contents" in body:
        return [*gemini_items(body)]
    if "input" in body:
        return [*responses_items(body)]
    return [*message_items(body)]


def message_items(body: Json) -> Iterator[Item]:
    """Anthropic's messages and OpenAI's chat completions."""
    for message in body.get("messages", []):
        kind = KINDS.get(message["role"], "other")
        content = message.get("content")
        for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
            if part.get("type") == "tool_result":
                yield Item("tool", text_of(part.get("content")))
            elif part.get("type") == "text":
                yield Item(kind, part["text"] or "")


def responses_items(body: Json) -> Iterator[Item]:
    """OpenAI's responses."""
    given = body["input"]
    for one in given if isinstance(given, list) else [{"role": "user", "content": given}]:
        if str(one.get("type")).endswith("call_output"):
            output = one.get("output")
            output = output if isinstance(output, str | list) else json.dumps(output)
            yield Item("tool", text_of(output))
        elif one.get("type", "message") == "message":
            yield Item(KINDS.get(str(one.get("role")), "other"), text_of(one.get("content")))


def gemini_items(body: Json) -> Iterator[Item]:
    for content in body["contents"]:
        for part in content.get("parts", []):
            if "functionResponse" in part:
                yield Item("tool", json.dumps(part["functionResponse"].get("response")))
            elif "text" in part:
                yield Item(content.get("role", "user"), part["text"])


def messages_events(body: Json, turn: Turn, n: int) -> Iterator[Json]:
    usage = {"input_tokens": 1, "output_tokens": 1}
    message: Json = {"id": f"msg_{n}", "type": "message", "role": "assistant", "content": []}
    message |= {"model": body.get("model"), "usage": usage, "stop_reason": None}
    block: Json = {"type": "text", "text": ""}
    delta = {"type": "text_delta", "text": turn.text}
    if turn.tool:
        block = {"type": "tool_use", "id": f"toolu_{n}", "name": turn.tool, "input": {}}
        delta = {"type": "input_json_delta", "partial_json": json.dumps(turn.arguments)}
    stop = {"stop_reason": "tool_use" if turn.tool else "end_turn", "stop_sequence": None}
    yield {"type": "message_start", "message": message | {"stop_sequence": None}}
    yield {"type": "content_block_start", "index": 0, "content_block": block}
    yield {"type": "content_block_delta", "index": 0, "delta": delta}
    yield {"type": "content_block_stop", "index": 0}
    yield {"type": "message_delta", "delta": stop, "usage": {"output_tokens": 1}}
    yield {"type": "message_stop"}


def responses_events(body: Json, turn: Turn, n: int) -> Iterator[Json]:
    said = {"type": "output_text", "text": turn.text, "annotations": []}
    item: Json = {"type": "message", "id": f"m{n}", "role": "assistant", "content": [said]}
    if turn.tool:
        namespace, _, name = turn.tool.rpartition("::")
        item = {"type": "function_call", "id": f"f{n}", "call_id": f"call_{n}", "name": name}
        item |= {"arguments": json.dumps(turn.arguments)}
        item |= {"namespace": namespace} if namespace else {}
    item["status"] = "completed"
    usage = {"input_tokens": 1, "output_tokens": 1, "total_tokens": 2}
    whole: Json = {"id": f"r{n}", "object": "response", "status": "completed", "output": [item]}
    whole |= {"model": body.get("model"), "usage": usage}
    yield {"type": "response.created", "response": whole | {"output": [], "status": "in_progress"}}
    yield {"type": "response.output_item.done", "output_index": 0, "item": item}
    yield {"type": "response.completed", "response": whole}


def chat_events(body: Json, turn: Turn, n: int) -> Iterator[Json]:
    base = {"id": f"c{n}", "object": "chat.completion.chunk", "created": 1, "model": "fake"}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    delta: Json = {"role": "assistant", "content": turn.text}
    if turn.tool:
        function = {"name": turn.tool, "arguments": json.dumps(turn.arguments)}
        call = {"index": 0, "id": f"call_{n}", "type": "function", "function": function}
        delta = {"role": "assistant", "tool_calls": [call]}
    yield base | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    end = "tool_calls" if turn.tool else "stop"
    yield base | {"choices": [{"index": 0, "delta": {}, "finish_reason": end}], "usage": usage}


def gemini_events(body: Json, turn: Turn, n: int) -> Iterator[Json]:
    part: Json = {"text": turn.text}
    if turn.tool:
        part = {"functionCall": {"name": turn.tool, "args": turn.arguments}}
    content = {"role": "model", "parts": [part]}
    usage = {"promptTokenCount": 1, "candidatesTokenCount": 1, "totalTokenCount": 2}
    yield {
        "candidates": [{"index": 0, "content": content, "finishReason": "STOP"}],
        "usageMetadata": usage,
    }


APIS = {
    "/messages": messages_events,
    "/responses": responses_events,
    "/chat/completions": chat_events,
    "enerateContent": gemini_events,
}


class FakeModels:
    """All four APIs on one free loopback port."""

    def __init__(self) -> None:
        self.requests: list[Json] = []  # the bodies, of those in which a model may act
        self.calls = 0
        self.before_call: Callable[[int], None] = lambda number: None  # before a tool is called
        models = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.answer(b"")

            def do_GET(self) -> None:
                self.answer(b'{"object": "list", "data": [], "models": []}')

            def do_POST(self) -> None:
                body = json.loads(self.body() or b"{}")
                path = self.path.partition("?")[0]
                if path.endswith(("/count_tokens", "countTokens")):
                    return self.answer(b'{"input_tokens": 1, "totalTokens": 1}')
                make = next((make for end, make in APIS.items() if end in path), None)
                if make is None:
                    return self.answer(b"{}")
                events = [*make(body, models.turn(body), next(NUMBERS))]
                if body.get("stream") or "stream" in path:
                    return self.answer(b"".join(map(event, events)), "text/event-stream")
                return self.answer(json.dumps(whole(events)).encode())

            def body(self) -> bytes:
                if self.headers.get("transfer-encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("content-length") or 0))
                data = b""
                while size := int(self.rfile.readline() or b"0", 16):
                    data += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return data

            def answer(self, body: bytes, kind: str = "application/json") -> None:
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Nothing: what counts is recorded."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *about: object) -> None:
                """A client that was ended has hung up."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def turn(self, body: Json) -> Turn:
        if not body.get("tools"):  # it wants a title, or to know who speaks next
            return Turn('{"title": "fake", "reasoning": "x", "next_speaker": "user"}')
        self.requests.append(body)
        turn = next_turn(items_of(body))
        if turn.tool:
            self.calls += 1
            self.before_call(self.calls)
        return turn

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def read(self, *kinds: str) -> list[str]:
        """All texts of these kinds that models were given, each once, in order."""
        items = (item for body in [*self.requests] for item in items_of(body))
        return [*dict.fromkeys(item.text for item in items if item.kind in kinds)]


def event(one: Json) -> bytes:
    named = f"event: {one['type']}\n" if "type" in one else ""
    return f"{named}data: {json.dumps(one)}\n\n".encode()


def whole(events: list[Json]) -> Json:
    """The answer to whoever asks for no stream; only Gemini's is the same."""
    return events[-1].get("response") or events[0]
