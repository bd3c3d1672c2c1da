"""Reads an adapter's file for a model, and makes sure that its bytes are what it stands for."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from functools import partial
from io import BufferedReader

from chromarpc_server.adapters.file import AdapterFile
from chromarpc_server.domain.errors import LoraIncompatible, LoraInvalid
from chromarpc_server.pipeline import Adapter, Check, read_adapter


def read_checked(file: AdapterFile, targets: Mapping[str, tuple[int, ...]], *, check: Check) -> Adapter:
    """The adapter, parsed for a model; the file is read once where nothing is wrong with it.

    Args:
        file: as it was found.
        targets: the model's parameters, name to shape.
        check: called between pieces of work; may raise to stop.

    Raises:
        LoraDamaged: the file is named by a hash, and has other bytes.
        LoraInvalid, LoraIncompatible: see `read_adapter`.
        LoraChanged: it is no longer the file that was found.
    """
    if file.sha256 is None:
        adapter = read_adapter(file.path, targets, opener=file.open, check=check)
        file.require_read(adapter.sha256)
        return adapter
    try:
        # Opened once: header, tensors and hash are of one version, even where another takes its place meanwhile.
        with file.open() as stream:
            return _read_named(file, stream, targets, check)
    except OSError as error:
        raise file.damage() if error.errno == errno.EIO else LoraInvalid("the file cannot be read") from None


def _read_named(
    file: AdapterFile, stream: BufferedReader, targets: Mapping[str, tuple[int, ...]], check: Check
) -> Adapter:
    """The adapter in `stream`, of a file that is named by its hash."""
    try:
        adapter = read_adapter(file.path, targets, opener=partial(_reopened, stream), check=check)
    except (LoraInvalid, LoraIncompatible):
        # A damaged header looks like a bad file: nobody is blamed for sending one who did not.
        file.require_content(stream, check)
        raise
    file.require_read(adapter.sha256)
    return adapter


def _reopened(stream: BufferedReader) -> BufferedReader:
    again = os.fdopen(os.dup(stream.fileno()), "rb")
    again.seek(0)
    return again
