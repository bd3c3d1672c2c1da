"""How a file's tensors are quantized: recipes of the dense ones, under the file's own names.

Three things beside a weight say what its codes mean: the dtype, tensors with a suffix (`.scale_weight` and the
marker `scaled_fp8` until late 2025; `.weight_scale` and `.comfy_quant`, a little JSON, since), and the header's
`_quantization_metadata`, which says for layers what `.comfy_quant` says for one. Scales of inputs concern products
of float8, which are not made here.

    float8       W = float32(q) · scale, or float32(q) in a file without scales
    int8         W = float32(q) · scale of the row or the tensor; with `convrot`, each group of a row is rotated
                 afterwards by the normalized regular Hadamard matrix, which is its own inverse
    GGUF         see `gguf_codes`

Nothing is rounded: a file's own rounding is the only one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from chromarpc_server.domain.errors import WeightsInvalid
from chromarpc_server.pipeline.precision import float32_products
from chromarpc_server.pipeline.weights.formats.prefixes import part_roots
from chromarpc_server.pipeline.weights.gguf_codes import dequantizer, is_dequantizable
from chromarpc_server.pipeline.weights.gguf_file import PLAIN_TYPES, GgufFile
from chromarpc_server.pipeline.weights.stored import Recipe, Recipes, as_stored
from chromarpc_server.pipeline.weights.tensor_file import TensorEntry, TensorFile, TensorFileError, shown

MARKER = "scaled_fp8"
MAX_MARKERS = 16
"""One for each part of a model."""
QUANTIZATION = "_quantization_metadata"
"""The header's key."""
_SCALES = (".scale_weight", ".weight_scale")
_INPUT_SCALES = (".scale_input", ".input_scale")
_DESCRIPTION = ".comfy_quant"
MAX_DESCRIPTION_BYTES = 4096
DEFAULT_GROUP = 256
"""Values of a row that are rotated together, where a file does not say."""
MAX_GROUP = 4**6

FLOAT8_DTYPES = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
"""By ComfyUI's name of the format."""
_NUMBERS = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16", "F8_E4M3": "fp8", "F8_E5M2": "fp8 e5m2"}
_WIDENED = ("F64", "F16", *FLOAT8_DTYPES.values())
"""Become float32 when they are made dense."""


@dataclass(frozen=True)
class _Layer:
    """What a file says about one weight's codes."""

    format: str | None
    """ComfyUI's name; None in the old layout, whose dtype says it."""
    scale: str | None
    """Name of the tensor."""
    group: int | None
    """Values that are rotated together."""


def file_recipes(files: Sequence[TensorFile]) -> Recipes:
    """Every tensor of a file, or of one model's several, under the files' names; what only describes is left out.

    Args:
        files: with their headers checked; descriptions of a few bytes are read from them.

    Raises:
        WeightsInvalid: naming the file and what it holds that cannot be used.
    """
    recipes: dict[str, Recipe] = {}
    entries: dict[str, TensorEntry] = {}
    owners: dict[str, TensorFile] = {}
    for file in files:
        for name, entry in file.tensors.items():
            if name in owners:
                raise _invalid(file, f"{owners[name].path.name} has a tensor {shown(name)}, too")
            owners[name], entries[name] = file, entry
    roots = part_roots(entries)
    layers = _layers(files, entries, owners, roots)
    scaled = {_root(name, roots) for name in layers}
    consumed = {name for name in entries if _describes(name)}
    marked = tuple(name.removesuffix(MARKER) for name in entries if _is_marker(name))
    if len(marked) > MAX_MARKERS:
        raise _invalid(files[0], f"{len(marked)} tensors say that weights are scaled, more than {MAX_MARKERS}")
    for name, entry in entries.items():
        if name in consumed or _is_marker(name):
            continue
        file, layer = owners[name], layers.get(name)
        if layer is not None:
            recipes[name] = _scaled(file, name, entry, entries, layer)
            continue
        if _is_float8(entry) and (_root(name, roots) in scaled or name.startswith(marked)):
            raise _invalid(file, f"{shown(name)} has no scale, in a file whose float8 weights are scaled")
        recipes[name] = _unscaled(file, name, entry)
    return recipes


def joined(recipes: Sequence[Recipe], dim: int = 0) -> Recipe:
    """The recipe of several tensors one after the other along a dimension.

    Raises:
        WeightsInvalid: their shapes do not go together.
    """
    first = recipes[0]
    if any(len(one.shape) <= dim or _without(one.shape, dim) != _without(first.shape, dim) for one in recipes):
        raise WeightsInvalid(f"{[list(one.shape) for one in recipes]} cannot be joined along dimension {dim}")
    shape = list(first.shape)
    shape[dim] = sum(one.shape[dim] for one in recipes)
    widest = max((one.dtype for one in recipes), key=lambda dtype: dtype.itemsize)
    kinds = list(dict.fromkeys(one.stored_as for one in recipes))
    return Recipe(
        pieces=tuple(piece for one in recipes for piece in one.pieces),
        shape=tuple(shape),
        dtype=widest,
        stored_as=kinds[0] if len(kinds) == 1 else " and ".join(kinds),
        make=partial(_join, recipes=tuple(recipes), dim=dim, dtype=widest),
        widened=any(one.widened for one in recipes),
        detail=f"joined {dim}: {', '.join(f'{len(one.pieces)} {one.detail}' for one in recipes)}",
    )


def _join(pieces: Sequence[Tensor], recipes: Sequence[Recipe], dim: int, dtype: torch.dtype) -> Tensor:
    parts, begin = [], 0
    for recipe in recipes:
        parts.append(recipe.make(pieces[begin : begin + len(recipe.pieces)]).to(dtype))
        begin += len(recipe.pieces)
    return torch.cat(parts, dim=dim)


def _without(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return (*shape[:dim], *shape[dim + 1 :])


def _describes(name: str) -> bool:
    return name.endswith((*_SCALES, *_INPUT_SCALES, _DESCRIPTION))


def _is_marker(name: str) -> bool:
    return name == MARKER or name.endswith(f".{MARKER}")


def _is_float8(entry: TensorEntry) -> bool:
    return entry.dtype in FLOAT8_DTYPES.values()


def _root(name: str, roots: Sequence[str]) -> str:
    """What a tensor's part has before its names."""
    return next((root for root in roots if name.startswith(root)), "")


def _layers(
    files: Sequence[TensorFile],
    entries: Mapping[str, TensorEntry],
    owners: Mapping[str, TensorFile],
    roots: Sequence[str],
) -> dict[str, _Layer]:
    """By the weight's name."""
    described = _descriptions(files, entries, roots)
    scales: dict[str, str] = {}
    for name in entries:
        suffix = next((suffix for suffix in (*_SCALES, *_INPUT_SCALES) if name.endswith(suffix)), None)
        if suffix is None:
            continue
        weight = f"{name.removesuffix(suffix)}.weight"
        if weight not in entries:
            raise _invalid(owners[name], f"a scale {shown(name)} without its weight")
        if suffix in _SCALES and weight in scales:
            raise _invalid(owners[name], f"{shown(weight)} has two scales")
        if suffix in _SCALES:
            scales[weight] = name
    layers = {weight: _Layer(None, scale, None) for weight, scale in scales.items()}
    for weight, (file, description) in described.items():
        if weight not in entries:
            raise _invalid(file, f"a quantized layer without its weight {shown(weight)}")
        layers[weight] = _layer(file, weight, description, scales.get(weight))
    return layers


def _descriptions(
    files: Sequence[TensorFile], entries: Mapping[str, TensorEntry], roots: Sequence[str]
) -> dict[str, tuple[TensorFile, dict[str, Any]]]:
    """What is said about weights, by their names, and by which file."""
    found: dict[str, tuple[TensorFile, dict[str, Any]]] = {}
    for file in files:
        text = file.metadata.get(QUANTIZATION)
        if text is not None:
            layers = _json(file, text, f"its header's {QUANTIZATION}").get("layers")
            if not isinstance(layers, dict) or not all(isinstance(one, dict) for one in layers.values()):
                raise _invalid(file, f"its header's {QUANTIZATION} names no layers")
            for layer, one in layers.items():
                found[_weight_of(layer, entries, roots)] = (file, one)
    for file in files:
        wanted = {name for name in file.tensors if name.endswith(_DESCRIPTION)}
        for name in wanted:
            entry = file.tensors[name]
            if entry.dtype != "U8" or entry.size_bytes > MAX_DESCRIPTION_BYTES:
                raise _invalid(file, f"{shown(name)} is no description of a quantized layer")
        try:
            for name, tensor in file.read(wanted) if wanted else ():
                text = bytes(tensor.flatten().tolist()).decode("utf-8", errors="replace")
                found[f"{name.removesuffix(_DESCRIPTION)}.weight"] = (file, _json(file, text, shown(name)))
        except TensorFileError as error:
            raise _invalid(file, str(error)) from None
    return found


def _weight_of(layer: str, entries: Mapping[str, TensorEntry], roots: Sequence[str]) -> str:
    """The weight of a layer that a header names, with its part's prefix or without."""
    names = [f"{root}{layer}.weight" for root in ("", *roots)]
    return next((name for name in names if name in entries), names[0])


def _json(file: TensorFile, text: str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise _invalid(file, f"{what} is not a JSON object")
    return value


def _layer(file: TensorFile, weight: str, description: Mapping[str, Any], scale: str | None) -> _Layer:
    name = description.get("format")
    if not isinstance(name, str) or name not in (*FLOAT8_DTYPES, "int8_tensorwise"):
        raise _invalid(file, f"{shown(weight)} is quantized as {shown(str(name))}, which is not supported")
    if scale is None:
        raise _invalid(file, f"{shown(weight)} has no scale, and is said to be {name}")
    params = description.get("params")
    merged = {**description, **params} if isinstance(params, dict) else description
    if name != "int8_tensorwise" or not merged.get("convrot"):
        return _Layer(name, scale, None)
    group = merged.get("convrot_groupsize", DEFAULT_GROUP)
    if type(group) is not int or not 1 < group <= MAX_GROUP or 4 ** (group.bit_length() // 2) != group:
        raise _invalid(file, f"{shown(weight)} is rotated in groups of {shown(str(group))}, no power of 4")
    return _Layer(name, scale, group)


def _scaled(
    file: TensorFile, name: str, entry: TensorEntry, entries: Mapping[str, TensorEntry], layer: _Layer
) -> Recipe:
    wanted = "I8" if layer.format == "int8_tensorwise" else FLOAT8_DTYPES.get(layer.format or "")
    if (wanted is not None and entry.dtype != wanted) or (wanted is None and not entry.is_floating_point):
        raise _invalid(file, f"{shown(name)} is {entry.dtype}, and should be {wanted or 'float8'} to be scaled")
    if layer.scale is None or isinstance(file, GgufFile):
        raise _invalid(file, f"{shown(name)} has a scale that is not understood")
    scale, rows = entries[layer.scale], entry.shape[0] if entry.shape else 1
    if scale.dtype not in ("F32", "F16", "BF16") or scale.shape not in ((), (1,), (1, 1), (rows, 1)):
        raise _invalid(
            file,
            f"{shown(name)} has a scale of {scale.dtype} {list(scale.shape)}; one for the tensor or "
            f"one for each of its {rows} rows is supported",
        )
    if scale.shape == (rows, 1) and len(entry.shape) != 2 and rows != 1:
        raise _invalid(file, f"{shown(name)} has a scale for each row, and {len(entry.shape)} dimensions")
    if layer.group is not None and (len(entry.shape) != 2 or entry.shape[1] % layer.group):
        raise _invalid(file, f"{shown(name)} {list(entry.shape)} has no whole groups of {layer.group}")
    kind = "int8" if entry.dtype == "I8" else f"{_NUMBERS[entry.dtype]} scaled"
    make: Callable[[Sequence[Tensor]], Tensor] = _multiplied
    if layer.group is not None:
        kind, make = "int8 convrot", partial(_rotated, group=layer.group)
    detail = "" if layer.group is None else f"convrot {layer.group}"
    return Recipe((name, layer.scale), entry.shape, torch.float32, kind, make, widened=True, detail=detail)


def _unscaled(file: TensorFile, name: str, entry: TensorEntry) -> Recipe:
    if isinstance(file, GgufFile) and (kind := file.types[name]) not in PLAIN_TYPES:
        if not is_dequantizable(kind):
            raise _invalid(file, f"{shown(name)} is quantized as {kind.name}, which is not supported")
        shape = file.shapes[name]
        make = dequantizer(kind, shape)
        return Recipe(
            (name,), shape, torch.float32, f"GGUF {kind.name}", make, widened=True, detail=f"GGUF {kind.name}"
        )
    if entry.dtype in _WIDENED:
        return Recipe((name,), entry.shape, torch.float32, _NUMBERS[entry.dtype], _wide, widened=True)
    return Recipe((name,), entry.shape, entry.torch_dtype, _NUMBERS.get(entry.dtype, entry.dtype), as_stored)


def _wide(pieces: Sequence[Tensor]) -> Tensor:
    (stored,) = pieces
    return stored.to(torch.float32)


def _multiplied(pieces: Sequence[Tensor]) -> Tensor:
    codes, scale = pieces
    return codes.to(torch.float32) * scale.to(torch.float32).view(-1, *(1,) * (codes.ndim - 1))


def _rotated(pieces: Sequence[Tensor], group: int) -> Tensor:
    weight = _multiplied(pieces)
    rotation = hadamard(group).to(weight.device)
    # Whoever prepares the weights may multiply in TF32, as the trainer does, and would round the file's values.
    with float32_products(weight.device, "ieee"):
        return (weight.view(-1, group) @ rotation).view(weight.shape)


@cache
def hadamard(size: int) -> Tensor:
    """The normalized regular Hadamard matrix of a power of 4, (size, size): every row has the same sum."""
    four = torch.ones(4, 4) - 2 * torch.eye(4).flip(0)
    found = torch.ones(1, 1)
    while len(found) < size:
        found = torch.kron(found, four)
    normalized: Tensor = found / size**0.5
    return normalized


def _invalid(file: TensorFile, problem: str) -> WeightsInvalid:
    return WeightsInvalid(f"{file.path.name}: {problem}")
