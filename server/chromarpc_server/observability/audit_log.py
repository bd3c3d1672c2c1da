"""The file of `--audit-log`: the audit's lines as JSON, apart from the ordinary log.

The file is the server's user's alone (0600) when the server makes it, and is opened again at SIGHUP, so that
logrotate can move it away. Lines are given to the system as they happen and not synced one by one.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from chromarpc_server.observability.logs import JsonFormatter
from chromarpc_server.transport.access.audit import AUDIT_LOGGER

log = logging.getLogger(__name__)

COMPLAIN_EVERY_S = 10.0


class AuditLog(logging.Handler):
    """Takes the audit's lines from the ordinary log until it is closed."""

    def __init__(self, path: Path) -> None:
        """Opens the file, to append to it.

        Raises:
            OSError: it cannot be written.
        """
        super().__init__()
        self.setFormatter(JsonFormatter())
        self._path = path
        try:
            self._file = _open(path)
        except OSError as error:
            raise OSError(f"the audit log {path} cannot be written: {error.strerror}; see --audit-log") from None
        self._is_torn = False
        self._lost = 0
        self._complained_at: float | None = None
        self._logger = logging.getLogger(AUDIT_LOGGER)
        self._level_before = self._logger.level
        # Whatever --log-level says: it is about the ordinary log.
        self._logger.setLevel(logging.INFO)
        self._logger.propagate = False
        self._logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Appends a line; where that fails, the ordinary log says so now and then, with how many are lost."""
        try:
            line = memoryview(f"{self.format(record)}\n".encode())
            if self._is_torn:
                # A full disk took a part of an earlier line: this one is not to be lost with it.
                os.write(self._file, b"\n")
                self._is_torn = False
            while line:
                written = os.write(self._file, line)
                self._is_torn = written < len(line)
                line = line[written:]
        except OSError as error:
            self._lost += 1
            self._complain(error)

    def reopen(self) -> None:
        """Goes on in the file that has the name now; in the old one if that cannot be opened."""
        self.acquire()
        try:
            opened = _open(self._path)
            os.close(self._file)
            self._file, self._is_torn = opened, False
        except OSError as error:
            self._complain(error)
        finally:
            self.release()

    def close(self) -> None:
        """Gives the lines back to the ordinary log."""
        if self in self._logger.handlers:
            self._logger.removeHandler(self)
            self._logger.propagate = True
            self._logger.setLevel(self._level_before)
            os.close(self._file)
        super().close()

    def _complain(self, error: OSError) -> None:
        now = time.monotonic()
        if self._complained_at is None or now - self._complained_at >= COMPLAIN_EVERY_S:
            self._complained_at = now
            fields = {"path": str(self._path), "problem": error.strerror, "lost": self._lost}
            log.error("audit.not_written", extra=fields)
            self._lost = 0


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
