"""Drawing a picture again from its record, with some of its settings changed."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from chromarpc.cli.exits import UsageError, say
from chromarpc.cli.files import FORMATS_BY_SUFFIX
from chromarpc.cli.request import parse_body, request_format
from chromarpc.client import Client
from chromarpc.errors import ChromarpcError
from chromarpc.events import Event, Prepared
from chromarpc.json_request import InvalidRequestJson
from chromarpc.pictures.files import PARAMETERS_KEY, RECORD_KEY, NoPicture, kind_of, read_picture
from chromarpc.pictures.recorded import Unreadable, read_record, recorded_hashes
from chromarpc.request import build_request
from chromarpc.sampling import FLOWMATCH
from chromarpc.v1 import generation_service_pb2, options_pb2

_WORKFLOW_KEY = "prompt"
_FOREIGN_KEYS = ("workflow", PARAMETERS_KEY)


@dataclass(frozen=True)
class Recorded:
    """A picture's request, and what it was drawn with, to be compared with what it would be drawn with now."""

    request: generation_service_pb2.GenerateRequest
    model_revision: str
    hashes: Mapping[str, str]
    """SHA-256 of adapters by their paths; of those that the request still names."""
    urls: Sequence[str]
    """Of adapters that the picture, and nobody else, has a server fetch."""
    _told: set[str] = field(default_factory=set)

    def confirm_urls(self, *, confirmed: bool) -> None:
        """Shows the URLs that the record would have a server fetch, and asks, where nobody said yes already.

        Raises:
            UsageError: they are not to be fetched, or nobody can be asked.
        """
        if not self.urls:
            return
        say("The picture has the server fetch:")
        for url in self.urls:
            say(f"  {url}")
        if confirmed:
            return
        if not _can_answer():
            raise UsageError("look at these URLs, and say --fetch-urls to have them fetched")
        if not typer.confirm("Fetch?", err=True):
            raise UsageError("nothing was fetched and nothing drawn")

    def warn_before(self, client: Client) -> None:
        """Says which adapters are known to be others than recorded, before the server is asked to draw."""
        named = {lora.path for lora in self.request.loras if lora.path in self.hashes}
        if not {path for path in named if not path.startswith("sha256:") and not _is_url(path)}:
            return
        try:
            listing = client.list_loras()
        except ChromarpcError:
            return  # it is told when the job is prepared
        now = {lora.path: lora.sha256 for lora in listing if lora.sha256}
        by_hash = {sha256: path for path, sha256 in now.items()}
        for path in sorted(named):
            if now.get(path, self.hashes[path]) != self.hashes[path]:
                there = by_hash.get(self.hashes[path])
                self._warn(path, now[path], f"; the recorded one is there as {there}" if there else "")

    def warn_prepared(self, event: Event) -> None:
        """Says what else is not as recorded, once the server tells what it is about to draw with."""
        if not isinstance(event, Prepared):
            return
        for adapter in event.adapters:
            recorded = self.hashes.get(adapter.path)
            if recorded is not None and recorded != adapter.sha256 and adapter.path not in self._told:
                self._warn(adapter.path, adapter.sha256)
        if self.model_revision and event.model_revision and self.model_revision != event.model_revision:
            say(
                f"warning: the model has other content than recorded: {event.model_revision[:12]}, "
                f"not {self.model_revision[:12]}"
            )

    def _warn(self, path: str, sha256: str, more: str = "") -> None:
        self._told.add(path)
        say(
            f"warning: {path} has other content than recorded: {sha256[:12]}, not {self.hashes[path][:12]}{more} "
            f"(--lora '{path}#sha256={self.hashes[path]}' makes the server refuse it)"
        )


def recorded_picture(
    source: Path, picture: bytes, prompts: list[str], options: Mapping[str, Any], *, output: Path | None
) -> Recorded:
    """The request that a picture of this service carries, with options in place of what it says.

    Args:
        source: of the picture, for people.
        picture: its file.
        prompts: none, or one in place of the recorded one.
        options: of `build_request`; those that were given.
        output: the file to write, whose name says the format where no option does.

    Raises:
        UsageError: the picture carries none.
        InvalidRequestJson: what it carries is no request.
    """
    try:
        texts = read_picture(picture).texts
        text = texts[RECORD_KEY]
        record = read_record(text)
        revision, hashes = recorded_hashes(text)
    except NoPicture as error:
        raise UsageError(f"{source}: is a picture ({kind_of(picture)}) that cannot be read: it {error}") from None
    except KeyError:
        if _WORKFLOW_KEY in texts:
            raise UsageError(f"{source}: ComfyUI drew this picture; give it as --comfyui {source}") from None
        if any(key in texts for key in _FOREIGN_KEYS):
            raise UsageError(
                f"{source}: another program drew this picture; `chromarpc explain --request` makes a request of it"
            ) from None
        kind = kind_of(picture)
        raise UsageError(f"{source}: is a picture ({kind}) that does not say what it was drawn with") from None
    except Unreadable as error:
        raise InvalidRequestJson("", f"{error}") from None
    request = parse_body(source, json.dumps(record["request"]).encode())
    _as_before(request)
    meant = None if output is None else FORMATS_BY_SUFFIX.get(output.suffix.lower())
    if meant is not None and meant != request_format(request.output).removesuffix("-trainer"):
        options = {"output_format": meant, **options}
    _change(request, prompts, options)
    if "model" in options:
        revision = ""
    if "loras" in options:
        return Recorded(request, revision, {}, ())
    return Recorded(request, revision, hashes, [lora.path for lora in request.loras if _is_url(lora.path)])


def _as_before(request: generation_service_pb2.GenerateRequest) -> None:
    """A record of an older version names no sampler: there was the reference's alone, whatever a model has now."""
    for prompt in request.prompts:
        if not prompt.sampler and not prompt.schedule and not prompt.HasField("shift"):
            prompt.sampler = prompt.schedule = FLOWMATCH


def _change(
    request: generation_service_pb2.GenerateRequest, prompts: list[str], options: Mapping[str, Any]
) -> None:
    """Puts options in the place of what a request says, and nothing else."""
    if len(prompts) > 1:
        raise UsageError("a picture's record is of one picture; give one PROMPT at most")
    if len(request.prompts) != 1:
        raise InvalidRequestJson("prompts", "a picture's record has one")
    changed = build_request(prompts or [request.prompts[0].prompt], **options)
    request.prompts[0].MergeFrom(changed.prompts[0])
    if "loras" in options:
        del request.loras[:]
        request.loras.extend(changed.loras)
    changed.ClearField("prompts")
    changed.ClearField("loras")
    if "model" not in options:  # which is filled in
        changed.ClearField("model")
    has_quality = (options_pb2.IMAGE_FORMAT_JPEG, options_pb2.IMAGE_FORMAT_WEBP)
    if changed.output.format and changed.output.format not in has_quality:
        request.output.ClearField("quality")
    request.MergeFrom(changed)


def _can_answer() -> bool:
    return sys.stdin.isatty()


def _is_url(path: str) -> bool:
    return path.lower().startswith(("http://", "https://"))
