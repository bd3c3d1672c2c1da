"""Has a server draw samples again, several at once, each only once: what was drawn is kept and found again.

Knows the client's public calls and a folder for the pictures; nothing of configs and reports.
"""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from PIL import Image

from chromarpc.client import Client
from chromarpc.errors import (
    AccessDenied,
    Cancelled,
    ChromarpcError,
    ProtocolError,
    QueueFull,
    QuotaExceeded,
    ServerUnavailable,
    StatusError,
)
from chromarpc.events import Event, ImageFormat, ImageReady, NoiseDraw, TrainerOptions
from chromarpc.images import GeneratedImage, write_file
from chromarpc.replay.run_folder import RunFolder, Unreadable
from chromarpc.request import Lora, Prompt, build_request

MOST_IN_FLIGHT: Final = 8
RETRY_WAITS_S: Final = (1.0, 2.0, 4.0, 8.0, 15.0)
"""Before the tries that follow a lost connection."""
MOST_WAITS: Final = 240
"""How often a full queue is waited for."""
FULL_WAIT_S: Final = 15.0
STATE_NAME: Final = "state.json"
PICTURES: Final = "pictures"
_STATE_FORMAT: Final = 1
_OUTPUTS: Final[Mapping[str, tuple[ImageFormat, str]]] = {
    "jpg": ("jpeg-trainer", ""),
    "jpeg": ("jpeg-trainer", ""),
    "png": ("png", "PNG"),
    "webp": ("png", "WEBP"),
}
"""What is asked for, and in which format it is written anew, so that it is encoded as the trainer's file."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A saved adapter of the run."""

    name: str
    sha256: str
    network_multiplier: float


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One sample to draw, with nothing left open."""

    step: int
    index: int
    model: str
    profile: str
    prompt: str
    negative_prompt: str
    width: int
    height: int
    seed: int
    steps: int
    guidance_scale: float
    adapter: Adapter | None
    trainer: TrainerOptions
    noise_draw: NoiseDraw
    suffix: str
    """Of the trainer's file: `jpg`, `png`, `webp`."""

    def fingerprint(self, server: str) -> str:
        """Equal for what gives the same picture on the same server."""
        facts = asdict(self)
        if self.adapter is not None:
            del facts["adapter"]["name"]
        text = json.dumps([facts, server], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A picture of ours, and what the server said about it."""

    file: str
    """Below the report's folder."""
    sha256: str
    warnings: tuple[str, ...]
    model_revision: str
    device: str
    versions: Mapping[str, str]
    seconds: float
    """From the request to the picture."""
    kept: bool = False
    """Whether it was there from an earlier time."""


@dataclass(frozen=True)
class Failed:
    """Why there is no picture; a sentence for people."""

    reason: str


Outcome = Drawn | Failed
OnEvent = Callable[[Drawing, Event], object]


class Interrupted(Exception):
    """The client was closed while pictures were on their way."""


class Pictures:
    """The pictures of a report's folder, by fingerprint; written down as soon as each is there."""

    def __init__(self, folder: Path) -> None:
        """Takes up what is there; what cannot be read is drawn again.

        Raises:
            OSError: the folder cannot be made.
        """
        self.folder = folder
        (folder / PICTURES).mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._known: dict[str, dict[str, Any]] = {}
        try:
            state = json.loads((folder / STATE_NAME).read_bytes())
            if state["format"] == _STATE_FORMAT:
                self._known = {key: dict(value) for key, value in state["pictures"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass

    def find(self, fingerprint: str) -> Drawn | None:
        """A picture of an earlier time, if its file is still what it was."""
        with self._lock:
            facts = self._known.get(fingerprint)
        if facts is None:
            return None
        try:
            found = Drawn(**(facts | {"warnings": tuple(facts["warnings"]), "kept": True}))
            intact = hashlib.sha256(self.read(found)).hexdigest() == found.sha256
        except (OSError, TypeError, KeyError, ValueError):
            return None
        return found if intact else None

    def read(self, drawn: Drawn) -> bytes:
        """The bytes of a picture.

        Raises:
            OSError: the file is gone.
        """
        return (self.folder / PICTURES / Path(drawn.file).name).read_bytes()

    def add(self, drawing: Drawing, fingerprint: str, data: bytes, facts: dict[str, Any]) -> Drawn:
        """Keeps a picture.

        Raises:
            OSError: it cannot be written.
        """
        name = f"{drawing.step:09d}_{drawing.index}_{fingerprint[:8]}.{drawing.suffix}"
        write_file(self.folder / PICTURES / name, data)
        drawn = Drawn(file=f"{PICTURES}/{name}", sha256=hashlib.sha256(data).hexdigest(), **facts)
        kept = asdict(drawn)
        del kept["kept"]
        with self._lock:
            self._known[fingerprint] = kept
            state = {"format": _STATE_FORMAT, "pictures": self._known}
            write_file(self.folder / STATE_NAME, json.dumps(state, indent=1).encode())
        return drawn


class Artist:
    """Draws on one server, with adapters out of one run folder."""

    def __init__(
        self,
        client: Client,
        folder: RunFolder,
        pictures: Pictures,
        *,
        server: str,
        in_flight: int,
        tell: Callable[[str], object],
    ) -> None:
        """Asks nothing yet.

        Args:
            client: the server.
            folder: where adapters are.
            pictures: where pictures are kept.
            server: what tells this server, its device and its versions from another.
            in_flight: drawings asked for at once.
            tell: says a line to a person.
        """
        self._client = client
        self._folder = folder
        self._pictures = pictures
        self._server = server
        self._in_flight = max(1, min(in_flight, MOST_IN_FLIGHT))
        self._tell = tell
        self._stop = threading.Event()
        self._adapters_lock = threading.Lock()
        self._paths: dict[str, str | Failed] = {}
        self._listed = False

    def draw_all(
        self,
        drawings: Iterable[Drawing],
        *,
        on_event: OnEvent,
        on_outcome: Callable[[Drawing, Outcome], object],
    ) -> None:
        """Draws them in their order, several at once.

        Args:
            drawings: what to draw.
            on_event: told of each event of each drawing, from several threads.
            on_outcome: told of each end, from this thread.

        Raises:
            ChromarpcError: the server cannot be reached any more, or lets nobody in.
            Interrupted: the client was closed.
        """
        waiting = list(reversed(list(drawings)))
        running: dict[Future[Outcome], Drawing] = {}
        with ThreadPoolExecutor(self._in_flight, thread_name_prefix="replay") as pool:
            try:
                while waiting or running:
                    while waiting and len(running) < self._in_flight:
                        drawing = waiting.pop()
                        running[pool.submit(self._draw, drawing, on_event)] = drawing
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        on_outcome(running.pop(future), future.result())
            except BaseException:
                self._stop.set()
                for future in running:
                    future.cancel()
                raise

    def _draw(self, drawing: Drawing, on_event: OnEvent) -> Outcome:
        fingerprint = drawing.fingerprint(self._server)
        found = self._pictures.find(fingerprint)
        if found is not None:
            return found
        path = None if drawing.adapter is None else self._path(drawing.adapter)
        if isinstance(path, Failed):
            return path
        try:
            return self._asked(drawing, fingerprint, path, on_event)
        except (AccessDenied, ServerUnavailable):
            raise
        except ChromarpcError as error:
            return Failed(_sentence(error))

    def _asked(self, drawing: Drawing, fingerprint: str, path: str | None, on_event: OnEvent) -> Drawn:
        output, written_as = _OUTPUTS[drawing.suffix]
        adapter = drawing.adapter
        request = build_request(
            Prompt(
                drawing.prompt,
                width=drawing.width,
                height=drawing.height,
                guidance_scale=drawing.guidance_scale,
                sample_steps=drawing.steps,
                seed=drawing.seed,
                neg=drawing.negative_prompt,
            ),
            model=drawing.model,
            profile=drawing.profile,
            loras=[]
            if adapter is None or path is None
            else [Lora(path, adapter.network_multiplier, adapter.sha256)],
            noise_draw=drawing.noise_draw,
            trainer=drawing.trainer,
            output_format=output,
            picture_record=False,
        )
        image, seconds = self._insist(lambda: self._once(drawing, request, on_event))
        data = _encoded(image.data, written_as) if written_as else image.data
        prepared = image.prepared
        return self._pictures.add(
            drawing,
            fingerprint,
            data,
            {
                "warnings": tuple(dict.fromkeys(warning.message for warning in image.warnings)),
                "model_revision": prepared.model_revision if prepared else "",
                "device": prepared.device if prepared else "",
                "versions": dict(prepared.versions) if prepared else {},
                "seconds": seconds,
            },
        )

    def _once(self, drawing: Drawing, request: Any, on_event: OnEvent) -> tuple[GeneratedImage, float]:
        image: GeneratedImage | None = None
        first = last = None
        with self._client.generate_request(request) as stream:
            for event in stream:
                first = first or event.time
                last = event.time
                if isinstance(event, ImageReady):
                    image = event.image
                on_event(drawing, event)
        if image is None or first is None or last is None:
            raise ProtocolError("the server drew no picture")
        return image, max(0.0, (last - first).total_seconds())

    def _insist(self, call: Callable[[], Any]) -> Any:
        """Repeats what fails because the server is full, or away for a moment.

        Raises:
            Interrupted: somebody else's call ended everything, or the client was closed.
        """
        lost = full = cancelled = 0
        while True:
            if self._stop.is_set():
                raise Interrupted
            try:
                return call()
            except (RuntimeError, ValueError) as error:
                if "closed" in f"{error}":  # the client, or its channel in the moment before
                    raise Interrupted from None
                raise
            except ServerUnavailable as error:
                if lost >= len(RETRY_WAITS_S):
                    raise
                delay_s = error.retry_after_s or RETRY_WAITS_S[lost]
                lost += 1
            except Cancelled:  # by a client that is closed, whose next call says so; or by the server
                cancelled += 1
                if cancelled > 1:
                    raise
                delay_s = 0.0
            except (QueueFull, QuotaExceeded) as error:
                if full >= MOST_WAITS or (isinstance(error, QuotaExceeded) and error.retry_after_s is None):
                    raise
                if not full:
                    self._tell(f"waiting: {error.message}")
                full += 1
                delay_s = error.retry_after_s or FULL_WAIT_S
            self._stop.wait(delay_s)

    def _path(self, adapter: Adapter) -> str | Failed:
        """What the server calls an adapter; uploaded if it has no file of this content."""
        with self._adapters_lock:
            known = self._paths.get(adapter.sha256)
            if known is None:
                try:
                    known = self._insist(lambda: self._listed_path(adapter) or self._uploaded_path(adapter))
                except (AccessDenied, ServerUnavailable):
                    raise
                except ChromarpcError as error:
                    known = Failed(_sentence(error))
                except Unreadable as error:
                    known = Failed(f"{error}")
                self._paths[adapter.sha256] = known
            return known

    def _listed_path(self, adapter: Adapter) -> str | None:
        if not self._listed:
            self._listed = True
            for lora in self._client.list_loras():
                if lora.sha256:
                    self._paths.setdefault(lora.sha256, lora.path)
        found = self._paths.get(adapter.sha256)
        return found if isinstance(found, str) else None

    def _uploaded_path(self, adapter: Adapter) -> str:
        self._tell(f"uploading {adapter.name}")
        with self._folder.open(adapter.name) as file:
            return self._client.upload_lora(file, filename=Path(adapter.name).name).path


def _encoded(data: bytes, file_format: str) -> bytes:
    """A picture as Pillow writes it by default, which is how the trainer writes it."""
    target = io.BytesIO()
    with Image.open(io.BytesIO(data)) as picture:
        picture.convert("RGB").save(target, file_format)
    return target.getvalue()


def _sentence(error: ChromarpcError) -> str:
    """An error as a reason: what happened, and which fields."""
    if not isinstance(error, StatusError):
        return error.message
    blamed = [f"{v.field}: {v.description}" if v.field else v.description for v in error.violations]
    extra = [text for text in blamed if text not in error.message]
    if len(extra) == 1 and extra[0].endswith(error.message):
        return extra[0]
    return "; ".join([error.message, *extra])
