"""A workflow's files among those of a server."""

from __future__ import annotations

from typing import Any

import pytest

from chromarpc.comfyui import MappedRequest, WorkflowNotMapped, read_workflow
from chromarpc.loras import LoraList, StoredLora
from chromarpc.v1 import model_service_pb2
from tests.client.comfyui_workflows import as_bytes, changed, custom_flow, ksampler_flow, served_model, stored_lora

INK = [stored_lora("styles/ink.safetensors")]
Model = model_service_pb2.Model


def mapped(models: list[Model], stored: Any = INK, flow: Any = None, **options: Any) -> MappedRequest:
    return read_workflow(as_bytes(flow or ksampler_flow())).map(models, stored, **options)


def problems(models: list[Model], loras: Any = INK, flow: Any = None, **options: Any) -> str:
    with pytest.raises(WorkflowNotMapped) as caught:
        mapped(models, loras, flow, **options)
    (problem,) = caught.value.problems
    return f"{problem}"


@pytest.mark.parametrize(
    "source",
    [
        "Chroma1-HD.safetensors",
        "chroma1-hd.SAFETENSORS",
        "lodestones/Chroma1-HD:Chroma1-HD.safetensors",
        "somebody/chroma:folder/Chroma1-HD.safetensors",
        "bundled:chroma/Chroma1-HD.safetensors",
    ],
)
def test_a_model_is_found_by_the_name_of_its_file(source: str) -> None:
    models = [
        served_model("a", "bundled:chroma-mini"),
        served_model("b", source),
        served_model("c", "x.safetensors"),
    ]
    assert mapped(models).request.model == "b"


def test_of_models_of_one_file_the_one_that_is_there_is_taken() -> None:
    absent = served_model("absent", weights_present=False)
    alias = served_model("alias", alias_of="present")
    assert mapped([absent, alias, served_model("present")]).request.model == "present"
    assert mapped([absent, alias]).request.model == "absent"


def test_a_file_that_no_model_has_is_named_with_the_models_there_are() -> None:
    said = problems([served_model("a", "x.safetensors"), served_model("b", "")])
    assert said == (
        "node 1 (UNETLoader), unet_name: no model of this server has the file Chroma1-HD.safetensors: give one of "
        "its models: a, b"
    )


def test_a_file_that_several_models_have_is_named_with_them() -> None:
    said = problems([served_model("a"), served_model("b"), served_model("c", "x.safetensors")])
    assert said.endswith("several models have a file Chroma1-HD.safetensors: give one of a, b")


def test_weights_that_comfyui_rounds_need_a_file_that_holds_them_so() -> None:
    flow = changed(ksampler_flow(), n1={"weight_dtype": "fp8_e4m3fn"})
    said = problems([served_model()], flow=flow)
    assert said.startswith("node 1 (UNETLoader), weight_dtype: weights are not rounded to fp8_e4m3fn here")
    assert mapped([served_model(stored_as="fp8 e4m3fn")], flow=flow).request.model == "chroma1-hd"


@pytest.mark.parametrize("side", ["width", "height"])
def test_a_size_that_would_be_floored_is_named(side: str) -> None:
    flow = changed(ksampler_flow(), n8={side: 1000})
    said = problems([served_model()], flow=flow)
    assert said.startswith(f"node 8 (EmptySD3LatentImage), {side}: is 1000, and chroma1-hd draws multiples of 32")
    assert mapped([served_model()], flow=flow, **{side: 512}).request.prompts[0].seed == 43


def test_the_profile_that_is_asked_for_says_which_sizes_there_are() -> None:
    flow = changed(ksampler_flow(), n8={"width": 1008})
    model = served_model(profiles=[model_service_pb2.ModelProfile(id="fine", resolution_divisor=16)])
    assert mapped([model], flow=flow, profile="fine").request.prompts[0].width == 1008


def test_comfyuis_own_shift_is_refused_where_the_model_would_be_drawn_with_another() -> None:
    flow = changed(custom_flow(), nguider={"model": ["model", 0]}, nsigmas={"model": ["model", 0]})
    defaults = model_service_pb2.ModelDefaults(schedule="simple", shift=1.0)
    model = served_model("m", "chroma1-hd-Q4_K_S.gguf", defaults=defaults)
    said = problems([model], flow=flow)
    assert said.startswith("node sigmas (BasicScheduler), model: no node sets a shift, so ComfyUI takes its own")
    assert mapped([model], flow=flow, shift=2.0).request.prompts[0].shift == 2.0
    defaults.schedule = "beta"  # whose shift is not taken for another schedule
    model = served_model("m", "chroma1-hd-Q4_K_S.gguf", defaults=defaults)
    assert not mapped([model], flow=flow).request.prompts[0].HasField("shift")


@pytest.mark.parametrize(
    ("stored", "path"),
    [
        (stored_lora("styles/ink.safetensors"), "styles/ink.safetensors"),
        (stored_lora("comfyui/loras/styles/ink.safetensors"), "comfyui/loras/styles/ink.safetensors"),
        (stored_lora("Styles/Ink.safetensors"), "Styles/Ink.safetensors"),
        (stored_lora("other/ink.safetensors"), "other/ink.safetensors"),
        (stored_lora("sha256:" + "ab" * 32, "ink.safetensors"), "sha256:" + "ab" * 32),
    ],
)
def test_an_adapter_is_found_by_its_path_or_its_name(stored: StoredLora, path: str) -> None:
    found = mapped([served_model()], [stored_lora("a.safetensors"), stored])
    assert [lora.path for lora in found.request.loras] == [path]
    named = "" if path == "styles/ink.safetensors" else f"styles/ink.safetensors is {path} on this server"
    assert named in "".join(found.remarks)


def test_the_exact_path_is_taken_before_any_other() -> None:
    stored = [stored_lora("a/styles/ink.safetensors"), stored_lora("styles/ink.safetensors")]
    assert [lora.path for lora in mapped([served_model()], stored).request.loras] == ["styles/ink.safetensors"]


def test_an_adapter_that_is_not_there_is_named() -> None:
    said = problems([served_model()], [stored_lora("styles/pen.safetensors")])
    assert said.startswith(
        "node 4 (LoraLoaderModelOnly), lora_name: this server has no adapter styles/ink.safetensors"
    )


def test_an_adapter_that_may_be_several_is_named_with_them() -> None:
    said = problems([served_model()], [stored_lora("a/ink.safetensors"), stored_lora("b/ink.safetensors")])
    assert said.endswith("are called styles/ink.safetensors: a/ink.safetensors, b/ink.safetensors")


def test_an_adapter_beyond_what_a_server_lists_is_asked_for_by_its_name() -> None:
    listing = LoraList(loras=(stored_lora("a.safetensors"),), truncated=True)
    assert [lora.path for lora in mapped([served_model()], listing).request.loras] == ["styles/ink.safetensors"]


def test_another_text_encoder_or_autoencoder_than_the_workflows_is_said() -> None:
    parts = [
        model_service_pb2.ModelPart(part="transformer", source="Chroma1-HD.safetensors"),
        model_service_pb2.ModelPart(part="text_encoder", source="t5xxl_fp8_e4m3fn_scaled.safetensors"),
        model_service_pb2.ModelPart(part="autoencoder", source="ae.safetensors"),
    ]
    assert mapped([served_model(parts=parts)]).remarks == (
        "the text encoder is chroma1-hd's, t5xxl_fp8_e4m3fn_scaled.safetensors, not t5xxl_fp16.safetensors",
    )


def test_without_a_server_the_model_has_to_be_given() -> None:
    with pytest.raises(WorkflowNotMapped, match=r"give the model that .*Chroma1-HD.safetensors is on the server"):
        read_workflow(as_bytes(ksampler_flow())).request()


@pytest.mark.parametrize("name", ["https://example.org/a.safetensors", "HTTP:\\\\example.org\\a.safetensors"])
@pytest.mark.parametrize("loras", [None, LoraList(loras=(), truncated=True), INK])
def test_a_workflow_has_no_server_fetch_an_adapter(name: str, loras: Any) -> None:
    flow = changed(ksampler_flow(), n4={"lora_name": name})
    assert "is an address, which no workflow may have fetched" in problems([served_model()], loras, flow)
    given = mapped([served_model()], loras, flow, loras="https://example.org/a.safetensors")
    assert given.request.loras[0].path == "https://example.org/a.safetensors"
