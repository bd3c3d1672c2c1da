"""Pictures of a real server, by gRPC and by HTTP, through `chromarpc explain`, `compare` and `generate --json`."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from chromarpc import Client, Lora
from chromarpc.cli import app
from chromarpc.events import ImageFormat
from tests.conftest import RunningServer
from tests.integration.test_gateway import Web, gateway_to, generate, wait_until_served
from tests.tiny_checkpoint import GOLDENS

RECORDED = GOLDENS / "adapters" / "aitk.safetensors"
SMALL: dict[str, Any] = {
    "model": "chroma-mini",
    "width": 64,
    "height": 64,
    "sample_steps": 2,
    "guidance_scale": 1.0,
}
SUFFIXES: dict[ImageFormat, str] = {"png": "png", "jpeg": "jpg", "webp": "webp"}


def shell(*arguments: str, target: str = "127.0.0.1:1") -> Any:
    result = CliRunner().invoke(app, list(arguments), env={"CHROMARPC_TARGET": target})
    assert "Traceback" not in result.stderr
    return result


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture(scope="module")
def web(server: RunningServer) -> Iterator[Web]:
    with gateway_to(server.port) as running:
        wait_until_served(running)
        yield running


def fetch(web: Web, image_format: ImageFormat, **options: Any) -> bytes:
    """A picture by the reference's HTTP API."""
    prompt = {key: value for key, value in (SMALL | options).items() if key != "model"}
    body = {
        "model": "chroma-mini",
        "prompts": [{"prompt": "a cät", **prompt}],
        "output": {"format": f"IMAGE_FORMAT_{image_format.upper()}"},
    }
    (image,) = generate(web, body)["outputs"]["images"]
    return bytes(web.ask(image["url"].removeprefix(web.url)).body)


@pytest.mark.parametrize("image_format", list(SUFFIXES))
def test_a_picture_is_the_same_by_grpc_and_http_and_says_so(
    server: RunningServer, web: Web, image_format: ImageFormat
) -> None:
    a, b, c = (f"{name}.{SUFFIXES[image_format]}" for name in "abc")
    with Client(server.target) as client:
        (image,) = client.generate_images("a cät", output_format=image_format, **SMALL)
        image.save(a)
    Path(b).write_bytes(fetch(web, image_format))
    Path(c).write_bytes(fetch(web, image_format, seed=7, sample_steps=3))
    assert Path(a).read_bytes() == Path(b).read_bytes()

    facts = json.loads(shell("explain", b, "--json").stdout)["facts"]
    assert image.prepared is not None
    assert {name: facts[name]["value"] for name in ("prompt", "seed", "model", "model_revision", "device")} == {
        "prompt": "a cät",
        "seed": 42,
        "model": "chroma-mini",
        "model_revision": image.prepared.model_revision,
        "device": image.prepared.device,
    }
    same = shell("compare", a, b)
    assert (same.exit_code, same.stdout) == (0, "pixels: the same, and so is every byte\n")
    other = shell("compare", a, c)
    assert other.exit_code == 1
    assert other.stdout.splitlines()[:2] == ["seed: 42 → 7", "sample_steps: 2 → 3"]

    again = shell("generate", "--json", c, "--seed", "42", "--steps", "2", "-o", f"d.{SUFFIXES[image_format]}",
                  target=server.target)  # fmt: skip
    assert again.exit_code == 0, again.stderr
    assert "warning" not in again.stderr
    assert Path(f"d.{SUFFIXES[image_format]}").read_bytes() == Path(a).read_bytes()


def test_formats_of_one_picture_differ_in_nothing_but_their_encoding(server: RunningServer) -> None:
    with Client(server.target) as client:
        for image_format, suffix in SUFFIXES.items():
            client.generate_images("a", output_format=image_format, **SMALL)[0].save(f"a.{suffix}")
    result = shell("compare", "a.png", "a.webp")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[0] == "output.format: png → webp"
    assert json.loads(shell("compare", "a.png", "a.jpg", "--json").stdout)["differences"] == [
        "output.format",
        "output.quality",
    ]


def test_an_adapter_that_was_written_anew_is_told_before_it_is_drawn(
    serve: Callable[..., RunningServer], tmp_path: Path
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    shutil.copy(RECORDED, root / "a.safetensors")
    before = hashlib.sha256(RECORDED.read_bytes()).hexdigest()
    server = serve(lora_root=root)
    with Client(server.target) as client:
        client.generate_images("a", loras=Lora("a.safetensors", 0.5), **SMALL)[0].save("a.png")
        tensors = {key: value * 2 for key, value in load_file(RECORDED).items()}
        save_file(tensors, root / "a.safetensors")
        shutil.copy(RECORDED, root / "old.safetensors")
        now = hashlib.sha256((root / "a.safetensors").read_bytes()).hexdigest()
        for path in ("a.safetensors", "old.safetensors"):  # so that the server knows their hashes
            client.inspect_lora(path, model="chroma-mini")
        again = shell("generate", "--json", "a.png", "-o", "b.png", target=server.target)
        jobs = len(list(client.list_jobs()))
        lora = f"a.safetensors:0.5#sha256={before}"
        pinned = shell("generate", "--json", "a.png", "--lora", lora, "-o", "c.png", target=server.target)
        assert len(list(client.list_jobs())) == jobs
    assert again.exit_code == 0
    told = [line for line in again.stderr.splitlines() if "other content than recorded" in line]
    assert told[0].startswith(
        f"warning: a.safetensors has other content than recorded: {now[:12]}, not {before[:12]}"
    )
    assert "the recorded one is there as old.safetensors" in told[0]
    assert len(told) == 1
    assert pinned.exit_code == 4
    lines = shell("compare", "a.png", "b.png").stdout.splitlines()
    assert lines[0] == f"loras.0.sha256: {before} → {now}"
    assert not Path("c.png").exists()


def test_a_picture_that_carries_nothing_is_no_error_of_the_server(server: RunningServer) -> None:
    with Client(server.target) as client:
        for name, record in (("a.jpg", False), ("b.jpg", True)):
            (image,) = client.generate_images("a", output_format="jpeg-trainer", picture_record=record, **SMALL)
            image.save(name)
    assert shell("explain", "a.jpg").exit_code == 2
    assert shell("explain", "b.jpg").exit_code == 0
    compared = shell("compare", "a.jpg", "b.jpg")
    assert compared.exit_code == 0
    assert "seed: unknown → 42" in compared.stdout.splitlines()
