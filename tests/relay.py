"""A wire between two programs on loopback that can be cut."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading


class Relay:
    """Hands on what comes to its port; while it is cut nothing listens, and all are thrown out."""

    def __init__(self, host: str, port: int) -> None:
        self._to, self.port = (host, port), 0
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._peer: dict[socket.socket, socket.socket] = {}
        self._orders: list[str] = []
        self._done, self._closed = threading.Event(), False
        self._listen()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def cut(self) -> None:
        self._order("cut")

    def heal(self) -> None:
        self._order("heal")

    def close(self) -> None:
        self._order("close")
        self._thread.join()

    def _order(self, what: str) -> None:
        """Have the thread do it, and wait until it has."""
        self._done.clear()
        self._orders.append(what)
        self._wake.send(b"x")
        assert self._done.wait(10)

    def _listen(self) -> None:
        self._server = socket.create_server((self._to[0], self.port))
        self.port = self._server.getsockname()[1]
        self._selector.register(self._server, selectors.EVENT_READ)

    def _obey(self) -> None:
        what = self._orders.pop(0)
        if what == "heal":
            self._listen()
        else:
            with contextlib.suppress(KeyError, ValueError):  # it is cut already
                self._selector.unregister(self._server)
            self._server.close()
            for one in [*self._peer]:
                self._end(one)
        self._closed = what == "close"
        self._done.set()

    def _run(self) -> None:
        while not self._closed:
            for key, _ in self._selector.select():
                if key.fileobj is self._woken:
                    self._woken.recv(1)
                    self._obey()
                    break
                if key.fileobj is self._server:
                    self._accept()
                elif key.fileobj in self._peer:
                    self._hand_on(key.fileobj)
        for each in (self._wake, self._woken, self._selector):
            each.close()

    def _accept(self) -> None:
        one = self._server.accept()[0]
        try:
            other = socket.create_connection(self._to)
        except OSError:
            return one.close()
        for a, b in ((one, other), (other, one)):
            self._peer[a] = b
            self._selector.register(a, selectors.EVENT_READ)

    def _hand_on(self, one: socket.socket) -> None:
        data = b""
        with contextlib.suppress(OSError):
            data = one.recv(65536)
        try:
            self._peer[one].sendall(data)
        except OSError:
            data = b""
        if not data:
            self._end(one)

    def _end(self, one: socket.socket) -> None:
        other = self._peer.pop(one, None)
        if other:
            self._peer.pop(other, None)
            for each in (one, other):
                self._selector.unregister(each)
                each.close()
