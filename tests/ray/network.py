"""A network that a test can cut: bytes that are on their way wait, and neither end notices."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress


class Network:
    """Forwards each connection that is made to its port."""

    def __init__(self, to: tuple[str, int]) -> None:
        self._to = to
        self._cut: set[int] = set()
        self._connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()
        self._open = threading.Event()
        self._open.set()

    def cut(self) -> None:
        """Every connection there is, from now on; later ones work."""
        self._open.clear()
        self._cut = set(range(self._connections))

    def mend(self) -> None:
        self._open.set()

    def close(self) -> None:
        self._open.set()
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                here, _ = self._listener.accept()
                there = socket.create_connection(self._to)
                number, self._connections = self._connections, self._connections + 1
                for source, target in ((here, there), (there, here)):
                    threading.Thread(target=self._forward, args=(number, source, target), daemon=True).start()

    def _forward(self, number: int, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if number in self._cut:
                    self._open.wait()
                target.sendall(data)
        for one in (source, target):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
