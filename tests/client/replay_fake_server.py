"""A server that draws for `chromarpc replay`, and run folders that it would draw: both by one function."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import yaml
from PIL import Image, ImageDraw

from chromarpc.v1 import lora_service_pb2, lora_service_pb2_grpc, model_service_pb2, options_pb2
from tests.client.client_fake_server import FakeServer, JobEvent, Request, Story

FLOAT32, LEGACY = options_pb2.NOISE_DRAW_FLOAT32, options_pb2.NOISE_DRAW_LEGACY
TIME_MS = 1_795_648_911_717
"""2026-11-25: today's noise draw."""
OLD_TIME_MS = 1_748_000_000_000
"""2025-05-23: the legacy one."""


def picture(
    *, prompt: str, neg: str = "", width: int = 64, height: int = 64, seed: int = 42, steps: int = 2,
    guidance_scale: float = 4, noise_draw: int = FLOAT32, adapter: str = "", multiplier: float = 1,
) -> Image.Image:  # fmt: skip
    """Another picture for each argument: a gradient and a disc in colours that come of them."""
    facts = json.dumps([prompt, neg, seed, steps, float(guidance_scale), noise_draw, adapter, float(multiplier)])
    value = hashlib.sha256(facts.encode()).digest()
    size = (max(64, width - width % 8) // 16 * 16, max(64, height - height % 8) // 16 * 16)
    drawn = Image.merge(
        "RGB", [Image.linear_gradient("L").rotate(90 * (value[k] % 4)).resize(size) for k in range(3)]
    )
    box = (value[3] % 32, value[4] % 32, 32 + value[5] % 32, 32 + value[6] % 32)
    ImageDraw.Draw(drawn).ellipse(box, fill=(value[7], value[8], value[9]))
    return drawn


def trainer_jpeg(drawn: Image.Image) -> bytes:
    """As the trainer writes it."""
    file = io.BytesIO()
    drawn.save(file, "JPEG")
    return file.getvalue()


def safetensors(step: int | None = None, *, base_model: str = "chroma", content: bytes = b"") -> bytes:
    """An adapter file with nothing in it but its header."""
    metadata: dict[str, str] = {"ss_base_model_version": base_model} if base_model else {}
    if step is not None:
        metadata["training_info"] = json.dumps({"step": step, "epoch": 0})
    header = json.dumps({"__metadata__": metadata}).encode()
    return struct.pack("<Q", len(header)) + header + content


@dataclass
class Run:
    """Writes a run folder; what is asked for is drawn as `picture` draws it."""

    path: Path
    name: str = "my_run"
    sample: dict[str, Any] = field(default_factory=dict)
    process: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    network: dict[str, Any] | None = field(default_factory=lambda: {"type": "lora", "linear": 8})
    train: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        process: dict[str, Any] = {
            "type": "sd_trainer",
            "train": {"dtype": "bf16", "steps": 500} | self.train,
            "save": {"save_every": 250, "max_step_saves_to_keep": 4},
            "model": {"name_or_path": "models/chroma-mini.safetensors", "arch": "chroma", "quantize": True}
            | self.model,
            "sample": {
                "width": 64, "height": 64, "neg": "", "seed": 42, "walk_seed": True, "guidance_scale": 4,
                "sample_steps": 2, "sample_every": 250, "prompts": ["a red circle", "a green square"],
            } | self.sample,
        }  # fmt: skip
        if self.network is not None:
            process["network"] = self.network
        return {"job": "extension", "config": {"name": self.name, "process": [process | self.process]}}

    def write_config(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "config.yaml").write_text(yaml.safe_dump(self.config, sort_keys=False))

    def write_adapter(self, name: str, step: int | None, **more: Any) -> str:
        """Writes an adapter; its SHA-256."""
        self.path.mkdir(parents=True, exist_ok=True)
        content = safetensors(step, **more)
        (self.path / name).write_bytes(content)
        return hashlib.sha256(content).hexdigest()

    def write_sample(
        self, step: int, index: int, data: bytes, *, time_ms: int = TIME_MS, suffix: str = "jpg"
    ) -> Path:
        path = self.path / "samples" / f"{time_ms + step * 100 + index}__{step:09d}_{index}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def write_all(self, steps: Sequence[int] = (0, 250, 500), **more: Any) -> dict[int, str]:
        """Config, adapters and samples of an ordinary run; the adapters' SHA-256 by step."""
        self.write_config()
        hashes = {}
        for step in steps:
            if step:
                name = f"{self.name}.safetensors" if step == 500 else f"{self.name}_{step:09d}.safetensors"
                hashes[step] = self.write_adapter(name, step)
            for index, prompt in enumerate(self.config["config"]["process"][0]["sample"]["prompts"]):
                drawn = picture(prompt=prompt, seed=42 + index, adapter=hashes.get(step, ""), **more)
                self.write_sample(step, index, trainer_jpeg(drawn))
        return hashes


@dataclass
class DrawingServer(FakeServer):
    """Draws by `picture`; keeps uploads."""

    retouch: Callable[[Image.Image, Request], Image.Image] = lambda drawn, request: drawn
    before: Callable[[Request, Any], None] = lambda request, context: None
    """Called with each request; may abort it."""
    profiles: Sequence[str] = ("reference", "preview", "preview-exact")
    models: Sequence[str] = ("chroma", "chroma-mini")
    base_names: Mapping[str, str] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    root: dict[str, str] = field(default_factory=dict)
    """SHA-256 of files below the adapter root, by path."""
    upload_calls: list[str] = field(default_factory=list)
    limits: dict[str, int] = field(default_factory=lambda: {"max_streams": 1024, "max_queued_jobs": 32})
    at_once: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.script = self.draw

    def draw(self, request: Request, context: Any) -> Iterator[JobEvent]:
        with self.lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            self.before(request, context)
            story = Story()
            yield story.accepted(request)
            yield story.prepared(request)
            prompt, lora = request.prompts[0], request.loras[0] if request.loras else None
            drawn = picture(
                prompt=prompt.prompt, neg=prompt.neg, width=prompt.width, height=prompt.height, seed=prompt.seed,
                steps=prompt.sample_steps, guidance_scale=prompt.guidance_scale, noise_draw=request.noise_draw,
                adapter=self.content_of(lora.path) if lora else "",
                multiplier=lora.network_multiplier if lora else 1,
            )  # fmt: skip
            drawn = self.retouch(drawn, request)
            if request.output.format == options_pb2.IMAGE_FORMAT_JPEG_TRAINER:
                data, media_type = trainer_jpeg(drawn), "image/jpeg"
            else:
                file = io.BytesIO()
                drawn.save(file, "PNG")
                data, media_type = file.getvalue(), "image/png"
            yield story.step(0, 1)
            yield story.header(data, media_type=media_type, width=drawn.width, height=drawn.height)
            yield story.chunk(data)
            yield story.completed(1)
        finally:
            with self.lock:
                self.at_once -= 1

    def content_of(self, path: str) -> str:
        return path.removeprefix("sha256:") if path.startswith("sha256:") else self.root[path]

    def ListModels(self, request: Any, context: Any) -> model_service_pb2.ListModelsResponse:  # noqa: N802
        models = [
            model_service_pb2.Model(
                id=name,
                base_checkpoint=f"org/{name}",
                base_name=self.base_names.get(name, ""),
                weights_present=True,
            )
            for name in self.models
        ]
        return model_service_pb2.ListModelsResponse(models=models)

    def GetServerInfo(self, request: Any, context: Any) -> model_service_pb2.GetServerInfoResponse:  # noqa: N802
        return model_service_pb2.GetServerInfoResponse(
            version="1.2.3",
            device=model_service_pb2.Device(id="cpu", name="a CPU", dtype="bfloat16"),
            profiles=[model_service_pb2.Profile(id=name) for name in self.profiles],
            limits=model_service_pb2.Limits(**self.limits),
        )

    def ListLoras(self, request: Any, context: Any) -> lora_service_pb2.ListLorasResponse:  # noqa: N802
        loras = [lora_service_pb2.StoredLora(path=path, sha256=sha256) for path, sha256 in self.root.items()]
        loras += [lora_service_pb2.StoredLora(path=f"sha256:{one}", sha256=one) for one in self.uploads]
        return lora_service_pb2.ListLorasResponse(loras=loras)

    def CreateLoraUpload(self, request: Any, context: Any) -> lora_service_pb2.CreateLoraUploadResponse:  # noqa: N802
        self.upload_calls.append(request.filename)
        return lora_service_pb2.CreateLoraUploadResponse(upload_id=request.sha256, max_chunk_bytes=2**20)

    def AppendLoraUpload(self, request: Any, context: Any) -> lora_service_pb2.AppendLoraUploadResponse:  # noqa: N802
        self.uploads[request.upload_id] = self.uploads.get(request.upload_id, b"") + request.chunk
        return lora_service_pb2.AppendLoraUploadResponse(next_offset=len(self.uploads[request.upload_id]))

    def FinalizeLoraUpload(self, request: Any, context: Any) -> lora_service_pb2.FinalizeLoraUploadResponse:  # noqa: N802
        assert hashlib.sha256(self.uploads[request.upload_id]).hexdigest() == request.sha256
        path = f"sha256:{request.sha256}"
        return lora_service_pb2.FinalizeLoraUploadResponse(
            lora=lora_service_pb2.StoredLora(path=path, sha256=request.sha256)
        )

    def __getattr__(self, name: str) -> Any:
        if name in ("InspectLora", "DeleteLora"):  # the generated code asks for every method
            return None
        raise AttributeError(name)

    def add_services(self, server: grpc.Server) -> None:
        lora_service_pb2_grpc.add_LoraServiceServicer_to_server(self, server)  # type: ignore[arg-type]


def report(out: Path) -> dict[str, Any]:
    """The facts of a report."""
    facts: dict[str, Any] = json.loads((out / "report.json").read_text("utf-8"))
    return facts
