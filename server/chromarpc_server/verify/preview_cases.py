"""`preview/cpu` and `preview/h100`: the trainer's image on small random models, as the trainer recorded it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from chromarpc_server.domain.trainer import TRAINER_QTYPES, trainer_size
from chromarpc_server.pipeline import sampling
from chromarpc_server.pipeline.trainer.arithmetic import one_thread
from chromarpc_server.pipeline.trainer.forward import attended_text
from chromarpc_server.pipeline.weights.quantizers import QUANTIZERS
from chromarpc_server.verify.preview_layout import Kind, PreviewFolder
from chromarpc_server.verify.preview_models import (
    FLOAT32_REL,
    Model,
    embed,
    forward_once,
    ratio,
    settings_of,
    text_encoder,
)
from chromarpc_server.verify.preview_sampling import SamplingCases
from chromarpc_server.verify.preview_vectors import PreviewVectors
from chromarpc_server.verify.report import Outcome, Reporter, Result, distance, identical, skipped, within
from chromarpc_server.verify.vectors import Vectors

if TYPE_CHECKING:
    from transformers import T5EncoderModel

TEXT_REL = 2e-2
"""Of text embeddings in bf16 on another machine than theirs."""


def run(found: PreviewFolder, device: torch.device, reporter: Reporter) -> None:
    """Every case of the folder."""
    for path in found.unknown_files():
        reporter.add(Result(f"{found.kind}/{path.name}", Outcome.FAIL, note="this file is not understood"))
    given = PreviewVectors.of(found, device)
    # The models of a CPU's vectors are so small that further threads only wait for each other.
    with one_thread() if found.kind is Kind.CPU else nullcontext():
        _run(given, reporter)


def _run(given: PreviewVectors, reporter: Reporter) -> None:
    cases = _Cases(given, reporter)
    for name, check in (
        ("quantized", cases.quantized),
        ("text", cases.text),
        ("forward", cases.forward),
        ("noise", cases.noise),
        ("sampling", SamplingCases(given, reporter).run),
    ):
        if given.has(name):
            reporter.guarded(f"{given.kind}/{name}", check)
    if (given.folder / "sizes.json").is_file():
        reporter.guarded(f"{given.kind}/sizes", cases.sizes)


class _Cases:
    """The cases of one folder."""

    def __init__(self, given: PreviewVectors, reporter: Reporter) -> None:
        self._given = given
        self._reporter = reporter

    def quantized(self) -> None:
        """Weights of every quantizer, bit for bit."""
        vectors = self._given.read("quantized")
        model = self._given.read("transformer").tensors if self._given.has("transformer") else {}
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
            case = f"{self._given.kind}/quantized/{qtype}"
            if qtype not in TRAINER_QTYPES:
                self._reporter.add(skipped(case, "known, and not built: requests for it are refused by name"))
                continue
            self._reporter.add(_quantized(case, qtype, tensors, base))

    def text(self) -> None:
        """Masks and embeddings."""
        vectors, encoder = self._given.read("text"), self._given.read("t5")
        models: dict[str, T5EncoderModel] = {}
        for number in vectors.cases():
            for name, tensor in vectors.of(number).items():
                case = f"{self._given.kind}/text/{number}/{name}"
                if name == "attended":
                    found = attended_text(vectors.tensors[f"{number}.mask"], torch.bfloat16)
                    self._reporter.add(identical(case, found, tensor))
                if not name.endswith(".embeds"):
                    continue
                qtype = name.removesuffix(".embeds").removesuffix("_float32")
                settings = settings_of(qtype, "float32" if "_float32" in name else "bf16")
                model = models.get(name)
                if model is None:
                    model = models[name] = text_encoder(encoder, settings, self._given.device)
                embeds = embed(model, vectors.tensors[f"{number}.input_ids"], settings)
                self._reporter.add(self._compared_text(case, embeds[:, : tensor.shape[1]].cpu(), tensor))

    def _compared_text(self, case: str, found: Tensor, expected: Tensor) -> Result:
        if expected.dtype == torch.float32:
            return within(case, found, expected, FLOAT32_REL)
        differs = self._given.differs
        if differs:
            return within(case, found, expected, TEXT_REL, f"not bit for bit: {differs}")
        return identical(case, found, expected)

    def forward(self) -> None:
        """One velocity with the adapter beside the weights, whatever they are quantized to."""
        vectors, model = self._given.read("forward"), Model.read(self._given.folder)
        runs = sorted({name.rsplit(".", 2)[0] for name in vectors.tensors if name.endswith(".out")})
        for run_name in runs:
            for number in vectors.cases():
                if f"{run_name}.{number}.out" in vectors.tensors:
                    self._forward(vectors, model, run_name, number)

    def _forward(self, vectors: Vectors, model: Model, run_name: str, number: str) -> None:
        case = f"{self._given.kind}/forward/{run_name}/{number}"
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
        differs = self._given.differs
        if differs:
            rel, _ = distance(found, recorded)
            self._reporter.add(skipped(f"{case} exact", f"{differs}; {rel:.3g} from the recorded output"))
        else:
            self._reporter.add(identical(f"{case} exact", found, recorded))

    def noise(self) -> None:
        """What a seed draws, bit for bit."""
        for name, expected in self._given.read("noise").tensors.items():
            seed, size, dtype = name.split(".")
            width, height = (trainer_size(int(side)) for side in size.split("x"))
            found = sampling.draw_noise(width, height, int(seed), getattr(torch, dtype), "float32")
            self._reporter.add(identical(f"{self._given.kind}/noise/{name}", found, expected))

    def sizes(self) -> None:
        """What sizes are floored to."""
        for entry in json.loads((self._given.folder / "sizes.json").read_text(encoding="utf-8")):
            asked = entry["width"], entry["height"]
            found = [trainer_size(side) for side in asked]
            outcome = Outcome.PASS if found == entry["image"] else Outcome.FAIL
            case = f"{self._given.kind}/sizes/{asked[0]}x{asked[1]}"
            self._reporter.add(Result(case, outcome, note=f"{found[0]}x{found[1]}"))


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
