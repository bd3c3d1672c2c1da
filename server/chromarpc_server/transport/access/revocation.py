"""Calls in progress whose caller is no longer known: they end when the callers file says so."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from chromarpc_server.domain.callers import Caller
from chromarpc_server.domain.errors import Unauthenticated
from chromarpc_server.transport.access.callers_file import LOOK_EVERY_S, CallersFile, Proof
from chromarpc_server.transport.access.interceptor import Call

_MESSAGE = "this server no longer knows the caller, or the token or certificate, that the call was made with"


class Revocation:
    """Remembers who made the calls in progress, and with what. Lives on the event loop."""

    def __init__(self, callers: CallersFile) -> None:
        """Looks at the file's changes while there are calls in progress, whether others begin or not."""
        self.callers = callers
        callers.on_reload = self._end_revoked
        self._calls: dict[Call, tuple[str, Proof]] = {}
        self._timer: asyncio.TimerHandle | None = None

    @contextmanager
    def of(self, call: Call, caller: Caller, proof: Proof) -> Iterator[None]:
        """While the call is in progress."""
        self._calls[call] = (caller.name, proof)
        if self._timer is None:
            self._look_again()
        try:
            yield
        finally:
            del self._calls[call]

    def _look_again(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(LOOK_EVERY_S, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._calls:
            self._look_again()
            self.callers.look()

    def _end_revoked(self) -> None:
        for call, (name, proof) in list(self._calls.items()):
            caller = self.callers.find(proof)
            if caller is None or caller.name != name:
                call.end(Unauthenticated(_MESSAGE))
