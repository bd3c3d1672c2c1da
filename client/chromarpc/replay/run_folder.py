"""The only door to a training run's folder: nothing outside it is read, links included, whatever its files say."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from chromarpc.replay.config_file import MAX_CONFIG_BYTES, ConfigError

CONFIG_NAMES: Final = ("config.yaml", "config.yml", ".job_config.json")
"""The trainer writes the first; its user interface leaves the last."""
SAMPLES: Final = "samples"
MAX_ENTRIES: Final = 100_000
MAX_HEADER_BYTES: Final = 32 * 1024**2
MAX_PICTURE_BYTES: Final = 64 * 1024**2
_SAMPLE_NAME: Final = re.compile(r"([0-9]{1,18})__([0-9]{9,12})_([0-9]{1,6})\.(jpg|jpeg|png|webp)")
_BENEATH: Final = os.open in os.supports_dir_fd and hasattr(os, "O_NOFOLLOW") and hasattr(os, "O_DIRECTORY")


class Unreadable(Exception):
    """A file of the folder cannot be read or is not what it should be; a sentence for people."""


@dataclass(frozen=True, kw_only=True)
class SampleFile:
    """A picture that the trainer drew."""

    name: str
    """Below the run's folder: `samples/…`."""
    time_ms: int
    """When it was drawn, by the trainer's clock, since 1970."""
    step: int
    index: int


@dataclass(frozen=True)
class Ignored:
    """A file that is left out, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class SampleFiles:
    """The newest picture of every step and index, by both, and what is no such picture."""

    samples: tuple[SampleFile, ...]
    ignored: tuple[Ignored, ...]


@dataclass(frozen=True)
class AdapterHeader:
    """What a saved adapter says of itself."""

    step: int | None
    base_model: str
    """`chroma`; empty where the file does not say."""


class RunFolder:
    """An open run folder. Names are relative to it, with `/`, at most one folder deep."""

    def __init__(self, path: Path) -> None:
        """Opens the folder.

        Raises:
            OSError: there is no such folder, or it cannot be read.
        """
        self.path = path
        if not path.is_dir():
            raise NotADirectoryError(20, "not a folder", str(path))
        self._root = path.resolve(strict=True)
        self._descriptor = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY) if _BENEATH else -1

    def close(self) -> None:
        """Closes it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @contextmanager
    def open(self, name: str) -> Iterator[BufferedReader]:
        """A plain file, open for reading.

        Raises:
            Unreadable: it is missing, a link, or no plain file.
        """
        try:
            descriptor = self._open(name, directory=False)
        except OSError as error:
            raise Unreadable(_why(name, error)) from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise Unreadable(f"{name} is no plain file")
        with os.fdopen(descriptor, "rb") as file:
            yield file

    def read(self, name: str, limit_bytes: int) -> bytes:
        """A file's content.

        Raises:
            Unreadable: it cannot be read, or has more than `limit_bytes`.
        """
        with self.open(name) as file:
            try:
                content = file.read(limit_bytes + 1)
            except OSError as error:
                raise Unreadable(_why(name, error)) from None
        if len(content) > limit_bytes:
            raise Unreadable(f"{name} has more than {limit_bytes} bytes")
        return content

    def sha256(self, name: str) -> str:
        """Of a file's content, hexadecimal.

        Raises:
            Unreadable: it cannot be read.
        """
        with self.open(name) as file:
            try:
                return hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise Unreadable(_why(name, error)) from None

    def names(self, folder: str = "") -> list[str]:
        """What a folder holds, by name; an empty list where there is no such folder, or only a link.

        Raises:
            Unreadable: it holds more than `MAX_ENTRIES`.
        """
        try:
            if _BENEATH:
                descriptor = self._open(folder, directory=True)
                try:
                    names = os.listdir(descriptor)  # noqa: PTH208 - no Path stands for a descriptor
                finally:
                    os.close(descriptor)
            else:
                names = [entry.name for entry in self._checked(folder).iterdir()]
        except OSError:
            return []
        if len(names) > MAX_ENTRIES:
            raise Unreadable(f"{folder or 'the folder'} holds more than {MAX_ENTRIES} files")
        return sorted(names)

    def config(self) -> tuple[str, bytes]:
        """Name and content of the run's config.

        Raises:
            ConfigError: there is none, or it is too large.
        """
        present = set(self.names())
        for name in CONFIG_NAMES:
            if name in present:
                try:
                    return name, self.read(name, MAX_CONFIG_BYTES)
                except Unreadable as error:
                    raise ConfigError(f"{error}: that is no training config of ai-toolkit") from None
        raise ConfigError(f"this is no run folder of ai-toolkit: there is no {CONFIG_NAMES[0]} in it")

    def samples(self) -> SampleFiles:
        """The pictures that the trainer drew: of each step and index the latest.

        Raises:
            Unreadable: there are too many files.
        """
        newest: dict[tuple[int, int], SampleFile] = {}
        ignored: list[Ignored] = []
        for name in self.names(SAMPLES):
            if name.startswith("."):  # thumbnails, and what is not finished
                continue
            found = _SAMPLE_NAME.fullmatch(name)
            if found is None:
                ignored.append(Ignored(f"{SAMPLES}/{name}", "not named like a sample of ai-toolkit"))
                continue
            sample = SampleFile(
                name=f"{SAMPLES}/{name}", time_ms=int(found[1]), step=int(found[2]), index=int(found[3])
            )
            key = (sample.step, sample.index)
            other = newest.get(key)
            if other is not None:
                older, sample = sorted((other, sample), key=lambda one: one.time_ms)
                ignored.append(Ignored(older.name, "drawn again later"))
            newest[key] = sample
        return SampleFiles(tuple(newest[key] for key in sorted(newest)), tuple(ignored))

    def adapter_header(self, name: str) -> AdapterHeader:
        """What a saved adapter says of itself; nothing of its values is read.

        Raises:
            Unreadable: it is no safetensors file.
        """
        with self.open(name) as file:
            try:
                start = file.read(8)
                size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
                header = json.loads(file.read(size)) if 2 <= size <= MAX_HEADER_BYTES else None
            except (OSError, ValueError, RecursionError):
                header = None
        if not isinstance(header, dict):
            raise Unreadable(f"{name} is no safetensors file")
        metadata = header.get("__metadata__")
        metadata = metadata if isinstance(metadata, dict) else {}
        base_model = metadata.get("ss_base_model_version")
        return AdapterHeader(
            _step(metadata.get("training_info")), base_model if isinstance(base_model, str) else ""
        )

    def _open(self, name: str, *, directory: bool) -> int:
        if not _BENEATH:
            return os.open(self._checked(name), os.O_RDONLY | getattr(os, "O_BINARY", 0))
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe must not make us wait
        *folders, last = _parts(name) or ["."]
        at, opened = self._descriptor, []
        try:
            for folder in folders:
                at = os.open(folder, flags | os.O_DIRECTORY, dir_fd=at)
                opened.append(at)
            return os.open(last, flags | (os.O_DIRECTORY if directory else 0), dir_fd=at)
        finally:
            for descriptor in opened:
                os.close(descriptor)

    def _checked(self, name: str) -> Path:
        """The path, where no part of it is a link; for systems that open nothing relative to a folder."""
        path = self._root
        for part in _parts(name):
            path /= part
            if path.is_symlink() or not path.resolve(strict=True).is_relative_to(self._root):
                raise OSError(40, "is a link", str(path))
        return path


def _parts(name: str) -> list[str]:
    parts = name.split("/") if name else []
    if any(part in ("", ".", "..") or "\0" in part or os.sep in part for part in parts):
        raise OSError(22, "no name of a file", name)
    return parts


def _step(training_info: object) -> int | None:
    try:
        info = json.loads(training_info) if isinstance(training_info, str) else training_info
    except (ValueError, RecursionError):
        return None
    step = info.get("step") if isinstance(info, dict) else None
    return step if isinstance(step, int) and not isinstance(step, bool) else None


def _why(name: str, error: OSError) -> str:
    if error.errno == 40 or (error.errno == 20 and "/" in name):  # ELOOP: what would have been followed
        return f"{name} is a link, and links are not followed"
    return f"{name} cannot be read: {error.strerror or error}"
