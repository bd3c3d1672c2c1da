"""Refuses, by name, files that are no part of a Chroma model, from the names and shapes in their headers alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from chromarpc_server.domain.errors import WeightsInvalid
from chromarpc_server.pipeline.weights.formats.architectures import (
    ADAPTER,
    AUTOENCODER,
    AUTOENCODERS,
    CHROMA,
    ENCODERS,
    STORAGE,
    T5,
    TRANSFORMERS,
    Header,
    Known,
    Shapes,
)
from chromarpc_server.pipeline.weights.formats.prefixes import Part

GIVE: Mapping[Part, str] = {
    "transformer": "give a Chroma transformer, such as Chroma1-HD.safetensors",
    "text_encoder": "give the T5 v1.1 XXL encoder, such as t5xxl_fp16.safetensors",
    "autoencoder": "give Flux's autoencoder, such as ae.safetensors",
}
"""What to do about a file that is something else."""
_GGUF_ARCHITECTURES: Mapping[Part, frozenset[str]] = {
    "transformer": frozenset({"flux", "chroma"}),
    "text_encoder": frozenset({"t5", "t5encoder"}),
    "autoencoder": frozenset({"vae"}),
}
"""What files of a part may say they are; files of stable-diffusion.cpp say nothing."""
_RELATIVE_BIAS = re.compile(
    r"(?:encoder\.block|enc\.blk)\.(\d{1,4})\.(?:layer\.0\.SelfAttention\.relative_attention_bias|attn_rel_b)\."
)
"""In Hugging Face's names and in llama.cpp's."""
_LATENT_CHANNELS = 16
_T5_VOCABULARY = 32128
"""Rows of T5 v1.1's embedding."""


def refuse_other(shapes: Shapes, metadata: Mapping[str, str], part: Part, name: str) -> None:
    """Refuses a file that is known to be something else than this part of a Chroma model.

    Args:
        shapes: of the header's tensors, under the file's own names.
        metadata: of the header, or the keys of a GGUF file.
        part: what the file was given as.
        name: of the file, for the message.

    Raises:
        WeightsInvalid: saying what the file is, and what to give in its place. A file of which nothing is known
            passes: whoever looks for the part's tensors says what is missing.
    """
    found = _what_else(Header(shapes), metadata, part)
    if found is not None:
        raise WeightsInvalid(f"{name}: this is {found}; {GIVE[part]}")


def _what_else(header: Header, metadata: Mapping[str, str], part: Part) -> str | None:
    architecture = metadata.get("general.architecture")
    if architecture is not None and architecture not in _GGUF_ARCHITECTURES[part]:
        return f"a GGUF file of the architecture {_shown(architecture)}"
    found = _first((*STORAGE, ADAPTER), header)
    if found is not None:
        return found
    match part:
        case "transformer":
            others = (
                *TRANSFORMERS,
                *(() if CHROMA.is_it(header) else (T5, *ENCODERS, *AUTOENCODERS, AUTOENCODER)),
            )
            return _first(others, header)
        case "text_encoder":
            if T5.is_it(header):
                return _other_t5(header)
            return _first((CHROMA, *TRANSFORMERS, *ENCODERS, *AUTOENCODERS, AUTOENCODER), header)
        case "autoencoder":
            if AUTOENCODER.is_it(header):
                return _first(AUTOENCODERS, header) or _other_latents(header.shapes)
            return _first((*AUTOENCODERS, CHROMA, *TRANSFORMERS, T5, *ENCODERS), header)


def _first(rows: Iterable[Known], header: Header) -> str | None:
    return next((row.what for row in rows if row.is_it(header)), None)


def _other_t5(header: Header) -> str | None:
    """Relatives of T5 v1.1 whose tensors have the same names."""
    biased = {match.group(1) for name in header.shapes if (match := _RELATIVE_BIAS.search(name))}
    if biased - {"0"}:
        return "a UMT5 text encoder (it has a relative bias in every block), which Chroma does not use"
    if header.ends_with("DenseReluDense.wi.weight"):
        return "T5 of the first version (its feed-forward layers have no gate), and not v1.1"
    rows = [
        shape[0]
        for name, shape in header.shapes.items()
        if shape and name.rsplit(".", 2)[-2:] in (["shared", "weight"], ["token_embd", "weight"])
    ]
    if any(row > _T5_VOCABULARY for row in rows):
        return f"a multilingual T5 (mT5, UMT5) with a vocabulary of {max(rows)}, which Chroma does not use"
    return None


def _other_latents(shapes: Shapes) -> str | None:
    """Autoencoders of the same layout with another number of latent channels."""
    for name, shape in shapes.items():
        if name.endswith("decoder.conv_in.weight") and len(shape) == 4 and shape[1] != _LATENT_CHANNELS:
            model = {4: " (Stable Diffusion 1, 2 or XL)", 32: " (FLUX.2)"}.get(shape[1], "")
            return f"an autoencoder with {shape[1]} latent channels{model}, and Chroma's has {_LATENT_CHANNELS}"
    return None


def _shown(text: str) -> str:
    """What a file says, as a message may carry it."""
    return ascii(text[:60])
