"""A Redis in front of Redis that loses replies on demand, so that nobody hears of a request, and can be slow."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from tests.throttle import Throttle


class LossyProxy:
    """Forwards a unix socket to another one; ``lose_replies(n)`` cuts the connection instead of the next n replies."""

    def __init__(self, listen: Path, target: str) -> None:
        self.url = f"unix://{listen}"
        self.lost = 0
        self.throttle = Throttle()
        self._target = target
        self._to_lose = 0
        self._lock = threading.Lock()
        self._open: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(listen))
        self._listener.listen()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def lose_replies(self, count: int) -> None:
        with self._lock:
            self._to_lose = count

    def forward_to(self, target: str) -> None:
        """Connections from now on lead to another server, as after a failover; open ones are cut."""
        self._target = target.removeprefix("unix://")
        for one in self._open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.throttle.close()
        for one in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for thread in self._threads:
            thread.join(10.0)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(self._target)
                self._open += [client, server]
                for pair, is_reply in (((client, server), False), ((server, client), True)):
                    thread = threading.Thread(target=self._pump, args=(*pair, is_reply), daemon=True)
                    self._threads.append(thread)
                    thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket, is_reply: bool) -> None:
        with contextlib.suppress(OSError):
            while (data := source.recv(self.throttle.block)) and not (is_reply and self._is_lost()):
                self.throttle.let_pass(len(data), is_reply=is_reply)
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _is_lost(self) -> bool:
        with self._lock:
            if self._to_lose == 0:
                return False
            self._to_lose -= 1
            self.lost += 1
            return True


@contextlib.contextmanager
def lossy_proxy(folder: Path, redis_url: str) -> Iterator[LossyProxy]:
    proxy = LossyProxy(folder / "proxy", redis_url.removeprefix("unix://"))
    try:
        yield proxy
    finally:
        proxy.close()
