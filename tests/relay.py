"""A wire between two programs on loopback that can be cut."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading


class Relay:
    """Hands on what comes to its port; while it is cut nobody gets in, and all are thrown out."""

    def __init__(self, host: str, port: int) -> None:
        self._to = (host, port)
        self._server = socket.create_server((host, 0))
        self.port: int = self._server.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._peer: dict[socket.socket, socket.socket] = {}
        self._cut = self._closed = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def cut(self) -> None:
        self._cut = True
        self._wake.send(b"x")

    def heal(self) -> None:
        self._cut = False

    def close(self) -> None:
        self._closed = True
        self.cut()
        self._thread.join()
        for one in (self._server, self._wake, self._woken):
            one.close()
        self._selector.close()

    def _run(self) -> None:
        while not self._closed:
            for key, _ in self._selector.select():
                if key.fileobj is self._server:
                    self._accept()
                elif key.fileobj is self._woken:
                    self._woken.recv(1)
                elif key.fileobj in self._peer:
                    self._hand_on(key.fileobj)
            if self._cut:
                for one in [*self._peer]:
                    self._end(one)

    def _accept(self) -> None:
        one = self._server.accept()[0]
        if self._cut:
            return one.close()
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
