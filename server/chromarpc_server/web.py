"""`chromarpc-server web`: the server, Envoy in front of it, and the page, at one address."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from pydantic import Field, model_validator

from chromarpc_server.gateway.configuration import LOOPBACK_NAMES, Gateway, envoy_yaml
from chromarpc_server.gateway.envoy import Envoy, GatewayError, envoy_path
from chromarpc_server.ports import PortUnusable, WantedPort, require_free
from chromarpc_server.settings import ServerSettings, TcpHost
from chromarpc_server.transport.addresses import is_local, is_unix, joined

EXIT_GATEWAY = 1
DEFAULT_PORT = 8080


class WebSettings(ServerSettings):
    """Serves the web page, gRPC-Web and the reference's HTTP API, in front of a server of its own.

    Examples:
      chromarpc-server web                                  http://127.0.0.1:8080, gRPC on 127.0.0.1:50051
      chromarpc-server web --alias chroma=chroma-mini       without a GPU and without a download
      chromarpc-server web --web-upstream 127.0.0.1:50051   the gateway alone, before a server that runs already
      chromarpc-server web --print-config                   Envoy's configuration, to run it elsewhere

    Takes every flag of `chromarpc-server` besides.
    """

    web_host: TcpHost = Field("127.0.0.1", description="address of page and gateway")
    web_port: int = Field(DEFAULT_PORT, ge=1, le=65535, description="port of page and gateway")
    web_name: list[str] = Field(
        default_factory=list,
        description="host name that the gateway is reached by, besides this machine's own; repeatable; any if it "
        "binds another address than loopback and none is named",
    )
    web_origin: list[str] = Field(
        default_factory=list,
        description="origin of another page that may call, such as https://studio.example.org; repeatable",
    )
    web_url: str | None = Field(
        None, description="where the gateway is reached from outside, for the URLs it answers with"
    )
    web_upstream: str | None = Field(
        None, description="HOST:PORT of a server that runs already; none is started then"
    )
    web_upstream_ca: Path | None = Field(
        None, description="PEM file of the authority of the server's certificate, where it speaks TLS"
    )
    web_upstream_name: str | None = Field(None, description="name to expect in that certificate")
    print_config: bool = Field(False, description="print Envoy's configuration and exit")

    @model_validator(mode="after")
    def _check_web(self) -> WebSettings:
        upstream = self.host if self.web_upstream is None else self.web_upstream
        if is_unix(upstream):
            flag = "--host" if self.web_upstream is None else "--web-upstream"
            raise ValueError(
                f"{flag} {upstream}: the gateway reaches a server by TCP only; give it a loopback address"
            )
        if not is_local(self.web_host) and not self.insecure:
            raise ValueError(
                f"--web-host {self.web_host} can be reached by others, unencrypted: --insecure allows it"
            )
        if self.web_upstream is None and self.tls_cert is not None and self.web_upstream_ca is None:
            raise ValueError("--tls-cert: the gateway must know its authority too: --web-upstream-ca")
        if self.web_upstream is None and self.tls_client_ca is not None:
            raise ValueError(
                "--tls-client-ca: the gateway has no client certificate; run an Envoy of your own (--print-config)"
            )
        for origin in self.web_origin:
            if origin != "*" and not origin.startswith(("http://", "https://")):
                raise ValueError(f"--web-origin {origin}: must be an origin such as https://studio.example.org")
        return self

    def wanted_ports(self) -> list[WantedPort]:
        """What will be bound, the gateway's port first."""
        own = WantedPort("--web-port", self.web_host, self.web_port)
        return [own] if self.web_upstream is not None else [own, *super().wanted_ports()]

    def gateway(self, grpc_port: int) -> Gateway:
        """The gateway that these settings describe."""
        host, port = self.host, grpc_port
        if self.web_upstream is not None:
            host, _, digits = self.web_upstream.rpartition(":")
            host = host.strip("[]")
            if not host or not digits.isdecimal():
                raise GatewayError(f"--web-upstream {self.web_upstream}: must be HOST:PORT")
            port = int(digits)
        is_private = is_local(self.web_host)
        names = (*LOOPBACK_NAMES, *self.web_name) if is_private or self.web_name else ("*",)
        return Gateway(
            web_host="127.0.0.1" if self.web_host == "localhost" else self.web_host,
            web_port=self.web_port,
            grpc_host={"0.0.0.0": "127.0.0.1", "::": "::1", "localhost": "127.0.0.1"}.get(host, host),  # noqa: S104
            grpc_port=port,
            names=names,
            origins=tuple(self.web_origin),
            public_url=self.web_url,
            grpc_authority=self.web_upstream_ca,
            grpc_name=self.web_upstream_name,
        )


async def serve_web(settings: WebSettings) -> int:
    """Runs server and gateway until SIGTERM or SIGINT. Returns the exit code."""
    try:
        if settings.print_config:
            gateway = settings.gateway(settings.port)
            print(envoy_yaml(gateway, descriptor=Path("chromarpc.v1.binpb")), end="")
            return 0
        envoy_path()
        require_free(settings.wanted_ports())  # before torch is imported, and long before the model is loaded
        return await (_gateway_alone(settings) if settings.web_upstream else _with_server(settings))
    except (GatewayError, PortUnusable) as error:
        print(f"chromarpc-server web cannot start: {error}", file=sys.stderr)
        return EXIT_GATEWAY


async def _gateway_alone(settings: WebSettings) -> int:
    stop = asyncio.Event()
    _on_signals(stop.set)
    return await _run_gateway(settings, settings.port, asyncio.create_task(stop.wait()))


async def _with_server(settings: WebSettings) -> int:
    from chromarpc_server.app import EXIT_CANNOT_START, App  # noqa: PLC0415 - torch takes seconds
    from chromarpc_server.domain.errors import ChromaError  # noqa: PLC0415

    app = App(settings)
    _on_signals(app.signalled)
    if hasattr(signal, "SIGHUP"):
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, app.reload)
    started: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(app.run(started))
    try:
        if settings.port == 0:
            await asyncio.wait({serving, started}, return_when=asyncio.FIRST_COMPLETED)
        port = started.result() if started.done() else settings.port
        # With a port of its own the gateway is there at once: the page says that the server is still loading.
        gateway_code = 0 if serving.done() else await _run_gateway(settings, port, serving)
        app.stop()
        return await serving or gateway_code
    except (ChromaError, OSError, ValueError) as error:
        print(f"chromarpc-server cannot start: {error}", file=sys.stderr)
        return EXIT_CANNOT_START
    finally:
        app.stop()
        with contextlib.suppress(ChromaError, OSError, ValueError):
            await serving


async def _run_gateway(settings: WebSettings, grpc_port: int, until: asyncio.Task[object]) -> int:
    """Runs the gateway until a task is done, or until it ends by itself."""
    envoy = Envoy(settings.gateway(grpc_port))
    try:
        starting = asyncio.create_task(envoy.start())
        await asyncio.wait({starting, until}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            return 0
        starting.result()
        print(f"The page is http://{joined(settings.web_host, settings.web_port)}/", flush=True)
        ended = asyncio.create_task(envoy.wait())
        await asyncio.wait({ended, until}, return_when=asyncio.FIRST_COMPLETED)
        if ended.done() and not until.done():
            print(f"Envoy ended with exit code {ended.result()}:\n{envoy.last_words()}", file=sys.stderr)
            return EXIT_GATEWAY
        ended.cancel()
        return 0
    finally:
        await envoy.stop()


def _on_signals(stop: Callable[[], object]) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(NotImplementedError):  # Windows has no loop signal handlers
            loop.add_signal_handler(number, stop)
