"""What a workflow becomes: node types, one by one, and the request of the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chromarpc import Lora
from chromarpc.comfyui import Workflow, WorkflowNotMapped, read_workflow
from chromarpc.request import Prompt, build_request
from tests.client.comfyui_workflows import (
    Flow,
    as_bytes,
    changed,
    custom_flow,
    ksampler_flow,
    node,
    replaced,
    served_model,
    stored_lora,
)

MODELS = [served_model("chroma"), served_model()]
LORAS = [stored_lora("other.safetensors"), stored_lora("styles/ink.safetensors")]


def read(flow: Flow) -> Workflow:
    return read_workflow(as_bytes(flow))


def test_a_workflow_of_a_ksampler_becomes_a_request(tmp_path: Path) -> None:
    path = tmp_path / "flow.json"
    path.write_bytes(as_bytes(ksampler_flow()))
    models = [served_model("chroma", "lodestones/Chroma1-Base:Chroma1-Base.safetensors"), served_model()]
    assert read_workflow(path).request(models, LORAS) == build_request(
        "a (red:1.2) circle",
        model="chroma1-hd",
        loras=Lora("styles/ink.safetensors", 0.8),
        settings="comfyui",
        width=1024,
        height=768,
        sample_steps=26,
        guidance_scale=3.5,
        seed=43,
        neg="blurry",
        use_neg=True,
        sampler="euler",
        schedule="beta",
        shift=1.0,
    )


def test_a_workflow_of_custom_sampling_becomes_a_request() -> None:
    request = read(custom_flow()).request([served_model("mine", "chroma1-hd-Q4_K_S.gguf")])
    assert request == build_request(
        "a cat\non a mat",
        model="mine",
        settings="comfyui",
        width=512,
        height=512,
        sample_steps=30,
        guidance_scale=4.0,
        seed=7,
        sampler="res_multistep",
        schedule="simple",
        shift=1.5,
    )


def test_sampler_custom_says_what_a_ksampler_says() -> None:
    flow = ksampler_flow()
    flow |= {
        "9": node(
            "SamplerCustom",
            add_noise=True,
            noise_seed=43,
            cfg=3.5,
            sampler=["20", 0],
            sigmas=["21", 0],
            model=["5", 0],
            positive=["6", 0],
            negative=["7", 0],
            latent_image=["8", 0],
        ),
        "20": node("KSamplerSelect", sampler_name="euler"),
        "21": node("BetaSamplingScheduler", steps=26, alpha=0.6, beta=0.6, model=["5", 0]),
    }
    assert read(flow).request(MODELS[1:], LORAS) == read(ksampler_flow()).request(MODELS[1:], LORAS)


def test_an_advanced_ksampler_of_the_whole_range_is_a_ksampler() -> None:
    flow = changed(
        ksampler_flow(),
        n9={
            "seed": None,
            "denoise": None,
            "noise_seed": 43,
            "add_noise": "enable",
            "start_at_step": 0,
            "end_at_step": 10_000,
            "return_with_leftover_noise": "disable",
        },
    )
    flow["9"]["class_type"] = "KSamplerAdvanced"
    assert read(flow).request(MODELS[1:], LORAS) == read(ksampler_flow()).request(MODELS[1:], LORAS)


@pytest.mark.parametrize(
    ("number", "class_type", "inputs", "file"),
    [
        ("1", "CheckpointLoaderSimple", {"ckpt_name": "all.safetensors"}, "all.safetensors"),
        ("1", "UnetLoaderGGUF", {"unet_name": "a.gguf"}, "a.gguf"),
        (
            "1",
            "UnetLoaderGGUFAdvanced",
            {"unet_name": "a.gguf", "dequant_dtype": "default", "patch_dtype": "default", "patch_on_device": True},
            "a.gguf",
        ),
        ("1", "UNETLoader", {"unet_name": ["20", 0], "weight_dtype": "default"}, "linked.safetensors"),
    ],
)
def test_every_loader_names_its_file(number: str, class_type: str, inputs: dict[str, Any], file: str) -> None:
    flow = replaced(ksampler_flow(), number, class_type, **inputs)
    flow["20"] = node("PrimitiveString", value="linked.safetensors")
    assert read(flow).model_file.name == file


def test_a_file_of_everything_gives_text_encoder_and_autoencoder_too() -> None:
    flow = replaced(ksampler_flow(), "1", "CheckpointLoaderSimple", ckpt_name="all.safetensors")
    flow = changed(flow, n6={"clip": ["1", 1]}, n7={"clip": ["1", 1]}, n10={"vae": ["1", 2]})
    workflow = read(flow)
    assert (workflow.text_encoder_file, workflow.autoencoder_file) == ("", "")


ROWS = {
    "PowerLoraLoaderHeaderWidget": {"type": "PowerLoraLoaderHeaderWidget"},
    "lora_1": {"on": True, "lora": "a.safetensors", "strength": 0.5, "strengthTwo": None},
    "lora_2": {"on": False, "lora": "off.safetensors", "strength": 1},
    "lora_3": {"on": True, "lora": "b.safetensors", "strength": -1, "strengthTwo": 0},
    "➕ Add Lora": "",
}
STACK = {
    "lora_01": "a.safetensors",
    "strength_01": 0.5,
    "lora_02": "None",
    "strength_02": 1.0,
    "lora_03": "off.safetensors",
    "strength_03": 0,
    "lora_04": "b.safetensors",
    "strength_04": -1.0,
}


@pytest.mark.parametrize(
    ("class_type", "inputs"), [("Power Lora Loader (rgthree)", ROWS), ("Lora Loader Stack (rgthree)", STACK)]
)
def test_nodes_of_several_adapters_give_those_that_are_on(class_type: str, inputs: dict[str, Any]) -> None:
    flow = replaced(ksampler_flow(), "4", class_type, model=["1", 0], clip=["2", 0], **inputs)
    names = [(adapter.name, adapter.multiplier) for adapter in read(flow).adapters]
    assert names == [("a.safetensors", 0.5), ("b.safetensors", -1.0)]


def test_adapters_come_in_the_order_in_which_they_are_applied() -> None:
    flow = ksampler_flow()
    flow["20"] = node(
        "LoraLoader",
        lora_name="first.safetensors",
        strength_model=1.0,
        strength_clip=0.0,
        model=["1", 0],
        clip=["2", 0],
    )
    workflow = read(changed(flow, n4={"model": ["20", 0]}))
    assert [adapter.name for adapter in workflow.adapters] == ["first.safetensors", "styles\\ink.safetensors"]


def test_an_adapter_of_strength_0_is_none() -> None:
    assert read(changed(ksampler_flow(), n4={"strength_model": 0})).adapters == ()


def test_a_strength_for_the_text_encoder_is_said_to_have_no_effect() -> None:
    lora = {"lora_name": "a.safetensors", "strength_model": 1.0, "model": ["1", 0], "clip": ["2", 0]}
    flow = replaced(ksampler_flow(), "4", "LoraLoader", **lora, strength_clip=1.0)
    encoded = changed(flow, n6={"clip": ["4", 1]}, n7={"clip": ["4", 1]})
    (remark,) = read(encoded).remarks
    assert remark.startswith("node 4 (LoraLoader), strength_clip: an adapter's part for the text encoder")
    assert read(changed(encoded, n4={"strength_clip": 0.0})).remarks == ()
    assert read(flow).remarks == ()  # whose texts do not go through it


@pytest.mark.parametrize(
    ("class_type", "inputs", "shift"),
    [
        ("ModelSamplingAuraFlow", {"shift": 3}, 3.0),
        ("ModelSamplingFlux", {"max_shift": 1.15, "base_shift": 0.5, "width": 1024, "height": 1024}, None),
        ("ModelSamplingFlux", {"max_shift": 1.15, "base_shift": 1.15, "width": 64, "height": 96}, None),
        ("TorchCompileModel", {"backend": "inductor"}, None),
    ],
)
def test_the_shift_is_that_of_the_node_of_model_sampling(
    class_type: str, inputs: dict[str, Any], shift: float | None
) -> None:
    assert read(replaced(ksampler_flow(), "5", class_type, model=["4", 0], **inputs)).shift == shift


def test_of_two_shifts_the_one_nearest_to_the_sampler_counts() -> None:
    flow = ksampler_flow()
    flow["20"] = node("ModelSamplingSD3", shift=9.0, model=["1", 0])
    assert read(changed(flow, n4={"model": ["20", 0]})).shift == 1.0


def test_the_shift_is_that_of_the_schedules_model_where_the_guiders_is_another() -> None:
    assert read(changed(custom_flow(), nsigmas={"model": ["model", 0]})).shift is None
    assert read(changed(custom_flow(), nguider={"model": ["model", 0]})).shift == 1.5


def test_a_basic_guider_makes_one_pass() -> None:
    flow = replaced(custom_flow(), "guider", "BasicGuider", model=["shifted", 0], conditioning=["yes", 0])
    workflow = read(flow)
    assert (workflow.guidance_scale, workflow.neg) == (1.0, "")


def test_at_guidance_1_the_negative_text_may_be_anything_and_is_not_sent() -> None:
    flow = replaced(ksampler_flow(), "7", "ConditioningZeroOut", conditioning=["6", 0])
    flow = changed(flow, n9={"cfg": 1.0, "steps": 8, "sampler_name": "heun"})
    request = read(flow).request(MODELS[1:], LORAS)
    assert not request.prompts[0].HasField("neg")
    assert not request.prompts[0].HasField("use_neg")
    request = read(changed(ksampler_flow(), n9={"cfg": 1.0})).request(MODELS[1:], LORAS)
    assert not request.prompts[0].HasField("neg")


@pytest.mark.parametrize(("seed", "sent"), [(0, 0), (2**63 - 1, 2**63 - 1), (2**63, 0), (2**64 - 1, 2**63 - 1)])
def test_a_seed_that_no_request_holds_is_sent_as_one_of_the_same_noise(seed: int, sent: int) -> None:
    workflow = read(changed(ksampler_flow(), n9={"seed": seed}))
    assert workflow.seed == sent
    assert (seed != sent) == ("the same noise" in " ".join(workflow.remarks))


@pytest.mark.parametrize("kind", ["DualCLIPLoader", "DualCLIPLoaderGGUF"])
def test_two_encoders_are_read_as_t5_alone_where_nothing_is_padded_or_weighed(kind: str) -> None:
    flow = replaced(
        custom_flow(), "clip", kind, clip_name1="l.safetensors", clip_name2="t5.safetensors", type="flux"
    )
    assert read(flow).prompt == "a cat\non a mat"


def test_the_saved_picture_is_taken_rather_than_the_one_that_is_shown() -> None:
    flow = ksampler_flow()
    flow["20"] = node("PreviewImage", images=["21", 0])
    flow["21"] = node("ImageInvert", image=["10", 0])
    workflow = read(flow)
    assert workflow.seed == 43
    assert workflow.remarks == ("node 20 (PreviewImage) is left out, since another node saves the picture",)


def test_one_picture_that_is_saved_and_shown_is_one() -> None:
    flow = ksampler_flow()
    flow["20"] = node("SaveImageWebsocket", images=["10", 0])
    assert read(flow).seed == 43


def test_a_body_for_comfyuis_own_port_is_read_too() -> None:
    flow = ksampler_flow()
    assert read_workflow(as_bytes({"prompt": flow, "client_id": "x"})) == read(flow)


def test_nodes_that_nothing_is_drawn_from_may_be_anything() -> None:
    flow = ksampler_flow()
    flow["20"] = node("Anything", samples=["21", 0])
    assert read(flow) == read(ksampler_flow())


def test_options_stand_in_the_place_of_what_the_workflow_says() -> None:
    flow = changed(ksampler_flow(), n8={"width": 1000})
    request = read(flow).request(
        MODELS,
        prompt="a dog",
        model="chroma",
        loras="mine.safetensors",
        width=512,
        seed=9,
        guidance_scale=2.0,
        shift=3.0,
        sampler="heun",
        profile="fp8",
        neg=None,
    )
    assert request.model == "chroma"
    assert [lora.path for lora in request.loras] == ["mine.safetensors"]
    assert (
        request.prompts[0]
        == build_request(
            Prompt(
                "a dog",
                width=512,
                height=768,
                seed=9,
                guidance_scale=2.0,
                sample_steps=26,
                shift=3.0,
                sampler="heun",
                schedule="beta",
                neg="blurry",
                use_neg=True,
            )
        ).prompts[0]
    )
    assert (request.profile, request.settings) == ("fp8", "comfyui")


def test_without_a_server_names_stay_as_they_are_and_the_model_has_to_be_given() -> None:
    request = read(ksampler_flow()).request(model="chroma")
    assert (request.model, request.loras[0].path) == ("chroma", "styles/ink.safetensors")


ANY = ["20", 0]


@pytest.mark.parametrize(
    ("flow", "changes", "options"),
    [
        (ksampler_flow(), {"n9": {"seed": ANY}}, {"seed": 9}),
        (ksampler_flow(), {"n9": {"steps": ANY, "cfg": ANY}}, {"sample_steps": 9, "guidance_scale": 2.0}),
        (
            ksampler_flow(),
            {"n9": {"sampler_name": ANY, "scheduler": ANY}},
            {"sampler": "heun", "schedule": "simple"},
        ),
        (ksampler_flow(), {"n8": {"width": ANY, "height": ANY}}, {"width": 512, "height": 512}),
        (ksampler_flow(), {"n6": {"text": ANY}}, {"prompt": "a dog"}),
        (ksampler_flow(), {"n9": {"negative": ANY}}, {"neg": "dull"}),
        (ksampler_flow(), {"n5": {"shift": ANY}}, {"shift": 2.0}),
        (ksampler_flow(), {"n4": {"lora_name": ANY}}, {"loras": "a.safetensors"}),
        (ksampler_flow(), {"n4": {"model": ANY}}, {"model": "chroma"}),
        (custom_flow(), {"nseed": {"value": ANY}}, {"seed": 9}),
        (custom_flow(), {"nsampler": {"sampler": ANY}}, {"sampler": "heun"}),
        (custom_flow(), {"nsigmas": {"scheduler": ANY, "steps": ANY}}, {"schedule": "beta", "sample_steps": 9}),
    ],
)
def test_what_the_caller_says_is_not_read_and_may_come_from_anywhere(
    flow: Flow, changes: dict[str, Any], options: dict[str, Any]
) -> None:
    """Node 20 is of a kind that nobody knows here."""
    content = as_bytes({**changed(flow, **changes), "20": node("Anything", any=1)})
    with pytest.raises(WorkflowNotMapped, match="node 20"):
        read_workflow(content)
    workflow = read_workflow(content, given=options)
    said = {"model": "chroma", **options}
    assert workflow.request(**said).model == "chroma"
    said.pop(next(iter(options)))
    with pytest.raises(ValueError, match=r"to be given: .*" + next(iter(options))):
        workflow.request(MODELS, **said)
