"""Adapters on their way to hosts: named by their hashes, whatever requests call them, and read in pieces."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from io import BufferedReader

from chromarpc_server.adapters.file import AdapterFile
from chromarpc_server.cluster.link import Link
from chromarpc_server.cluster.messages import PIECE_BYTES, HashedFile, Piece, Wanted
from chromarpc_server.domain.errors import ChromaError, LoraChanged, LoraInvalid, LoraNotFound

MAX_REMEMBERED = 10_000
"""Versions of files whose hashes are known."""
_READ_BYTES = 4 * 1024 * 1024


class OutgoingFiles:
    """One for all devices. Lives on the event loop."""

    def __init__(self) -> None:
        self._hashes: OrderedDict[AdapterFile, str] = OrderedDict()
        self._files: dict[str, AdapterFile] = {}
        """By hash, the one that was asked for last."""

    async def named(self, files: Sequence[AdapterFile]) -> tuple[HashedFile, ...]:
        """Files by their hashes; those below the root are read for it, each version once.

        Raises:
            LoraChanged, LoraInvalid: one of them cannot be read as it was found.
        """
        named = []
        for index, file in enumerate(files):
            sha256 = file.sha256 or self._hashes.get(file)
            if sha256 is None:
                try:
                    sha256 = await asyncio.to_thread(_hash, file)
                except ChromaError as error:
                    raise error.at(f"loras.{index}.path") from None
                except OSError:
                    raise LoraInvalid("the file cannot be read", field=f"loras.{index}.path") from None
            self._note(file, sha256)
            named.append(HashedFile(sha256, file.size_bytes))
        return tuple(named)

    def here(self, sha256: str, size_bytes: int) -> AdapterFile | None:
        """What this server knows a file by that it has sent, for sets that a device reports."""
        file = self._files.get(sha256)
        return file if file is not None and file.size_bytes == size_bytes else None

    def _note(self, file: AdapterFile, sha256: str) -> None:
        self._hashes[file] = sha256
        self._hashes.move_to_end(file)
        self._files[sha256] = file
        while len(self._hashes) > MAX_REMEMBERED:
            old, its_hash = self._hashes.popitem(last=False)
            if self._files.get(its_hash) == old:
                del self._files[its_hash]


async def send_file(link: Link, file: AdapterFile | None, wanted: Wanted) -> None:
    """Sends a file's bytes, or what is wrong with it.

    Raises:
        OSError: the connection is gone.
    """
    error: ChromaError = LoraNotFound("the device asked for an adapter that its work does not name")
    if file is not None:
        try:
            stream = await asyncio.to_thread(file.open)
        except ChromaError as found:
            error = found
        except OSError:
            error = LoraInvalid("the file cannot be read")
        else:
            with stream:
                return await _send(link, file, stream, wanted)
    link.send(Piece(wanted.fetch, b"", is_last=True, error=error))
    return await link.drain()


async def _send(link: Link, file: AdapterFile, stream: BufferedReader, wanted: Wanted) -> None:
    digest, is_last = hashlib.sha256(), False
    while not is_last:
        error: ChromaError | None = None
        try:
            data = await asyncio.to_thread(stream.read, PIECE_BYTES)
            digest.update(data)
            is_last = len(data) < PIECE_BYTES
            if is_last and digest.hexdigest() != wanted.sha256:
                # Said here, where it is known whose fault that is: a host sees other bytes only.
                file.require_read(digest.hexdigest())
                error = LoraChanged("the adapter was written anew while it was sent to the device's host")
        except ChromaError as found:
            error = found
        except OSError:
            error = LoraInvalid("the file cannot be read")
        is_last = is_last or error is not None
        link.send(Piece(wanted.fetch, b"" if error else data, is_last=is_last, error=error))
        await link.drain()


def _hash(file: AdapterFile) -> str:
    digest = hashlib.sha256()
    with file.open() as stream:
        while piece := stream.read(_READ_BYTES):
            digest.update(piece)
    found = digest.hexdigest()
    file.require_read(found)
    return found
