"""Workflows of ComfyUI's API form, made here, and what a server has for them."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TypeAlias

from chromarpc.loras import LoraSource, StoredLora
from chromarpc.v1 import model_service_pb2

Flow: TypeAlias = dict[str, dict[str, Any]]


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs, "_meta": {"title": "what people call it"}}


def ksampler_flow() -> Flow:
    """Loaders, a LoRA, a shift, two texts and a KSampler."""
    return {
        "1": node("UNETLoader", unet_name="chroma\\Chroma1-HD.safetensors", weight_dtype="default"),
        "2": node("CLIPLoader", clip_name="t5xxl_fp16.safetensors", type="chroma", device="default"),
        "3": node("VAELoader", vae_name="ae.safetensors"),
        "4": node("LoraLoaderModelOnly", lora_name="styles\\ink.safetensors", strength_model=0.8, model=["1", 0]),
        "5": node("ModelSamplingAuraFlow", shift=1.0, model=["4", 0]),
        "6": node("CLIPTextEncode", text="a (red:1.2) circle", clip=["2", 0]),
        "7": node("CLIPTextEncode", text="blurry", clip=["2", 0]),
        "8": node("EmptySD3LatentImage", width=1024, height=768, batch_size=1),
        "9": node(
            "KSampler",
            seed=43,
            steps=26,
            cfg=3.5,
            sampler_name="euler",
            scheduler="beta",
            denoise=1,
            model=["5", 0],
            positive=["6", 0],
            negative=["7", 0],
            latent_image=["8", 0],
        ),
        "10": node("VAEDecode", samples=["9", 0], vae=["3", 0]),
        "11": node("SaveImage", filename_prefix="ComfyUI", images=["10", 0]),
    }


def custom_flow() -> Flow:
    """SamplerCustomAdvanced, with values from primitive nodes."""
    return {
        "noise": node("RandomNoise", noise_seed=["seed", 0]),
        "seed": node("PrimitiveInt", value=7),
        "model": node("UnetLoaderGGUF", unet_name="chroma1-hd-Q4_K_S.gguf"),
        "shifted": node("ModelSamplingAuraFlow", shift=["shift", 0], model=["model", 0]),
        "shift": node("PrimitiveFloat", value=1.5),
        "clip": node("CLIPLoaderGGUF", clip_name="t5-v1_1-xxl-encoder-Q8_0.gguf", type="chroma"),
        "options": node("T5TokenizerOptions", min_padding=0, min_length=0, clip=["clip", 0]),
        "words": node("PrimitiveStringMultiline", value="a cat\non a mat"),
        "yes": node("CLIPTextEncode", text=["words", 0], clip=["options", 0]),
        "no": node("CLIPTextEncode", text="", clip=["options", 0]),
        "guider": node("CFGGuider", cfg=4, model=["shifted", 0], positive=["yes", 0], negative=["no", 0]),
        "select": node("KSamplerSelect", sampler_name="res_multistep"),
        "sigmas": node("BasicScheduler", scheduler="simple", steps=30.0, denoise=1.0, model=["shifted", 0]),
        "size": node("EmptyLatentImage", width=512, height=512, batch_size=1),
        "sampler": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["select", 0],
            sigmas=["sigmas", 0],
            latent_image=["size", 0],
        ),
        "vae": node("VAELoader", vae_name="ae.safetensors"),
        "decode": node("VAEDecode", samples=["sampler", 0], vae=["vae", 0]),
        "save": node("PreviewImage", images=["reroute", 0]),
        "reroute": {"class_type": "Reroute", "inputs": {"": ["decode", 0]}},
    }


def changed(flow: Flow, **changes: Mapping[str, Any]) -> Flow:
    """A workflow with other inputs of some nodes, named `n9` for node 9; a value None takes an input out."""
    made = copy.deepcopy(flow)
    for name, inputs in changes.items():
        held = made[name.removeprefix("n")]["inputs"]
        held.update(inputs)
        for key in [key for key, value in held.items() if value is None]:
            del held[key]
    return made


def replaced(flow: Flow, number: str, class_type: str, **inputs: Any) -> Flow:
    """A workflow with another node in the place of one."""
    return {**copy.deepcopy(flow), number: node(class_type, **inputs)}


def as_bytes(flow: Any) -> bytes:
    return json.dumps(flow).encode()


def served_model(
    model_id: str = "chroma1-hd", source: str = "lodestones/Chroma1-HD:Chroma1-HD.safetensors", **more: Any
) -> model_service_pb2.Model:
    """A model of a server, whose transformer comes from `source`."""
    stored_as = more.pop("stored_as", "bf16")
    part = model_service_pb2.ModelPart(part="transformer", source=source, present=True, stored_as=stored_as)
    return model_service_pb2.Model(
        id=model_id, **{"resolution_divisor": 32, "weights_present": True, "parts": [part], **more}
    )


def stored_lora(path: str, filename: str = "") -> StoredLora:
    return StoredLora(
        path=path,
        source=LoraSource.UPLOAD if filename else LoraSource.ROOT,
        size_bytes=1,
        sha256="",
        modified_time=datetime(2026, 1, 1, tzinfo=UTC),
        filename=filename,
    )
