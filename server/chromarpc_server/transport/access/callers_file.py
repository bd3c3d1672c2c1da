"""The callers that a server knows, read from a TOML file: hashes of their tokens, their names and limits.

    [[callers]]
    name = "studio"
    token_sha256 = "…64 hexadecimal digits…"   # or a list of them, while a token is being replaced
    max_streams = 20                            # limits that are left out are the server's own

    [[callers]]
    name = "renderer"
    certificate = "spiffe://mesh.example/ns/render/sa/renderer"

Tokens are 256 random bits, so one round of SHA-256 keeps them: there is nothing to guess.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import time
import tomllib
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    NonNegativeInt,
    StringConstraints,
    ValidationError,
    model_validator,
)

from chromarpc_server.domain.callers import Caller
from chromarpc_server.domain.limits import CallerLimits

log = logging.getLogger(__name__)

TOKEN_PREFIX = "chromarpc_"  # noqa: S105 - lets secret scanners recognise a token
LOOK_EVERY_S = 1.0
"""How long a changed file may go unnoticed."""

Proof = bytes | tuple[str, ...]
"""What a call proves its caller with: the SHA-256 of a token, or the names in a verified certificate."""
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-fA-F]{64}$", to_lower=True)]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    token_sha256: Annotated[
        tuple[Hash, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)
    ] = ()
    certificate: str = ""
    max_streams: NonNegativeInt | None = None
    max_queued_jobs: NonNegativeInt | None = None
    max_pixel_steps: NonNegativeInt | None = None
    max_upload_bytes: NonNegativeInt | None = None
    max_calls_per_minute: NonNegativeInt | None = None

    @model_validator(mode="after")
    def _has_proof(self) -> _Entry:
        if not self.token_sha256 and not self.certificate:
            raise ValueError("needs token_sha256 or certificate")
        return self

    def caller(self, defaults: CallerLimits) -> Caller:
        own = {item.name: getattr(self, item.name) for item in fields(CallerLimits)}
        return Caller(
            self.name, replace(defaults, **{key: value for key, value in own.items() if value is not None})
        )


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    callers: tuple[_Entry, ...] = ()

    @model_validator(mode="after")
    def _is_unique(self) -> _File:
        for what, found in (
            ("the name {}", [entry.name for entry in self.callers]),
            ("the certificate {}", [entry.certificate for entry in self.callers if entry.certificate]),
            ("a token_sha256", [sha256 for entry in self.callers for sha256 in entry.token_sha256]),
        ):
            twice = {item for item in found if found.count(item) > 1}
            if twice:
                raise ValueError(f"{what.format(min(twice))} appears twice")
        return self


@dataclass(frozen=True)
class _Known:
    by_hash: tuple[tuple[bytes, Caller], ...]
    by_certificate: dict[str, Caller]


class CallersFile:
    """Who may call. Reads its file again when that has changed; one that cannot be used changes nothing."""

    def __init__(
        self, path: Path, defaults: CallerLimits | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Reads the file.

        Args:
            path: of the file.
            defaults: limits of callers whose entry does not say otherwise.
            clock: seconds.

        Raises:
            ValueError: it cannot be read, or says something that makes no sense; never quotes it.
        """
        self._path = path
        self._defaults = defaults or CallerLimits()
        self._clock = clock
        self._looked_at = clock()
        self._stamp = self._stamp_now()
        self._known = self._read()
        self.on_reload: Callable[[], None] | None = None
        """Called after the file was read again."""

    def by_token(self, token: str) -> Caller | None:
        """The caller that a token belongs to. Takes as long for any token, right or wrong."""
        return self.find(proof_of_token(token))

    def by_certificate(self, identities: Collection[str]) -> Caller | None:
        """The caller that has one of a verified certificate's names."""
        return self.find(tuple(identities))

    def find(self, proof: Proof) -> Caller | None:
        """The caller that a proof belongs to."""
        self.look()
        found: Caller | None = None
        if isinstance(proof, bytes):
            for known, caller in self._known.by_hash:
                if hmac.compare_digest(known, proof):
                    found = caller
        else:
            found = next(filter(None, map(self._known.by_certificate.get, proof)), None)
        return found

    def look(self) -> None:
        """Reads the file again if it has changed; looks at most once a second."""
        now = self._clock()
        if now - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = now
        if self._stamp_now() != self._stamp:
            self.reload()

    def reload(self) -> None:
        """Reads the file now; logs what is wrong with it and keeps what was known."""
        self._looked_at = self._clock()
        self._stamp = self._stamp_now()
        try:
            self._known = self._read()
        except ValueError as error:
            log.error("callers.not_reloaded", extra={"problem": str(error)})  # noqa: TRY400 - no traceback wanted
            return
        log.info("callers.reloaded", extra={"callers": self.count})
        if self.on_reload is not None:
            self.on_reload()

    @property
    def count(self) -> int:
        """Callers known now."""
        callers = [caller for _, caller in self._known.by_hash] + list(self._known.by_certificate.values())
        return len({caller.name for caller in callers})

    def _stamp_now(self) -> tuple[int, int, int] | None:
        try:
            status = os.stat(self._path)  # noqa: PTH116 - follows the links that Kubernetes swaps
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size

    def _read(self) -> _Known:
        try:
            file = _File.model_validate(tomllib.loads(self._path.read_text("utf-8")))
        except OSError as error:
            raise ValueError(f"{self._path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ValueError(f"{self._path}: not UTF-8") from None
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{self._path}: {error}") from None
        except ValidationError as error:
            problem = error.errors(include_input=False, include_url=False)[0]
            where = ".".join(str(part) for part in problem["loc"])
            message = problem["msg"].removeprefix("Value error, ")
            raise ValueError(f"{self._path}: {where + ': ' if where else ''}{message}") from None
        callers = [(entry, entry.caller(self._defaults)) for entry in file.callers]
        return _Known(
            tuple((bytes.fromhex(sha256), caller) for entry, caller in callers for sha256 in entry.token_sha256),
            {entry.certificate: caller for entry, caller in callers if entry.certificate},
        )


def proof_of_token(token: str) -> Proof:
    """What is looked for; the token itself need not be kept."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def new_token() -> str:
    """A token of 256 random bits."""
    return TOKEN_PREFIX + secrets.token_urlsafe(32)


def entry_text(name: str, token: str) -> str:
    """The lines of a callers file that let `token` in as `name`.

    Raises:
        ValueError: not a name.
    """
    sha256 = hashlib.sha256(token.encode()).hexdigest()
    try:
        entry = _Entry(name=name, token_sha256=(sha256,))
    except ValidationError:
        raise ValueError(
            f"{name!r} is not a name: 1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or digit"
        ) from None
    return f'[[callers]]\nname = "{entry.name}"\ntoken_sha256 = "{sha256}"\n'
