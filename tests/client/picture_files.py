"""Pictures as several programs leave them, made here."""

from __future__ import annotations

import io
import json
import struct
import zlib
from typing import Any

from PIL import Image, PngImagePlugin

from chromarpc.pictures import files
from chromarpc.pictures.facts import PictureFacts

SIGNATURE = b"\x89PNG\r\n\x1a\n"

COMFYUI: dict[str, Any] = {
    "1": {
        "class_type": "UNETLoader",
        "inputs": {"unet_name": "Chroma1-HD.safetensors", "weight_dtype": "default"},
    },
    "2": {
        "class_type": "LoraLoaderModelOnly",
        "inputs": {"lora_name": "styles/ink.safetensors", "strength_model": 0.8, "model": ["1", 0]},
    },
    "3": {"class_type": "ModelSamplingAuraFlow", "inputs": {"shift": 1.0, "model": ["2", 0]}},
    "4": {"class_type": "CLIPTextEncode", "inputs": {"text": "a red circle", "clip": ["9", 0]}},
    "5": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["9", 0]}},
    "6": {"class_type": "EmptySD3LatentImage", "inputs": {"width": ["10", 0], "height": 64, "batch_size": 1}},
    "7": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 43,
            "steps": 20,
            "cfg": 3.5,
            "sampler_name": "euler",
            "scheduler": "beta",
            "denoise": 1.0,
            "model": ["3", 0],
            "positive": ["4", 0],
            "negative": ["5", 0],
            "latent_image": ["6", 0],
        },
    },
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["7", 0], "vae": ["11", 0]}},
    "9": {"class_type": "CLIPLoader", "inputs": {"clip_name": "t5xxl.safetensors", "type": "chroma"}},
    "10": {"class_type": "PrimitiveInt", "inputs": {"value": 64}},
    "11": {"class_type": "VAELoader", "inputs": {"vae_name": "ae.safetensors"}},
    "12": {"class_type": "SaveImage", "inputs": {"filename_prefix": "a", "images": ["8", 0]}},
}
COMFYUI_CUSTOM: dict[str, Any] = {
    "noise": {"class_type": "RandomNoise", "inputs": {"noise_seed": 7}},
    "model": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "chroma.safetensors"}},
    "power": {
        "class_type": "Power Lora Loader",
        "inputs": {
            "model": ["model", 0],
            "lora_1": {"on": True, "lora": "a.safetensors", "strength": 0.5},
            "lora_2": {"on": False, "lora": "b.safetensors", "strength": 1},
        },
    },
    "text": {"class_type": "StringConstant", "inputs": {"string": "a cat"}},
    "yes": {"class_type": "CLIPTextEncode", "inputs": {"text": ["text", 0]}},
    "no": {"class_type": "CLIPTextEncode", "inputs": {"text": ""}},
    "guider": {
        "class_type": "CFGGuider",
        "inputs": {"cfg": 4, "model": ["power", 0], "positive": ["yes", 0], "negative": ["no", 0]},
    },
    "select": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "res_multistep"}},
    "sigmas": {
        "class_type": "BasicScheduler",
        "inputs": {"scheduler": "simple", "steps": 30, "denoise": 0.6, "model": ["power", 0]},
    },
    "size": {"class_type": "EmptyLatentImage", "inputs": {"width": 96, "height": 64, "batch_size": 1}},
    "sampler": {
        "class_type": "SamplerCustomAdvanced",
        "inputs": {
            "noise": ["noise", 0],
            "guider": ["guider", 0],
            "sampler": ["select", 0],
            "sigmas": ["sigmas", 0],
            "latent_image": ["size", 0],
        },
    },
    "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["sampler", 0]}},
    "save": {"class_type": "SaveImage", "inputs": {"images": ["decode", 0]}},
}
WORKFLOW: dict[str, Any] = {
    "nodes": [
        {"id": 1, "type": "UNETLoader", "inputs": [], "widgets_values": ["chroma.safetensors", "fp8_e4m3fn"]},
        {"id": 2, "type": "CLIPTextEncode", "inputs": [], "widgets_values": ["a dog"]},
        {"id": 3, "type": "CLIPTextEncode", "inputs": [], "widgets_values": ["bad"]},
        {"id": 4, "type": "EmptyLatentImage", "inputs": [], "widgets_values": [64, 64, 1]},
        {
            "id": 5,
            "type": "KSampler",
            "inputs": [
                {"name": "model", "link": 10},
                {"name": "positive", "link": 11},
                {"name": "negative", "link": 12},
                {"name": "latent_image", "link": 13},
            ],
            "widgets_values": [9, "randomize", 12, 4.5, "euler", "simple", 1],
        },
        {"id": 6, "type": "SaveImage", "inputs": [{"name": "images", "link": 14}], "widgets_values": ["x"]},
    ],
    "links": [
        [10, 1, 0, 5, 0, "MODEL"],
        [11, 2, 0, 5, 1, "CONDITIONING"],
        [12, 3, 0, 5, 2, "CONDITIONING"],
        [13, 4, 0, 5, 3, "LATENT"],
        [14, 5, 0, 6, 0, "IMAGE"],
    ],
}
A1111 = (
    "a red circle, <lora:ink:0.8> on white\nsecond line\nNegative prompt: blurry,\nugly\n"
    "Steps: 20, Sampler: Euler, Schedule type: Beta, CFG scale: 3.5, Seed: 43, Size: 64x64, "
    'Model hash: 1a2b3c4d5e, Model: Chroma1-HD, Lora hashes: "ink: 0123456789ab, other: ffff", RNG: CPU, '
    "Version: v1.10.1"
)
FORGE = (
    "a cat <lora:styles/a:1:0.25>\nSteps: 8, Sampler: Euler, Schedule type: Simple, CFG scale: 1, "
    "Distilled CFG Scale: 3.5, Seed: 5, Size: 64x64, Model: chroma, "
    "Diffusion in Low Bits: Automatic (fp16 LoRA), Version: f2.0.1v1.10.1-previous"
)
RECORD: dict[str, Any] = {
    "version": 1,
    "request": {
        "model": "chroma",
        "loras": [{"path": "job/l.safetensors", "network_multiplier": 1}],
        "prompts": [
            {
                "prompt": 'a <cät>\n& "dog"',
                "width": 64,
                "height": 64,
                "sample_steps": 25,
                "guidance_scale": 4.0,
                "seed": 42,
            }
        ],
        "output": {"format": "IMAGE_FORMAT_PNG"},
        "profile": "reference",
        "noise_draw": "NOISE_DRAW_FLOAT32",
    },
    "model": "chroma",
    "served_model": "chroma",
    "model_revision": "cd" * 32,
    "adapters": [{"path": "job/l.safetensors", "sha256": "ab" * 32, "placement": "merged"}],
    "tokens": {"used": 9, "cut": 0},
    "tiled": False,
    "versions": {"chromarpc": "0.1.0", "torch": "2.13.0"},
    "device": "NVIDIA H100 80GB HBM3",
    "dtype": "bfloat16",
}


def pixels(colour: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, colour)


def png_with(texts: dict[str, Any], image: Image.Image | None = None, *, compressed: bool = False) -> bytes:
    """A PNG with texts as Pillow writes them."""
    info = PngImagePlugin.PngInfo()
    for keyword, text in texts.items():
        value = text if isinstance(text, str) else json.dumps(text)
        if value.isascii():
            info.add_text(keyword, value, zip=compressed)
        else:
            info.add_itxt(keyword, value, zip=compressed)
    return saved(image or pixels(), "PNG", pnginfo=info)


def with_comment(
    text: str, file_format: str, *, big_endian: bool = True, image: Image.Image | None = None
) -> bytes:
    """A JPEG or WebP whose EXIF has a user's comment, as A1111 and Forge write it."""
    exif = Image.Exif()
    encoded = text.encode("utf-16-be" if big_endian else "utf-16-le")
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + encoded
    return saved(pixels(), file_format, exif=exif)


def comfyui_webp(graph: dict[str, Any]) -> bytes:
    """As ComfyUI writes WebP: its texts in the fields of camera and maker."""
    exif = Image.Exif()
    exif[0x0110] = f"prompt:{json.dumps(graph)}"
    exif[0x010F] = 'workflow:{"nodes": []}'
    return saved(pixels(), "WEBP", exif=exif)


def saved(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(*chunks: bytes, width: int = 64, height: int = 64) -> bytes:
    """A PNG of these chunks between its head and its end; it has no pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return SIGNATURE + head + b"".join(chunks) + chunk(b"IEND", b"")


def values(facts: PictureFacts | None) -> dict[str, Any]:
    assert facts is not None
    return {name: fact.value for name, fact in facts.facts.items()}


def _bomb(kind: bytes) -> bytes:
    inflated = zlib.compress(b"a" * (files.MAX_TEXT_BYTES + 1), 9)
    head = b"parameters\0\0" if kind == b"zTXt" else b"parameters\0\x01\0\0\0"
    return png_of(chunk(kind, head + inflated))


HOSTILE: list[tuple[bytes, str]] = [
    (b"", "is no PNG"),
    (b"GIF89a", "is no PNG"),
    (files.PNG_SIGNATURE, "broken"),
    (files.PNG_SIGNATURE + chunk(b"IEND", b""), "broken"),
    (files.PNG_SIGNATURE + chunk(b"tEXt", b"a\0b"), "broken"),
    (png_with({"a": "b"})[:-40], "cut short"),
    (png_of(struct.pack(">I", 2**31) + b"tEXt"), "cut short"),
    (_bomb(b"zTXt"), "more than"),
    (_bomb(b"iTXt"), "more than"),
    (png_of(*[chunk(b"tEXt", b"%d\0" % n + b"a" * 1_000_000) for n in range(9)]), "more than"),
    (png_of(chunk(b"zTXt", b"a\0\0no deflate")), "broken"),
    (png_of(chunk(b"zTXt", b"a\0\0" + zlib.compress(b"a" * 100)[:-6])), "broken"),
    (saved(pixels(), "JPEG")[:100], "cut short"),
    (b"\xff\xd8\xff\xe1\x00\x01", "cut short"),
    (b"\xff\xd8\xff\xd9\x00\x02", "broken"),
    (b"\xff\xd8\xff", "broken"),
    (saved(pixels(), "WEBP")[:-9], "cut short"),
    (b"RIFF\x04\0\0\0WEBP", "broken"),
    (b"RIFF\xff\xff\xff\xffWEBP", "cut short"),
]
"""Files that are no picture, or a hostile one, and what is said of each."""
