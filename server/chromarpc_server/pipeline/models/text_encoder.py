"""Prompts to embeddings: the tokenizer and the T5 encoder.

T5 runs over all 512 tokens without an attention mask, so the padding changes the embeddings; that is the
reference's function, and slicing comes after it, never before.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import normalizers, pre_tokenizers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from chromarpc_server.domain.errors import WeightsInvalid
from chromarpc_server.domain.fallbacks import DeviceFallback, Part
from chromarpc_server.pipeline.fallbacks import unusable
from chromarpc_server.pipeline.libraries import ONE_BUILDER, libraries
from chromarpc_server.pipeline.memory import pin
from chromarpc_server.pipeline.models.encoder_layers import Float8Linear, HostEmbedding, ScaledLinear
from chromarpc_server.pipeline.precision import float32_products
from chromarpc_server.pipeline.recording import recording
from chromarpc_server.pipeline.weights.formats.text_encoder import EMBED, SHARED
from chromarpc_server.pipeline.weights.quantization import FLOAT8
from chromarpc_server.pipeline.weights.quantizers import QuantizedLinear, reference_float8
from chromarpc_server.pipeline.weights.reading import read_json, require_same_keys, tokenizer_file
from chromarpc_server.pipeline.weights.stored import StoredTensor
from chromarpc_server.pipeline.weights.tensor_file import shown

if TYPE_CHECKING:
    from transformers import T5Config, T5EncoderModel

log = logging.getLogger(__name__)

MAX_TOKENS = 512
PAD, END = 0, 1
EMBEDDINGS = (SHARED, EMBED)
"""The names of the one embedding, in files and in the model."""


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt as the text encoder takes it."""

    ids: Tensor = field(repr=False)
    """(1, L) int64: pieces, the end mark, padding; L is 512, or what a prompt without padding has."""
    mask: Tensor = field(repr=False)
    """(1, L) int64, 1 for real tokens; without padding for all."""
    token_count: int
    """Real tokens, with the end mark."""
    cut_count: int
    """Tokens that did not fit."""
    weights: tuple[float, ...] = field(repr=False, default=())
    """(L), where any is not 1."""
    padded: bool = True
    """To 512, as the empty prompt beside it is then."""


@dataclass(frozen=True)
class PromptEmbedding:
    """Conditional and unconditional text, as the transformer takes them."""

    embeds: Tensor = field(repr=False)
    """(1, L, context); L is 512, or what a text without padding has."""
    mask: Tensor = field(repr=False)
    """(1, L)."""
    unconditional_embeds: Tensor = field(repr=False)
    """(1, L, context): of the empty prompt, or of the negative one where it is honoured."""
    unconditional_mask: Tensor = field(repr=False)
    """(1, L)."""


class Tokenizer:
    """T5's tokenizer, truncating at 511 pieces and the end mark, padding to 512."""

    def __init__(self, place: Path, *, as_trainer: bool = False, vocabulary: int | None = None) -> None:
        """Reads tokenizer.json.

        Args:
            place: the file, or a folder with it: see `tokenizer_file`.
            as_trainer: as transformers 5 has it, which ai-toolkit draws with: vocabulary, special tokens and
                characters' replacements are the file's, and white space separates words whatever the file says of
                it. Where it does not there, spaces in a row or at the end, tabs and line ends give other ids.
            vocabulary: how many pieces the text encoder knows, which is looked at where it is given.

        Raises:
            WeightsInvalid: it cannot be used, or gives pieces that the text encoder does not know.
        """
        path = tokenizer_file(place)
        try:
            self._tokenizer = FastTokenizer.from_file(str(path))
            if as_trainer:
                self._tokenizer.normalizer = _replacements(read_json(path))
                self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                    [
                        pre_tokenizers.WhitespaceSplit(),
                        pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True),
                    ]
                )
        except Exception as error:  # noqa: BLE001 - the library raises a bare Exception
            raise WeightsInvalid(f"tokenizer.json cannot be used: {error}") from None
        known = self._tokenizer.get_vocab_size()
        if vocabulary is not None and known > vocabulary:
            raise WeightsInvalid(
                f"{path.name} has {known} pieces, and the text encoder knows {vocabulary}: "
                "they are of different models"
            )
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def __call__(self, prompt: str) -> TokenizedPrompt:
        """Tokenizes one prompt."""
        pieces = self.pieces(prompt)
        kept = pieces[: MAX_TOKENS - 1]
        count = len(kept) + 1
        ids = torch.full((1, MAX_TOKENS), PAD, dtype=torch.int64)
        ids[0, :count] = torch.tensor([*kept, END])
        mask = (torch.arange(MAX_TOKENS)[None] < count).to(torch.int64)
        return TokenizedPrompt(ids, mask, count, len(pieces) - len(kept))

    def pieces(self, text: str) -> list[int]:
        """Ids of a text, with nothing cut off and nothing put behind it."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def _replacements(tokenizer: Mapping[str, Any]) -> normalizers.Normalizer:
    """The replacements of characters in a tokenizer.json, without whatever else it has done to a prompt."""
    whole = tokenizer.get("normalizer") or {}
    parts = whole.get("normalizers", []) if whole.get("type") == "Sequence" else [whole]
    maps = [part["precompiled_charsmap"] for part in parts if part.get("type") == "Precompiled"]
    return normalizers.Sequence([normalizers.Precompiled(base64.b64decode(found)) for found in maps[:1] if found])


def _reference_float8(_: str, weight: Tensor) -> QuantizedLinear:
    return reference_float8(weight)


def build_text_encoder(
    config: T5Config,
    weights: Mapping[str, Tensor | StoredTensor],
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantize: bool,
    rounding: torch.dtype | None = None,
    quantizer: Callable[[str, Tensor], QuantizedLinear] = _reference_float8,
    hold_float8: bool = False,
    keep_in_host_memory: bool = False,
    pinned: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None,
    attention: str = "sdpa",
) -> T5EncoderModel:
    """A T5 encoder with these weights, built on `meta` and assigned.

    Args:
        config: sizes.
        weights: by the checkpoint's names, as they are stored or dense; the shared embedding may come under either
            of its names, or both.
        device: where to compute.
        dtype: what to compute in.
        quantize: quantize every linear weight.
        rounding: what tensors that are stored as codes or as fp16 are rounded to before; by default they are not.
        quantizer: how, given name and weight; by default to float8, as the reference's quantized encoder does.
        hold_float8: hold them in float8 where the quantizer's values are float8, and dequantize at every call.
        keep_in_host_memory: leave the layers there, and copy each to the device for as long as it computes.
        pinned: gives page-locked copies of what stays in host memory; by default makes them.
        attention: transformers' name of an implementation.

    Raises:
        WeightsInvalid: tensors are missing or unknown.
    """
    t5_encoder = libraries().t5_encoder
    with ONE_BUILDER, torch.device("meta"):
        model = t5_encoder(config)
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    shared = weights.get(SHARED, weights.get(EMBED))
    if shared is None:
        raise WeightsInvalid("text encoder: no shared embedding")
    given = {name: tensor for name, tensor in weights.items() if name not in EMBEDDINGS}
    expected = {name: None for name in model.state_dict() if name not in EMBEDDINGS}
    require_same_keys(expected, given, "text encoder")
    placed: dict[str, Tensor] = {}
    for name in list(given):
        weight = _dense(given.pop(name), device, rounding)
        place = torch.device("cpu") if keep_in_host_memory and ".block." in name else device
        if not (quantize and name in linears):
            placed[name] = weight.to(dtype).to(place)
            continue
        quantized = quantizer(name, weight)
        path = name.removesuffix(".weight")
        if quantized.scale is not None:
            codes, scale = quantized.weight.to(dtype).to(place), quantized.scale.to(dtype).to(place)
            model.set_submodule(path, ScaledLinear(codes, scale))
        elif hold_float8 and quantized.codes is not None and quantized.codes[0].dtype == FLOAT8:
            q, scale = quantized.codes
            model.set_submodule(path, Float8Linear(q.to(place), scale.to(place), dtype))
        else:
            placed[name] = quantized.weight.to(dtype).to(place)
    if keep_in_host_memory:
        # A copy: what is read from a mapped file would keep it mapped.
        table = _dense(shared, device, rounding).to(device="cpu", dtype=dtype, copy=True)
        model.shared = model.encoder.embed_tokens = HostEmbedding(table, device)
    else:
        placed[SHARED] = placed[EMBED] = _dense(shared, device, rounding).to(dtype)
    held = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}
    model.load_state_dict({**held, **placed}, assign=True)
    if keep_in_host_memory:
        _stream(list(model.encoder.block), device, pinned or partial(pin, device=device))
    model.set_attn_implementation(attention)
    if not keep_in_host_memory:
        model.encoder.embed_tokens.weight = model.shared.weight
    return model.eval().requires_grad_(False)


def _dense(weight: Tensor | StoredTensor, device: torch.device, rounding: torch.dtype | None) -> Tensor:
    if isinstance(weight, Tensor):
        return weight.to(device)
    dense = weight.to(device).dense()
    return dense.to(rounding) if rounding is not None and weight.recipe.widened else dense


def _stream(
    blocks: Iterable[nn.Module],
    device: torch.device,
    pinned: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
) -> None:
    """Has each block's tensors on the device while it computes, and nowhere but in host memory else."""
    owners: dict[str, tuple[int, nn.Module, str]] = {}
    placed: dict[str, Tensor] = {}
    for index, block in enumerate(blocks):
        for path, module in block.named_modules():
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                key = f"{index}.{path}.{name}"
                owners[key] = (index, module, name)
                placed[key] = tensor.data
    hosted = pinned(placed) if device.type == "cuda" else placed

    def put(index: int, move: Callable[[Tensor], Tensor]) -> None:
        for key, (owner, module, name) in owners.items():
            if owner != index:
                continue
            moved = move(hosted[key])
            # Into the dictionaries themselves: registering anew at every call is slow.
            if name in module._parameters:
                module._parameters[name] = nn.Parameter(moved, requires_grad=False)
            else:
                module._buffers[name] = moved

    for index, block in enumerate(blocks):
        put(index, lambda tensor: tensor)
        block.register_forward_pre_hook(
            lambda *_, index=index: put(index, lambda tensor: tensor.to(device, non_blocking=True))
        )
        block.register_forward_hook(lambda *_, index=index: put(index, lambda tensor: tensor))


def text_encoder_config(config: Mapping[str, object]) -> T5Config:
    """What a T5 encoder is made of, from a config.json's content, or from sizes read off its tensors.

    Raises:
        WeightsInvalid: the library does not take it.
    """
    t5_config = libraries().t5_config
    try:
        return t5_config(**{key: value for key, value in config.items() if key != "dtype"})
    except Exception as error:  # noqa: BLE001 - whatever the library raises is about the file's content
        raise WeightsInvalid(f"the text encoder's config cannot be used: {shown(str(error))}") from None


class UnfusedAttention(TorchFunctionMode):
    """Attention inside is computed as a chain of operations, whichever kernel torch would choose.

    Calls what `sdpa_kernel(SDPBackend.MATH)` has torch call, but leaves alone which kernels the process allows:
    that is one setting for all threads, and this mode belongs to the thread.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Every call into torch comes by here."""
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_attention_math(*args, **(kwargs or {}))[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def _reference_attention(device: torch.device) -> Iterator[None]:
    """The attention that the reference's embeddings come from: unfused, its float32 products in TF32 on a GPU.

    transformers 5.17 hands the position bias over in a layout that no fused kernel takes; later versions do
    not, so the choice is made here.
    """
    with UnfusedAttention(), float32_products(device, "tf32"):
        yield


class RecordedEncoder:
    """`encode` with one model, recorded on a GPU as one graph: the encoder's thousand small kernels take longer to
    launch than to run. The same kernels, so the same bits. Belongs to the device thread.
    """

    def __init__(
        self,
        model: T5EncoderModel,
        *,
        record: bool = True,
        run: Callable[[T5EncoderModel, Tensor], Tensor] | None = None,
    ) -> None:
        """`model`: where it is recorded, its weights must stay where they are; `run`: in place of `encode`."""
        self.model = model
        self._run = run or encode
        self._ids: Tensor | None = None
        self._embeds: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._met = False
        self._usable = record
        self.fallback: DeviceFallback | None = None
        """Why it is not recorded, where it should be."""
        self._end_mark: Tensor | None = None

    @property
    def end_mark(self) -> Tensor:
        """Embeddings of the end mark alone, the empty prompt without padding: computed once. (1, 1, context)."""
        if self._end_mark is None:
            self._end_mark = self(torch.tensor([[END]]))
        return self._end_mark

    @torch.inference_mode()
    def __call__(self, ids: Tensor) -> Tensor:
        """(1, L) → (1, L, context); what is recorded is for 512 tokens, and other lengths are run as they are."""
        device = self.model.device
        if device.type != "cuda" or not self._usable or ids.shape[1] != MAX_TOKENS:
            return self._run(self.model, ids)
        if self._graph is None and self._met:
            self._record(ids)
        self._met = True
        if self._graph is None or self._ids is None or self._embeds is None:
            return self._run(self.model, ids)
        self._ids.copy_(ids)
        self._graph.replay()
        return self._embeds.clone()

    def _record(self, ids: Tensor) -> None:
        self._ids = ids.to(self.model.device)
        graph = torch.cuda.CUDAGraph()
        try:
            with recording(graph, self.model.device):
                self._embeds = self._run(self.model, self._ids)
        except Exception as problem:  # noqa: BLE001 - what cannot be recorded can still be run
            log.warning("encoder.unrecorded", extra={"error": f"{type(problem).__name__}: {problem}"[:300]})
            self._usable = False
            self.fallback = DeviceFallback(Part.ENCODER_GRAPH, unusable(problem))
            return
        self._graph = graph


@torch.inference_mode()
def encode(model: T5EncoderModel, ids: Tensor) -> Tensor:
    """Embeds all tokens, padding included, without a mask. (1, L) → (1, L, context)."""
    with _reference_attention(model.device):
        embeds: Tensor = model(input_ids=ids.to(model.device))[0]
    return embeds
