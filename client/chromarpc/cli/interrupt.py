"""Ctrl-C while a command waits for a server.

Python raises `KeyboardInterrupt` in the main thread wherever that happens to be. Inside gRPC it can leave a lock
taken, and closing the channel then waits for ever. So commands run in a thread of their own, and the main thread
has nothing to do but wait: it is always in a place that an interrupt can leave.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

POLL_S = 0.5
"""How long Ctrl-C may take where the system does not interrupt a wait."""
CLEAN_UP_S = 3.0
"""How long an interrupted command has to put the terminal right."""


def interruptible(work: Callable[[], None], stop: Callable[[], None]) -> None:
    """Runs `work` to its end.

    Args:
        work: in a thread of its own.
        stop: makes `work` end soon; called on Ctrl-C, from this thread.

    Raises:
        KeyboardInterrupt: Ctrl-C.
        BaseException: whatever `work` raised.
    """
    ended: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            ended.set_exception(error)
        else:
            ended.set_result(None)

    thread = threading.Thread(target=run, name="command", daemon=True)
    try:
        thread.start()
        while thread.is_alive():
            thread.join(POLL_S)
    except KeyboardInterrupt:
        stop()
        if thread.ident is not None:  # it did start
            thread.join(CLEAN_UP_S)
        raise
    ended.result()
