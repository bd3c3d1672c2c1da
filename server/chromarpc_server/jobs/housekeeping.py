"""What the engine does every half minute, whatever else happens."""

from __future__ import annotations

import asyncio
import logging

from chromarpc_server.domain.errors import StoreError
from chromarpc_server.jobs.completion import Completion
from chromarpc_server.jobs.store.job_store import JobStore

log = logging.getLogger(__name__)

HOUSEKEEPING_S = 30.0


async def keep_house(completion: Completion, store: JobStore) -> None:
    """Stores ends that could not be stored, and has the store tended; never returns."""
    while True:
        await asyncio.sleep(HOUSEKEEPING_S)
        for duty in (completion.store_unstored, store.tend):  # neither keeps the other from being done
            try:
                await duty()
            except StoreError:
                pass  # logged already; there is a next time
            except Exception:
                log.exception("housekeeping.failed")
