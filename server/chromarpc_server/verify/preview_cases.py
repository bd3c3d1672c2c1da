"""`preview/cpu` and `preview/h100`: the trainer's picture on small random models, as the trainer recorded it."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from chromarpc_server.domain.trainer import TRAINER_QTYPES, trainer_size
from chromarpc_server.pipeline import sampling
from chromarpc_server.pipeline.denoising import Text, VelocityMaker
from chromarpc_server.pipeline.models import autoencoder
from chromarpc_server.pipeline.models.text_encoder import PromptEmbedding
from chromarpc_server.pipeline.trainer.arithmetic import TORCH_DTYPES, one_thread, trainer_arithmetic
from chromarpc_server.pipeline.trainer.forward import attended_text
from chromarpc_server.pipeline.weights.quantizers import QUANTIZERS
from chromarpc_server.verify.preview_layout import Kind, PreviewFolder
from chromarpc_server.verify.preview_models import (
    Drawing,
    Model,
    base_version,
    draw,
    embed,
    padded,
    ratio,
    settings_of,
    text_encoder,
)
from chromarpc_server.verify.report import Outcome, Reporter, Result, distance, identical, skipped, within
from chromarpc_server.verify.vectors import Vectors

if TYPE_CHECKING:
    from transformers import T5EncoderModel

CPU = torch.device("cpu")
FLOAT32_REL = 1e-5
TEXT_REL = 2e-2
"""Of text embeddings in bf16 on another machine than theirs."""
UNTOLD_REL = 5e-2
"""Of latents that were recorded without a truth beside them."""
HEAVY_TOKENS_ON_CPU = 2048
IMAGE_MAX, ELSEWHERE_IMAGE_MAX = 1.0, 8.0
"""Of one value of a picture decoded in float32, and in bf16 on another machine than theirs."""


def run(found: PreviewFolder, device: torch.device, reporter: Reporter) -> None:
    """Every case of the folder."""
    for path in found.unknown_files():
        reporter.add(Result(f"{found.kind}/{path.name}", Outcome.FAIL, note="this file is not understood"))
    cases = _Cases(found, device, reporter)
    # The models of a CPU's vectors are so small that further threads only wait for each other.
    with one_thread() if found.kind is Kind.CPU else nullcontext():
        _run(found.folder, found.kind, cases, reporter)


def _run(folder: Path, kind: Kind, cases: _Cases, reporter: Reporter) -> None:
    for name, check in (
        ("quantized", cases.quantized),
        ("text", cases.text),
        ("forward", cases.forward),
        ("noise", cases.noise),
        ("sampling", cases.sampling),
    ):
        if (folder / f"{name}.safetensors").is_file():
            reporter.guarded(f"{kind}/{name}", check)
    if (folder / "sizes.json").is_file():
        reporter.guarded(f"{kind}/sizes", cases.sizes)


class _Cases:
    """The cases of one folder."""

    def __init__(self, found: PreviewFolder, device: torch.device, reporter: Reporter) -> None:
        self._folder = found.folder
        self._name = str(found.kind)
        self._is_gpu = found.kind is Kind.GPU
        # Vectors of a CPU are compared on a CPU, whatever else is there.
        self._device = device if self._is_gpu else CPU
        self._reporter = reporter
        self._differs: str | None = None

    def _read(self, name: str) -> Vectors:
        return Vectors.read(self._folder / f"{name}.safetensors")

    def quantized(self) -> None:
        """Weights of every quantizer, bit for bit."""
        vectors = self._read("quantized")
        model = self._read("transformer").tensors if (self._folder / "transformer.safetensors").is_file() else {}
        base = {
            **{name.removesuffix(".weight"): tensor for name, tensor in model.items()},
            **vectors.under("base."),
        }
        recorded: dict[str, dict[str, Tensor]] = {}
        for name, tensor in vectors.tensors.items():
            qtype, _, rest = name.partition(".")
            module, _, what = rest.rpartition(".")
            if qtype != "base":
                recorded.setdefault(qtype, {})[f"{module} {what}"] = tensor
        for qtype, tensors in recorded.items():
            case = f"{self._name}/quantized/{qtype}"
            if qtype not in TRAINER_QTYPES:
                self._reporter.add(skipped(case, "known, and not built: requests for it are refused by name"))
                continue
            self._reporter.add(_quantized(case, qtype, tensors, base))

    def text(self) -> None:
        """Masks and embeddings."""
        vectors, encoder = self._read("text"), self._read("t5")
        models: dict[str, T5EncoderModel] = {}
        for number in vectors.cases():
            for name, tensor in vectors.of(number).items():
                case = f"{self._name}/text/{number}/{name}"
                if name == "attended":
                    found = attended_text(vectors.tensors[f"{number}.mask"], torch.bfloat16)
                    self._reporter.add(identical(case, found, tensor))
                if not name.endswith(".embeds"):
                    continue
                qtype = name.removesuffix(".embeds").removesuffix("_float32")
                settings = settings_of(qtype, "float32" if "_float32" in name else "bf16")
                model = models.get(name)
                if model is None:
                    model = models[name] = text_encoder(encoder, settings, self._device)
                embeds = embed(model, vectors.tensors[f"{number}.input_ids"], settings)
                self._reporter.add(self._compared_text(case, embeds[:, : tensor.shape[1]].cpu(), tensor))

    def _compared_text(self, case: str, found: Tensor, expected: Tensor) -> Result:
        if expected.dtype == torch.float32:
            return within(case, found, expected, FLOAT32_REL)
        differs = self._not_recorded_here()
        if differs:
            return within(case, found, expected, TEXT_REL, f"not bit for bit: {differs}")
        return identical(case, found, expected)

    def forward(self) -> None:
        """One velocity with the adapter beside the weights, whatever they are quantized to."""
        vectors, model = self._read("forward"), Model.read(self._folder)
        runs = sorted({name.rsplit(".", 2)[0] for name in vectors.tensors if name.endswith(".out")})
        for run_name in runs:
            for number in vectors.cases():
                if f"{run_name}.{number}.out" in vectors.tensors:
                    self._forward(vectors, model, run_name, number)

    def _forward(self, vectors: Vectors, model: Model, run_name: str, number: str) -> None:
        case = f"{self._name}/forward/{run_name}/{number}"
        recorded, truth = (vectors.tensors[f"{run_name}.{number}.{what}"] for what in ("out", "truth"))
        found = forward_once(vectors, model, run_name, number, exact=True)
        if recorded.dtype == torch.float32:
            self._reporter.add(within(f"{case} exact", found, recorded, FLOAT32_REL))
        else:
            self._add_exact(case, found, recorded)
        wide = forward_once(vectors, model, run_name, number, exact=False, dtype=torch.float32, rounds=False)
        self._reporter.add(within(f"{case} fused", wide, truth, FLOAT32_REL, "float32, from the truth"))
        if recorded.dtype != torch.float32:
            served = forward_once(vectors, model, run_name, number, exact=False, dtype=torch.float32)
            self._reporter.add(ratio(f"{case} served", served, recorded, truth))

    def _add_exact(self, case: str, found: Tensor, recorded: Tensor) -> None:
        differs = self._not_recorded_here()
        if differs:
            rel, _ = distance(found, recorded)
            self._reporter.add(skipped(f"{case} exact", f"{differs}; {rel:.3g} from the recorded output"))
        else:
            self._reporter.add(identical(f"{case} exact", found, recorded))

    def noise(self) -> None:
        """What a seed draws, bit for bit."""
        for name, expected in self._read("noise").tensors.items():
            seed, size, dtype = name.split(".")
            width, height = (trainer_size(int(side)) for side in size.split("x"))
            found = sampling.draw_noise(width, height, int(seed), getattr(torch, dtype), "float32")
            self._reporter.add(identical(f"{self._name}/noise/{name}", found, expected))

    def sizes(self) -> None:
        """What sizes are floored to."""
        for entry in json.loads((self._folder / "sizes.json").read_text(encoding="utf-8")):
            asked = entry["width"], entry["height"]
            found = [trainer_size(side) for side in asked]
            outcome = Outcome.PASS if found == entry["image"] else Outcome.FAIL
            case = f"{self._name}/sizes/{asked[0]}x{asked[1]}"
            self._reporter.add(Result(case, outcome, note=f"{found[0]}x{found[1]}"))

    def sampling(self) -> None:
        """Whole pictures."""
        vectors, model = self._read("sampling"), Model.read(self._folder)
        runs = json.loads(vectors.metadata["runs"])
        runs = (
            dict(enumerate(runs)) if isinstance(runs, list) else {int(key): value for key, value in runs.items()}
        )
        for name, recorded in vectors.tensors.items():
            if not name.endswith(".latents"):
                continue
            key, _, number = name.removesuffix(".latents").rpartition(".")
            if key == "float32_adapter":
                held = Model.read(self._folder, "lora_float32.safetensors")
                self._sample(vectors, held, "qfloat8.bf16", runs, int(number), recorded, label=key)
            else:
                self._sample(vectors, model, key, runs, int(number), recorded, label=key)

    def _sample(
        self,
        vectors: Vectors,
        model: Model,
        key: str,
        runs: Mapping[int, dict[str, object]],
        number: int,
        recorded: Tensor,
        *,
        label: str,
    ) -> None:
        case = f"{self._name}/sampling/{label}/{number}"
        qtype, _, dtype = key.partition(".")
        settings = settings_of(qtype, dtype or "bf16")
        width = TORCH_DTYPES[settings.dtype]
        tokens = recorded.shape[1]
        if self._device.type == "cpu" and tokens > HEAVY_TOKENS_ON_CPU:
            self._reporter.add(skipped(case, f"{tokens} image tokens are heavy on a CPU"))
            return
        drawing = self._drawing(vectors, key, runs[number], number)
        differs = self._not_recorded_here()
        truth = vectors.tensors.get(f"{key}.{number}.truth") if label == key else None
        if width == torch.float32:
            found = draw(model.exact(settings, drawing.multiplier, self._device), drawing, self._device, width)
            self._reporter.add(within(f"{case} exact", found, recorded, FLOAT32_REL))
        elif differs:
            self._reporter.add(skipped(f"{case} exact", differs))
            found = recorded
        else:
            found = draw(model.exact(settings, drawing.multiplier, self._device), drawing, self._device, width)
            self._reporter.add(identical(f"{case} exact", found, recorded))
        if label != key:
            return
        self._fused(case, model, drawing, key, recorded, truth)
        self._image(vectors, case, key, number, found, drawing)

    def _fused(
        self, case: str, model: Model, drawing: Drawing, key: str, recorded: Tensor, truth: Tensor | None
    ) -> None:
        """As it serves, as close to the truth as the trainer; on a CPU also without the trainer's rounding."""
        qtype, _, dtype = key.partition(".")
        settings = settings_of(qtype, dtype or "bf16")
        if self._device.type == "cuda" and settings.dtype == "bfloat16":
            fused = model.fused(settings, drawing.multiplier, self._device, torch.bfloat16)
            found = draw(fused, drawing, self._device, torch.bfloat16)
            if truth is not None:
                self._reporter.add(ratio(f"{case} fused", found, recorded, truth))
                return
        else:
            wide = model.fused(settings, drawing.multiplier, CPU, torch.float32, torch.float32)
            found = draw(wide, drawing, CPU, torch.float32)
            if truth is not None:
                self._reporter.add(within(f"{case} fused", found, truth, FLOAT32_REL, "float32, from the truth"))
                if settings.dtype == "bfloat16":
                    served = draw(
                        model.fused(settings, drawing.multiplier, CPU, torch.float32), drawing, CPU, torch.float32
                    )
                    self._reporter.add(ratio(f"{case} served", served, recorded, truth))
                return
        self._reporter.add(within(f"{case} fused", found, recorded, UNTOLD_REL, "from the recorded: no truth is"))

    def _drawing(self, vectors: Vectors, key: str, run: Mapping[str, object], number: int) -> Drawing:
        resolved = run.get("resolved", run)
        if not isinstance(resolved, dict):
            raise TypeError("a run that resolves to nothing")
        width, height = resolved.get("image") or [trainer_size(resolved[side]) for side in ("width", "height")]
        tensors = vectors.tensors
        if f"{key}.{number}.prompt_embeds" in tensors:
            texts = [padded(tensors[f"{key}.{number}.{what}_embeds"]) for what in ("prompt", "neg")]
        else:
            texts = [self._embedded(vectors, key, str(resolved[what])) for what in ("prompt", "negative_prompt")]
        return Drawing(
            width=width,
            height=height,
            steps=int(resolved["steps"] if "steps" in resolved else resolved["num_inference_steps"]),
            guidance_scale=float(resolved["guidance_scale"]),
            multiplier=float(resolved["network_multiplier"]),
            noise=tensors[f"{key}.{number}.noise"],
            embedding=PromptEmbedding(*texts[0], *texts[1]),
        )

    def _embedded(self, vectors: Vectors, key: str, prompt: str) -> tuple[Tensor, Tensor]:
        """A text's embeddings: as recorded, for the quantizer that they are of; else from its tokens."""
        index = json.loads(vectors.metadata["prompts"]).index(prompt)
        ids = vectors.tensors[f"text.{index}.input_ids"]
        mask = (ids != 0).long()
        settings = settings_of(key)
        if key == "qfloat8" or not (self._folder / "t5.safetensors").is_file():
            return vectors.tensors[f"text.{index}.embeds"], mask
        encoder = text_encoder(self._read("t5"), settings, self._device)
        return embed(encoder, ids, settings).cpu(), mask

    def _image(
        self, vectors: Vectors, case: str, key: str, number: int, latents: Tensor, drawing: Drawing
    ) -> None:
        expected = vectors.tensors.get(f"{key}.{number}.image")
        if expected is None or not (self._folder / "vae.safetensors").is_file():
            return
        settings = settings_of(*key.split("."))
        model = self._read("vae").autoencoder(self._device, TORCH_DTYPES[settings.dtype])
        unpacked = sampling.unpack(latents.to(self._device), drawing.width, drawing.height)
        with trainer_arithmetic(self._device, settings):
            pixels = autoencoder.to_pixels(autoencoder.decode(model, unpacked))
        differs = self._not_recorded_here()
        found = torch.from_numpy(pixels)
        rel, largest = distance(found, expected)
        allowed = IMAGE_MAX if settings.dtype == "float32" else ELSEWHERE_IMAGE_MAX if differs else 0.0
        outcome = Outcome.PASS if largest <= allowed else Outcome.FAIL
        self._reporter.add(Result(f"{case} image", outcome, rel, largest, f"max {allowed:g}"))
        recorded = vectors.tensors.get(f"jpeg.{number}")
        if recorded is not None and key == "qfloat8.bf16":
            written = io.BytesIO()
            Image.fromarray(expected.numpy()).save(written, "JPEG")
            same = written.getvalue() == recorded.numpy().tobytes()
            outcome = Outcome.PASS if same else Outcome.FAIL
            self._reporter.add(Result(f"{case} jpeg", outcome, tolerance="exact", note="of the recorded pixels"))

    def _not_recorded_here(self) -> str:
        """Empty where the exact form must equal the vectors bit for bit, else what differs here."""
        if self._differs is None:
            self._differs = self._compare_machine()
        return self._differs

    def _compare_machine(self) -> str:
        names = ("sampling", "text", "forward", "transformer")
        path = next(name for name in names if (self._folder / f"{name}.safetensors").is_file())
        metadata = self._read(path).metadata
        recorded = metadata.get("torch", "")
        if base_version(recorded) != base_version(torch.__version__):
            return f"recorded with torch {recorded}, this is {torch.__version__}"
        if self._is_gpu:
            gpu = metadata.get("gpu")
            if self._device.type != "cuda":
                return f"recorded on {gpu}, this is a CPU"
            here = torch.cuda.get_device_name(self._device)
            return "" if here == gpu else f"recorded on {gpu}, this is {here}"
        return self._compare_first_product()

    def _compare_first_product(self) -> str:
        """Whether this CPU sums a bf16 product in the order of the one that recorded."""
        if not (self._folder / "forward.safetensors").is_file():
            return "no forward.safetensors tells whether this CPU sums in the same order"
        vectors, model = self._read("forward"), Model.read(self._folder)
        run_name = "qfloat8.bf16.1.0"
        if f"{run_name}.0.out" not in vectors.tensors:
            return "no recorded product tells whether this CPU sums in the same order"
        found = forward_once(vectors, model, run_name, "0", exact=True)
        same = torch.equal(found, vectors.tensors[f"{run_name}.0.out"])
        return "" if same else "this CPU sums a bf16 product in another order than the one that recorded"


def forward_once(
    vectors: Vectors,
    model: Model,
    run_name: str,
    number: str,
    *,
    exact: bool,
    dtype: torch.dtype | None = None,
    rounds: bool = True,
) -> Tensor:
    """One recorded case's velocity, on the CPU.

    Args:
        vectors: `forward`.
        model: whose.
        run_name: `QTYPE.DTYPE.MULTIPLIER`.
        number: of the case.
        exact: in the `preview-exact` profile, else in `preview`.
        dtype: to compute in, if another than the trainer's.
        rounds: whether `preview` rounds what it rounds as the trainer does.
    """
    qtype, name, multiplier = run_name.split(".", 2)
    settings = settings_of(qtype, name)
    # The recorded adapter is beside the weights whether they are quantized or not.
    if qtype == "none":
        settings = settings_of("uint8", name)
    width = dtype or TORCH_DTYPES[settings.dtype]
    case = vectors.of(number)
    if exact:
        made: VelocityMaker = model.exact(settings, float(multiplier), CPU)
    else:
        made = model.fused(settings, float(multiplier), CPU, width, None if rounds else width)
    text = Text(case["txt"].to(width), case["mask"])
    rounding = TORCH_DTYPES[settings.dtype]
    timestep = case["timestep"].to(rounding).to(width) / 1000
    grid = (int(case["grid"][0]), int(case["grid"][1]))
    with torch.inference_mode():
        velocity = made.velocity([text], timestep, grid)
        found, _ = velocity(case["img"].to(width), 0)
    return found


def _quantized(case: str, qtype: str, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Result:
    """One quantizer's recorded weights: dequantized, and float8 codes times their scales."""
    wrong, count = [], 0
    for name, expected in tensors.items():
        module, _, what = name.partition(" ")
        if module not in base:
            return Result(case, Outcome.FAIL, note=f"no weight of {module} is recorded")
        found = QUANTIZERS[qtype].quantize(base[module])
        if what == "dequantized":
            same = torch.equal(found.dequantized, expected)
        elif what == "codes" and found.codes is not None:
            same = torch.equal(found.codes[0].view(torch.uint8), expected.view(torch.uint8))
        elif what == "scale" and found.codes is not None:
            same = torch.equal(found.codes[1], expected.flatten())
        else:
            continue
        count += 1
        if not same:
            wrong.append(name)
    outcome = Outcome.FAIL if wrong or not count else Outcome.PASS
    return Result(case, outcome, tolerance="exact", note=", ".join(wrong[:3]) or f"{count} tensors")
