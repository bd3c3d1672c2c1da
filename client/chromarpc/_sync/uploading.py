# Generated from client/chromarpc/_async/uploading.py by tools/unasync.py: do not edit.
"""Carries out the steps of an upload."""

from __future__ import annotations

import os
from io import BufferedReader
from pathlib import Path

from chromarpc._sync.calls import Calls
from chromarpc._sync.concurrency import in_thread, sleep
from chromarpc.errors import StatusError
from chromarpc.loras import StoredLora
from chromarpc.upload import Call, Uploaded, UploadProgress, Wait, advance, open_file, upload_steps


def upload(
    calls: Calls,
    path: str | os.PathLike[str] | BufferedReader,
    filename: str | None,
    progress: UploadProgress | None,
    timeout_s: float | None,
) -> StoredLora:
    """What `Client.upload_lora` documents."""
    stub = calls.loras()
    with in_thread(open_file, path) as file:
        steps = upload_steps(file, filename or Path(file.name).name, progress)
        answer: object = None
        while True:
            step = in_thread(advance, steps, answer)
            match step:
                case Uploaded():
                    return step.lora
                case Wait():
                    sleep(step.delay_s)
                    answer = None
                case Call():
                    try:
                        method = getattr(stub, step.method)
                        answer = calls.ask(method, step.request, timeout_s, step.timeout_s)
                    except StatusError as error:
                        answer = error
