"""Files that workflows come in, whole and hostile."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from chromarpc.comfyui import NoWorkflow, WorkflowError, WorkflowNotMapped, files, read_workflow
from tests.client.comfyui_workflows import as_bytes, changed, ksampler_flow, node
from tests.client.picture_files import HOSTILE, RECORD, WORKFLOW, comfyui_webp, pixels, png_with, saved


def test_a_picture_of_comfyui_gives_the_workflow_that_drew_it(tmp_path: Path) -> None:
    path = tmp_path / "ComfyUI_00001_.png"
    path.write_bytes(png_with({"prompt": ksampler_flow(), "workflow": WORKFLOW}))
    drawn = read_workflow(as_bytes(ksampler_flow()))
    assert read_workflow(path) == drawn
    assert read_workflow(f"{path}") == drawn
    assert read_workflow(png_with({"prompt": ksampler_flow()}, compressed=True)) == drawn
    assert read_workflow(comfyui_webp(ksampler_flow())) == drawn


def test_the_pixels_of_a_picture_are_never_decoded() -> None:
    picture = png_with({"prompt": ksampler_flow()}, Image.new("RGB", (256, 256)))
    at = picture.index(b"IDAT")
    broken = picture[: at + 4] + bytes(len(picture) - at - 4 - 12) + picture[-12:]
    # The texts come before the pixels; what follows has to be a chunk, whatever is in it.
    assert read_workflow(broken).seed == 43


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not JSON"),
        (b"hello", "is not JSON"),
        (b"\x80abc", "neither a picture that can be read here nor text"),
        (b"[1, 2]", "is JSON, but no object"),
        (b"{}", "has no node"),
        (b'{"1": {"class_type": 5, "inputs": {}}, "2": 3}', "has no node"),
        (as_bytes(WORKFLOW), "in the editor's form"),
        (as_bytes({"prompt": "a cat", "width": 64}), "has no node"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"1": {"class_type": "A", "inputs": {"a": ' + b"9" * 5000 + b"}}}", "thousands of digits"),
        (b" " * (files.MAX_TEXT_BYTES + 1), "bytes of text"),
        (as_bytes({f"{number}": node("A") for number in range(files.MAX_NODES + 1)}), "more than 10000 nodes"),
        (png_with({"workflow": WORKFLOW}), "holds the editor's form of its workflow alone"),
        (png_with({"chromarpc": RECORD}), "is a picture of this service"),
        (png_with({"parameters": "a cat"}), "is a picture without a workflow"),
        (saved(pixels(), "JPEG"), "is a picture without a workflow"),
        (png_with({"prompt": "no JSON"}), "is not JSON"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_a_file_without_a_workflow_says_what_it_is(content: bytes, said: str) -> None:
    with pytest.raises(NoWorkflow, match=said):
        read_workflow(content)


@pytest.mark.parametrize("content", [content for content, _ in HOSTILE])
def test_a_hostile_picture_is_a_workflow_error(content: bytes) -> None:
    with pytest.raises(NoWorkflow):
        read_workflow(content)


def test_a_file_larger_than_any_workflow_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 2**20)
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(2**31)
    with pytest.raises(NoWorkflow, match="has more than 1 MiB"):
        read_workflow(path)


def test_a_file_that_cannot_be_read_is_the_systems_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_workflow(tmp_path / "nothing.json")


def test_links_of_any_shape_end_and_take_no_time() -> None:
    shapes: list[Any] = [
        [], [1], ["9", 0], [["9", 0], 0], {"9": 0}, None, "9", 9.5, [None, None], [True, False], ["9", "0"],
        [-1, -1], ["9", 10**30],
    ]  # fmt: skip
    flow = ksampler_flow()
    began = time.process_time()
    for number, described in flow.items():
        for name in described["inputs"]:
            for shape in shapes:
                try:
                    read_workflow(as_bytes(changed(flow, **{f"n{number}": {name: shape}})))
                except WorkflowError as error:
                    assert len(str(error)) < 5000
    assert time.process_time() - began < 10


def test_long_chains_end() -> None:
    flow = ksampler_flow()
    for number in range(1000):
        flow[f"x{number}"] = node("TorchCompileModel", model=[f"x{number + 1}", 0])
        flow[f"r{number}"] = {"class_type": "Reroute", "inputs": {"": [f"r{number + 1}", 0]}}
    flow |= {"x1000": flow["1"], "r1000": {"class_type": "Reroute", "inputs": {"": ["10", 0]}}}
    flow["5"]["inputs"]["model"] = ["x0", 0]
    flow["11"]["inputs"]["images"] = ["r0", 0]
    assert read_workflow(as_bytes(flow)).seed == 43


def test_a_circle_of_every_line_ends() -> None:
    flow = ksampler_flow()
    flow["4"]["inputs"]["model"] = ["5", 0]
    flow["20"] = node("T5TokenizerOptions", min_padding=0, min_length=0, clip=["20", 0])
    flow["21"] = node("FluxGuidance", guidance=0, conditioning=["21", 0])
    flow = changed(flow, n6={"clip": ["20", 0]}, n9={"negative": ["21", 0]})
    with pytest.raises(WorkflowNotMapped) as caught:
        read_workflow(as_bytes(flow))
    assert ["circle" in problem.reason for problem in caught.value.problems] == [True] * 3


def test_numbers_that_json_has_not_are_read_where_nothing_needs_them() -> None:
    # ComfyUI writes NaN beside the inputs of nodes that are always run anew.
    flow = ksampler_flow()
    flow["9"]["is_changed"] = [float("nan")]
    text = json.dumps(flow)
    assert "NaN" in text
    assert read_workflow(text.encode()).seed == 43
    assert read_workflow(io.BytesIO(text.encode("utf-16")).getvalue()).seed == 43
