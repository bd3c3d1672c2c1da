"""What of a workflow no request can hold: it is named by node, input and reason, and nothing else is."""

from __future__ import annotations

from typing import Any

import pytest

from chromarpc.comfyui import WorkflowNotMapped, read_workflow
from tests.client.comfyui_workflows import Flow, as_bytes, changed, custom_flow, ksampler_flow, node, replaced


def problems(flow: Flow) -> list[str]:
    with pytest.raises(WorkflowNotMapped) as caught:
        read_workflow(as_bytes(flow))
    return [str(problem) for problem in caught.value.problems]


KSAMPLER: list[tuple[str, dict[str, Any], str]] = [
    ("n9", {"denoise": 0.6}, "node 9 (KSampler), denoise: 0.6 begins with a picture"),
    ("n9", {"seed": -1}, "node 9 (KSampler), seed: must be 0 to"),
    ("n9", {"seed": 2**64}, "node 9 (KSampler), seed: must be 0 to"),
    ("n9", {"seed": "7"}, "node 9 (KSampler), seed: must be a whole number, is '7'"),
    ("n9", {"seed": True}, "node 9 (KSampler), seed: must be a whole number, is True"),
    ("n9", {"steps": 7.5}, "node 9 (KSampler), steps: must be a whole number, is 7.5"),
    ("n9", {"steps": None}, "node 9 (KSampler), steps: is missing"),
    ("n9", {"cfg": float("nan")}, "node 9 (KSampler), cfg: must be a number, is nan"),
    ("n9", {"cfg": [1]}, "node 9 (KSampler), cfg: must be a number, is a list"),
    ("n9", {"scheduler": "flowmatch"}, "node 9 (KSampler), scheduler: 'flowmatch' is none of ComfyUI's"),
    (
        "n9",
        {"sampler_name": ["20", 0]},
        "node 9 (KSampler), sampler_name: is linked to node 20, which is not there",
    ),
    ("n9", {"sampler_name": ["3", 0]}, "sampler_name: comes from node 3 (VAELoader), whose value is not known"),
    ("n9", {"latent_image": ["9", 0]}, "node 9 (KSampler), latent_image: continues what node 9 (KSampler) drew"),
    ("n9", {"latent_image": ["3", 0]}, "node 3 (VAELoader): a picture has to begin with EmptyLatentImage"),
    ("n9", {"latent_image": 5}, "node 9 (KSampler), latent_image: is no link to another node"),
    ("n8", {"batch_size": 4}, "node 8 (EmptySD3LatentImage), batch_size: the noise of 4 pictures is one draw"),
    ("n10", {"samples": ["9", 1]}, "node 10 (VAEDecode), samples: output 1 of node 9 (KSampler) cannot be drawn"),
    ("n10", {"samples": ["8", 0]}, "node 8 (EmptySD3LatentImage): is no sampler that is known here"),
    ("n3", {"vae_name": "taef1"}, "node 3 (VAELoader), vae_name: taef1 is another decoder"),
    ("n10", {"vae": ["1", 0]}, "node 1 (UNETLoader): is no autoencoder that is known here"),
    ("n1", {"weight_dtype": "fp8_e4m3fn_fast"}, "node 1 (UNETLoader), weight_dtype: fp8_e4m3fn_fast rounds"),
    ("n4", {"strength_model": "1"}, "node 4 (LoraLoaderModelOnly), strength_model: must be a number"),
    ("n5", {"model": ["5", 0]}, "node 5 (ModelSamplingAuraFlow), model: its links lead in a circle"),
    ("n5", {"model": ["4", 1]}, "node 5 (ModelSamplingAuraFlow), model: output 1 of node 4"),
    ("n2", {"type": "sd3"}, "node 2 (CLIPLoader), type: encodes texts otherwise than Chroma's own type"),
    ("n6", {"clip": ["1", 1]}, "node 1 (UNETLoader): what it does to the text encoder is not known here"),
    ("n6", {"clip": ["4", 0]}, "node 6 (CLIPTextEncode), clip: output 0 of node 4"),
    ("n11", {"images": None}, "node 11 (SaveImage), images: is missing"),
]


@pytest.mark.parametrize(("number", "inputs", "said"), KSAMPLER)
def test_an_input_that_no_request_holds_is_named(number: str, inputs: dict[str, Any], said: str) -> None:
    (problem,) = problems(changed(ksampler_flow(), **{number: inputs}))
    assert said in problem


NODES: list[tuple[str, str, dict[str, Any], str]] = [
    ("5", "TeaCache", {"model": ["4", 0]}, "node 5 (TeaCache): what it does to the model is not known here"),
    ("5", "ModelSamplingSD3", {"model": ["4", 0], "shift": 3.0}, "a thousand times the noise level"),
    (
        "5",
        "ModelSamplingFlux",
        {"model": ["4", 0], "max_shift": 1.15, "base_shift": 0.5, "width": 512, "height": 512},
        "node 5 (ModelSamplingFlux), max_shift: a shift of 0.63 by the size",
    ),
    ("6", "FluxGuidance", {"conditioning": ["7", 0], "guidance": 3.5}, "node 6 (FluxGuidance), guidance: "),
    ("6", "ConditioningCombine", {}, "node 6 (ConditioningCombine): what it does to a text is not known here"),
    ("7", "ConditioningZeroOut", {"conditioning": ["6", 0]}, "node 7 (ConditioningZeroOut): zeros in place"),
    ("8", "VAEEncode", {"pixels": ["20", 0], "vae": ["3", 0]}, "node 8 (VAEEncode): a picture has to begin"),
    ("9", "KSampler (Efficient)", {}, "node 9 (KSampler (Efficient)): is no sampler that is known here"),
    ("10", "VAEDecodeTiled", {"samples": ["9", 0], "vae": ["3", 0]}, "node 10 (VAEDecodeTiled): decodes in tiles"),
    ("10", "ImageScaleBy", {"image": ["20", 0]}, "node 10 (ImageScaleBy): what it does to the picture"),
    ("11", "Anything", {"images": ["10", 0]}, "it has no node that saves or shows a picture"),
    (
        "1",
        "UnetLoaderGGUFAdvanced",
        {"unet_name": "a.gguf", "dequant_dtype": "float16", "patch_dtype": "default"},
        "node 1 (UnetLoaderGGUFAdvanced), dequant_dtype: only",
    ),
    (
        "4",
        "Power Lora Loader (rgthree)",
        {"model": ["1", 0], "lora_1": {"on": True, "lora": "a.safetensors", "strength": "1"}},
        "node 4 (Power Lora Loader (rgthree)), lora_1: its strength is no number",
    ),
]


@pytest.mark.parametrize(("number", "class_type", "inputs", "said"), NODES)
def test_a_node_that_no_request_holds_is_named(
    number: str, class_type: str, inputs: dict[str, Any], said: str
) -> None:
    (problem,) = problems(replaced(ksampler_flow(), number, class_type, **inputs))
    assert said in problem


CUSTOM: list[tuple[str, dict[str, Any], str]] = [
    ("nselect", {"sampler_name": "uni_pc"}, "node select (KSamplerSelect), sampler_name: uni_pc leaves out"),
    ("nsigmas", {"denoise": 0.99}, "node sigmas (BasicScheduler), denoise: 0.99 begins with a picture"),
    ("noptions", {"min_padding": 1}, "node options (T5TokenizerOptions), min_padding: texts are not padded here"),
    ("noptions", {"min_length": 256}, "node options (T5TokenizerOptions), min_length: texts are not padded here"),
    ("nnoise", {"noise_seed": ["sigmas", 0]}, "node noise (RandomNoise), noise_seed: comes from node sigmas"),
    ("nreroute", {"": ["reroute", 0]}, "node save (PreviewImage), images: its links lead in a circle"),
    (
        "nreroute",
        {"": None},
        "node save (PreviewImage), images: is linked to node reroute (Reroute), which has no",
    ),
    ("nseed", {"value": ["seed", 0]}, "node noise (RandomNoise), noise_seed: its links lead in a circle"),
]


@pytest.mark.parametrize(("name", "inputs", "said"), CUSTOM)
def test_an_input_of_custom_sampling_that_no_request_holds_is_named(
    name: str, inputs: dict[str, Any], said: str
) -> None:
    (problem,) = problems(changed(custom_flow(), **{name: inputs}))
    assert said in problem


CUSTOM_NODES: list[tuple[str, str, dict[str, Any], str]] = [
    ("noise", "DisableNoise", {}, "node noise (DisableNoise): is no noise that is known here"),
    ("guider", "PerpNegGuider", {}, "node guider (PerpNegGuider): is no guider that is known here"),
    ("select", "SamplerEulerAncestral", {}, "node select (SamplerEulerAncestral): is no choice of a sampler"),
    ("sigmas", "SplitSigmas", {}, "node sigmas (SplitSigmas): is no schedule that is known here"),
    (
        "sigmas",
        "BetaSamplingScheduler",
        {"steps": 8, "alpha": 0.5, "beta": 0.6, "model": ["model", 0]},
        "node sigmas (BetaSamplingScheduler), alpha: the schedule beta has 0.6 here, not 0.5",
    ),
    (
        "clip",
        "DualCLIPLoader",
        {"clip_name1": "a", "clip_name2": "b", "type": "sdxl"},
        "node clip (DualCLIPLoader), type: pads the text",
    ),
]


@pytest.mark.parametrize(("number", "class_type", "inputs", "said"), CUSTOM_NODES)
def test_a_node_of_custom_sampling_that_no_request_holds_is_named(
    number: str, class_type: str, inputs: dict[str, Any], said: str
) -> None:
    (problem,) = problems(replaced(custom_flow(), number, class_type, **inputs))
    assert said in problem


ADVANCED: list[tuple[dict[str, Any], str]] = [
    ({"add_noise": "disable"}, "add_noise: here each picture begins with noise"),
    ({"start_at_step": 3}, "start_at_step: here each picture is drawn from the first step on"),
    ({"end_at_step": 20}, "end_at_step: here each picture is drawn to its last step"),
]


@pytest.mark.parametrize(("inputs", "said"), ADVANCED)
def test_a_part_of_the_range_of_an_advanced_ksampler_is_refused(inputs: dict[str, Any], said: str) -> None:
    whole = {"noise_seed": 1, "add_noise": "enable", "start_at_step": 0, "end_at_step": 26}
    flow = changed(ksampler_flow(), n9={**whole, **inputs})
    flow["9"]["class_type"] = "KSamplerAdvanced"
    (problem,) = problems(flow)
    assert problem.startswith(f"node 9 (KSamplerAdvanced), {said}")


def test_a_sampler_without_noise_is_refused() -> None:
    flow = replaced(
        custom_flow(),
        "sampler",
        "SamplerCustom",
        add_noise=False,
        noise_seed=1,
        cfg=1.0,
        sampler=["select", 0],
        sigmas=["sigmas", 0],
        model=["shifted", 0],
        positive=["yes", 0],
        negative=["no", 0],
        latent_image=["size", 0],
    )
    assert problems(flow) == [
        "node sampler (SamplerCustom), add_noise: here each picture begins with noise: only true"
    ]


def test_prompt_weights_are_refused_where_they_mean_something_else() -> None:
    flow = replaced(custom_flow(), "clip", "DualCLIPLoader", clip_name1="a", clip_name2="b", type="flux")
    (problem,) = problems(changed(flow, nwords={"value": "a (red:1.2) cat"}))
    assert problem.startswith("node yes (CLIPTextEncode), text: prompt weights mean something else")


def test_two_encoders_pad_where_nothing_says_otherwise() -> None:
    flow = replaced(ksampler_flow(), "2", "DualCLIPLoader", clip_name1="a", clip_name2="b", type="flux")
    (problem,) = problems(flow)
    assert "add T5TokenizerOptions with 0 and 0" in problem


def test_several_pictures_are_refused_by_their_nodes() -> None:
    flow = ksampler_flow()
    flow["20"] = node("VAEDecode", samples=["9", 0], vae=["3", 0])
    flow["21"] = node("SaveImage", images=["20", 0])
    (problem,) = problems(flow)
    assert problem == "it draws several pictures (node 10 (VAEDecode), node 20 (VAEDecode)): leave one of them"


def test_everything_at_fault_is_told_at_once() -> None:
    flow = changed(
        ksampler_flow(),
        n9={"denoise": 0.5, "seed": -1},
        n8={"batch_size": 2},
        n2={"type": "sd3"},
        n3={"vae_name": "x"},
    )
    flow = replaced(flow, "5", "TeaCache", model=["4", 0])
    flow = replaced(flow, "4", "CFGZeroStar", model=["1", 0])
    assert len(problems(flow)) == 7


def test_names_out_of_a_file_are_cut_and_stay_on_their_line() -> None:
    (problem,) = problems(replaced(ksampler_flow(), "5", "x\n" * 5000, model=["4", 0]))
    assert "\n" not in problem
    assert len(problem) < 300


def test_problems_without_end_are_not_all_told() -> None:
    flow = ksampler_flow()
    for number in range(200):
        flow[f"x{number}"] = node("TeaCache", model=[f"x{number + 1}", 0])
    flow["x200"] = flow["1"]
    assert len(problems(changed(flow, n5={"model": ["x0", 0]}))) == 50
