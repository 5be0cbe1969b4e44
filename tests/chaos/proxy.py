"""A Redis in front of Redis: connections are cut, replies get lost, the link is slow, servers change behind it."""

import contextlib
import re
import socket
import threading
from pathlib import Path

from tests.throttle import Throttle

_RUN_ID = re.compile(rb"run_id:[0-9a-f]{40}")


class Proxy:
    """Listens on a unix socket of its own; safe to steer from another thread."""

    def __init__(self, listen: Path, target: Path, *, hides_run_id: bool) -> None:
        """``hides_run_id``: as some proxies in the cloud do, it shows one server where there were several."""
        self.url = f"unix://{listen}"
        self.target = target
        self.throttle = Throttle()
        self._hides_run_id = hides_run_id
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._to_lose, self._command = 0, b""
        self._requests: dict[socket.socket, bytes] = {}
        """Server's end of a connection -> the last request on it."""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(listen))
        self._listener.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Close every connection, wherever in a request or a reply it is."""
        with self._lock:
            cut, self._open = self._open, set()
        for one in cut:
            _shut(one)

    def lose_replies(self, count: int, *, to: bytes = b"EVALSHA") -> None:
        """The next ``count`` requests that name ``to`` arrive; their connections end instead of their replies."""
        with self._lock:
            self._to_lose, self._command = count, to

    def close(self) -> None:
        self.throttle.close()
        _shut(self._listener)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._connect(client)

    def _connect(self, client: socket.socket) -> None:
        server = socket.socket(socket.AF_UNIX)
        try:
            server.connect(str(self.target))
        except OSError:  # the server is down: so is the connection
            server.close()
            client.close()
            return
        with self._lock:
            self._open |= {client, server}
        for pair, is_reply in (((client, server), False), ((server, client), True)):
            threading.Thread(target=self._pump, args=(*pair, is_reply), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, is_reply: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(self.throttle.block):
                if not is_reply:
                    self._requests[sink] = data
                elif self._is_lost(self._requests.get(source, b"")):
                    break
                if is_reply and self._hides_run_id:
                    data = _RUN_ID.sub(b"run_id:" + b"0" * 40, data)
                self.throttle.let_pass(len(data), is_reply=is_reply)
                sink.sendall(data)
        for one in (source, sink):
            _shut(one)
        with self._lock:
            self._open -= {source, sink}
            self._requests.pop(source, None)
        if is_reply:  # one of the two pumps closes both; the other one is about to end
            source.close()
            sink.close()

    def _is_lost(self, request: bytes) -> bool:
        with self._lock:
            if self._to_lose == 0 or self._command not in request:
                return False
            self._to_lose -= 1
            return True


def _shut(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
