"""Carries out the steps of an upload."""

from __future__ import annotations

import os
from io import BufferedReader
from pathlib import Path

from chromarpc._async.calls import AsyncCalls
from chromarpc._async.concurrency import in_thread, sleep
from chromarpc.errors import StatusError
from chromarpc.loras import StoredLora
from chromarpc.upload import Call, Uploaded, UploadProgress, Wait, advance, open_file, upload_steps


async def upload(
    calls: AsyncCalls,
    path: str | os.PathLike[str] | BufferedReader,
    filename: str | None,
    progress: UploadProgress | None,
    timeout_s: float | None,
) -> StoredLora:
    """What `AsyncClient.upload_lora` documents."""
    stub = calls.loras()
    with await in_thread(open_file, path) as file:
        steps = upload_steps(file, filename or Path(file.name).name, progress)
        answer: object = None
        while True:
            step = await in_thread(advance, steps, answer)
            match step:
                case Uploaded():
                    return step.lora
                case Wait():
                    await sleep(step.delay_s)
                    answer = None
                case Call():
                    try:
                        method = getattr(stub, step.method)
                        answer = await calls.ask(method, step.request, timeout_s, step.timeout_s)
                    except StatusError as error:
                        answer = error
