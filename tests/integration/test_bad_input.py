"""Bad input through the real client: the status and the reason, the field by name, and the next request served."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import chromarpc
from chromarpc.json_request import parse_request_json
from tests.conftest import RunningServer
from tests.tiny_checkpoint import GOLDENS

SMALL: dict[str, Any] = {
    "model": "chroma-mini",
    "width": 64,
    "height": 64,
    "sample_steps": 1,
    "guidance_scale": 1.0,
}


@pytest.fixture
def client(server: RunningServer) -> Iterator[chromarpc.Client]:
    with chromarpc.Client(server.target) as client:
        yield client
        assert len(client.generate_images("still serving", **SMALL)) == 1


def _refusal(client: chromarpc.Client, prompts: Any = "a", **arguments: Any) -> chromarpc.ChromarpcError:
    with pytest.raises(chromarpc.ChromarpcError) as caught:
        list(client.generate(prompts, **{**SMALL, **arguments}))
    error = caught.value
    text = f"{error} {error.metadata}"
    assert "Traceback" not in text
    assert "/tmp" not in text
    return error


def _fields(error: chromarpc.ChromarpcError) -> set[str]:
    return {violation.field for violation in error.violations}


def _rejected() -> list[dict[str, Any]]:
    return json.loads((GOLDENS / "requests" / "reference_requests.json").read_text())["rejected"]


@pytest.mark.parametrize("case", _rejected(), ids=lambda case: ",".join(case["fields"]))
def test_what_the_reference_rejects_is_refused_by_field(client: chromarpc.Client, case: dict[str, Any]) -> None:
    request = parse_request_json(json.dumps(case["request"])).request
    with pytest.raises(chromarpc.ChromarpcError) as caught:
        list(client.generate_request(request))
    assert caught.value.reason == "INVALID_PARAMETER"
    assert set(case["fields"]) <= _fields(caught.value)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"kv_cache": True}, "kv_cache"),
        ({"match_target_res": True}, "match_target_res"),
        ({"loras": [{"path": "a", "transformer": "low"}]}, "loras.0.transformer"),
        ({"loras": [{}]}, "loras.0.path"),
        ({"loras": [{"path": "http://127.0.0.1/a.safetensors"}]}, "loras.0.path"),
        ({"loras": [{"path": "a"}] * 9}, "loras"),
        ({"prompts": [{}]}, "prompts.0.prompt"),
        ({"prompts": [{"prompt": "a", "sampler": "dpm"}]}, "prompts.0.sampler"),
        ({"prompts": [{"prompt": "a", "num_frames": 2}]}, "prompts.0.num_frames"),
        ({"prompts": [{"prompt": "a", "fps": 121}]}, "prompts.0.fps"),
        ({"prompts": [{"prompt": "a", "resolution": "High"}]}, "prompts.0.resolution"),
        ({"prompts": [{"prompt": "a", "ctrl_img": "x"}]}, "prompts.0.ctrl_img"),
        ({"prompts": [{"prompt": "a", "ctrl_img_3": "x"}]}, "prompts.0.ctrl_img_3"),
        ({"profile": "fast"}, "profile"),
        ({"output": {"quality": 90}}, "output.quality"),
        ({"preview": {"every_n_steps": 151}}, "preview.every_n_steps"),
        ({"prompts": [{"prompt": "a", "width": 4096, "height": 4096, "sample_steps": 150}]}, "prompts"),
        ({"prompts": [{"prompt": "a"}] * 10_000}, "prompts"),
        ({"prompts": [{"prompt": "x" * 1_000_000}]}, "prompts.0.prompt"),
        ({"prompts": [{"prompt": "[trigger]" * 1000, "trigger_word": "y" * 1000}]}, "prompts.0.prompt"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_field_that_cannot_be_honoured_is_refused_by_name(
    client: chromarpc.Client, body: dict[str, Any], field: str
) -> None:
    whole = {"model": "chroma-mini", "prompts": [{"prompt": "a"}], **body}
    request = parse_request_json(json.dumps(whole)).request
    with pytest.raises(chromarpc.ChromarpcError) as caught:
        list(client.generate_request(request))
    assert caught.value.reason == "INVALID_PARAMETER"
    assert field in _fields(caught.value)


def test_the_model_must_be_named_and_known(client: chromarpc.Client) -> None:
    request = parse_request_json('{"prompts": [{"prompt": "a"}]}').request
    with pytest.raises(chromarpc.ChromarpcError) as caught:
        list(client.generate_request(request))
    assert _fields(caught.value) == {"model"}
    error = _refusal(client, model="flux")
    assert error.reason == "MODEL_NOT_FOUND"
    assert "chroma-mini" in error.metadata["models"]


def test_absent_weights_name_the_command_that_fetches_them(client: chromarpc.Client) -> None:
    error = _refusal(client, model="chroma")
    assert error.reason == "WEIGHTS_MISSING"
    assert error.metadata["command"] == "chromarpc-server fetch chroma"


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "missing", "folder", "out", "\0"])
def test_paths_that_lead_nowhere_or_out_all_answer_the_same(
    client: chromarpc.Client, lora_root: Path, path: str
) -> None:
    (lora_root / "folder").mkdir(exist_ok=True)
    secret = lora_root.parent / "outside.safetensors"
    save_file({"x": torch.zeros(1)}, secret)
    if not (lora_root / "out").is_symlink():
        (lora_root / "out").symlink_to(secret)
    error = _refusal(client, loras=[path])
    assert error.reason == "LORA_NOT_FOUND"
    assert _fields(error) == {"loras.0.path"}
    assert "adapter root" in str(error)


def _header(header: bytes, size: int | None = None, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header) if size is None else size) + header + data


def _entry(dtype: str = "F32", shape: tuple[int, ...] = (1,), offsets: tuple[int, int] = (0, 4)) -> bytes:
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


HOSTILE = {
    "zero bytes": b"",
    "text": b"<html>not a model</html>",
    "a header of terabytes": _header(b"{}", size=2**42),
    "a header beyond the file": _header(b"{}", size=1000),
    "no JSON": _header(b"{{{{"),
    "deep JSON": _header(b"[" * 100_000),
    "a list": _header(b"[]"),
    "no tensors' bytes": _header(_entry()),
    "an overlap": _header(_entry(offsets=(4, 8)), data=b"\0" * 8),
    "a shape of exabytes": _header(_entry(shape=(2**60,), offsets=(0, 2**62)), data=b"\0" * 4),
    "a dtype of its own": _header(_entry(dtype="F3"), data=b"\0" * 4),
    "a negative size": _header(_entry(shape=(-1,), offsets=(0, -4)), data=b"\0" * 4),
    "bytes at its end": _header(_entry(), data=b"\0" * 100),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_is_no_adapter_is_invalid(client: chromarpc.Client, lora_root: Path, name: str) -> None:
    (lora_root / "hostile.safetensors").write_bytes(HOSTILE[name])
    error = _refusal(client, loras=["hostile.safetensors"])
    if name == "a list":
        assert error.reason in ("LORA_INVALID", "LORA_INCOMPATIBLE")
    else:
        assert error.reason == "LORA_INVALID"
    assert _fields(error) == {"loras.0.path"}


PAIR = "diffusion_model.double_blocks.0.img_attn.qkv.lora_{}.weight"


@pytest.mark.parametrize(
    "tensors",
    [
        {"some.other.key": torch.zeros(1)},
        {"diffusion_model.other_blocks.0.lora_A.weight": torch.zeros(4, 64)},
        {PAIR.format("A"): torch.zeros(4, 65), PAIR.format("B"): torch.zeros(192, 4)},
        {PAIR.format("A"): torch.zeros(4, 64), PAIR.format("B"): torch.zeros(192, 5)},
    ],
    ids=["no known format", "no key matches", "wrong shape", "ranks differ"],
)
def test_an_adapter_that_does_not_fit_says_why(
    client: chromarpc.Client, lora_root: Path, tensors: dict[str, torch.Tensor]
) -> None:
    save_file(tensors, lora_root / "misfit.safetensors")
    error = _refusal(client, loras=["misfit.safetensors"])
    assert error.reason == "LORA_INCOMPATIBLE"
    assert _fields(error) == {"loras.0.path"}


def test_values_that_are_not_finite_are_invalid(client: chromarpc.Client, lora_root: Path) -> None:
    pair = {PAIR.format("A"): torch.full((4, 64), torch.nan), PAIR.format("B"): torch.zeros(192, 4)}
    save_file(pair, lora_root / "nan.safetensors")
    assert _refusal(client, loras=["nan.safetensors"]).reason == "LORA_INVALID"


def test_an_adapter_changes_the_picture_and_at_zero_it_does_not(client: chromarpc.Client, lora_root: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    pair = {
        PAIR.format("A"): torch.randn(4, 64, generator=generator),
        PAIR.format("B"): torch.randn(192, 4, generator=generator),
        "diffusion_model.unknown.lora_A.weight": torch.zeros(4, 4),
    }
    save_file(pair, lora_root / "good.safetensors", {"name": "good"})
    many = {**SMALL, "sample_steps": 3, "picture_record": False}
    base, zero, full = (
        client.generate_images("a", loras=loras, **many)[0].sha256
        for loras in ([], [chromarpc.Lora("good.safetensors", 0.0)], ["good.safetensors"])
    )
    assert base == zero != full
    events = list(client.generate("a", loras=["good.safetensors"], **many))
    (prepared,) = [event for event in events if isinstance(event, chromarpc.Prepared)]
    (report,) = prepared.adapters
    assert (report.matched_key_count, report.unmatched_key_count, report.rank) == (2, 1, 4)
    assert [warning.code for warning in prepared.warnings] == ["LORA_KEYS_UNMATCHED"]
