"""A port for machines that watch: `/metrics` for Prometheus, `/livez` and `/readyz` for probes that speak HTTP.

Serves in threads of its own, so that a busy event loop is seen and not waited for. It serves no secrets, no
prompts and no names of callers; whoever reaches it may read it.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from chromarpc_server.transport.addresses import joined

log = logging.getLogger(__name__)

READ_TIMEOUT_S = 5.0
MAX_CONNECTIONS = 64


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    def process_request(self, request: object, client_address: object) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)  # type: ignore[arg-type]
            return
        super().process_request(request, client_address)  # type: ignore[arg-type]

    def process_request_thread(self, request: object, client_address: object) -> None:
        try:
            super().process_request_thread(request, client_address)  # type: ignore[arg-type]
        finally:
            self._free.release()

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002 - the base's signature
        log.debug("status_port.connection_broke")


class StatusPort:
    """The port while it is open."""

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        *,
        is_alive: Callable[[], bool],
        is_ready: Callable[[], bool],
        why_not_ready: Callable[[], str] = lambda: "",
    ) -> None:
        """Opens it; port 0 picks one.

        Args:
            host: to bind.
            port: to bind.
            registry: what `/metrics` serves.
            is_alive: whether the process is of any use.
            is_ready: whether requests are taken.
            why_not_ready: why not, in a sentence, where there is something to say.

        Raises:
            OSError: the address cannot be bound.
        """

        class Handler(BaseHTTPRequestHandler):
            timeout: ClassVar[float | None] = READ_TIMEOUT_S
            server_version = "chromarpc"
            sys_version = ""

            def do_GET(self) -> None:
                match self.path.partition("?")[0]:
                    case "/metrics":
                        encode, media_type = choose_encoder(self.headers.get("Accept", ""))
                        self._answer(HTTPStatus.OK, encode(registry), media_type)
                    case "/livez":
                        self._answer_probe(is_alive())
                    case "/readyz":
                        self._answer_probe(is_ready(), why_not_ready)
                    case _:
                        self._answer(HTTPStatus.NOT_FOUND, b"try /metrics, /livez or /readyz\n")

            def _answer_probe(self, is_so: bool, why_not: Callable[[], str] = lambda: "") -> None:
                if is_so:
                    self._answer(HTTPStatus.OK, b"yes\n")
                else:
                    reason = why_not()
                    text = f"no: {reason}\n" if reason else "no\n"
                    self._answer(HTTPStatus.SERVICE_UNAVAILABLE, text.encode())

            def _answer(self, status: HTTPStatus, body: bytes, media_type: str = "text/plain") -> None:
                self.send_response(status)
                self.send_header("Content-Type", media_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
                """Nothing: probes come every few seconds."""

        try:
            self._server = _Server((host, port), Handler)
        except OSError as error:
            raise OSError(f"cannot listen on {joined(host, port)} for metrics: {error.strerror}") from None
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="status-port", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Closes it."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
