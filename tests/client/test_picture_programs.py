"""What each program writes into its pictures: ComfyUI, A1111, Forge."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from chromarpc.pictures.a1111 import parameters_facts
from chromarpc.pictures.comfyui import comfyui_facts
from tests.client.picture_files import A1111, COMFYUI, COMFYUI_CUSTOM, FORGE, WORKFLOW, values


def test_a_picture_of_comfyui_is_followed_from_where_it_is_saved() -> None:
    facts = comfyui_facts({"prompt": json.dumps(COMFYUI), "workflow": "{}"})
    assert values(facts) == {
        "model": "Chroma1-HD.safetensors",
        "dtype": None,
        "loras.0.path": "styles/ink.safetensors",
        "loras.0.sha256": None,
        "loras.0.network_multiplier": 0.8,
        "loras.0.placement": None,
        "prompt": "a red circle",
        "neg": "blurry",
        "seed": 43,
        "noise_draw": None,
        "sample_steps": 20,
        "sampler": "euler",
        "scheduler": "beta",
        "shift": 1.0,
        "settings": "comfyui",
        "guidance_scale": 3.5,
        "guidance": "classifier-free",
        "width": 64,
        "height": 64,
    }
    assert facts is not None
    assert facts.facts["scheduler"].note == "shift 1.0 (ModelSamplingAuraFlow)"
    assert facts.facts["loras.0.placement"].note
    assert facts.request is not None
    assert facts.request["settings"] == "comfyui"
    (prompt,) = facts.request["prompts"]
    assert (prompt["sampler"], prompt["schedule"], prompt["shift"]) == ("euler", "beta", 1.0)
    assert (prompt["neg"], prompt["use_neg"]) == ("blurry", True)


def test_names_that_have_no_counterpart_here_are_told_and_not_asked_for() -> None:
    graph = json.loads(json.dumps(COMFYUI_CUSTOM).replace("res_multistep", "euler_ancestral"))
    facts = comfyui_facts({"prompt": json.dumps(graph)})
    assert facts is not None
    assert facts.request is not None
    assert any("the sampler euler_ancestral has no counterpart" in remark for remark in facts.remarks)
    assert "sampler" not in facts.request["prompts"][0]


def test_samplers_of_several_nodes_and_lists_of_adapters_are_followed() -> None:
    facts = comfyui_facts({"prompt": json.dumps(COMFYUI_CUSTOM)})
    known = values(facts)
    assert (known["prompt"], known["neg"], known["seed"]) == ("a cat", "", 7)
    assert (known["sample_steps"], known["guidance_scale"], known["sampler"]) == (30, 4.0, "res_multistep")
    assert (known["model"], known["loras.0.path"], known["loras.0.network_multiplier"]) == (
        "chroma.safetensors",
        "a.safetensors",
        0.5,
    )
    assert "loras.1.path" not in known
    assert facts is not None
    assert any("denoise 0.6" in remark for remark in facts.remarks)
    assert not any("counterpart" in remark for remark in facts.remarks)


def test_a_workflow_alone_is_enough_for_what_its_nodes_list() -> None:
    known = values(comfyui_facts({"workflow": json.dumps(WORKFLOW)}))
    assert (known["prompt"], known["neg"], known["seed"], known["sample_steps"]) == ("a dog", "bad", 9, 12)
    assert (known["guidance_scale"], known["scheduler"], known["width"]) == (4.5, "simple", 64)
    assert known["model"] == "chroma.safetensors"


@pytest.mark.parametrize(
    "graph",
    [
        {"1": {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}}},
        {"1": {"class_type": "KSampler", "inputs": {"steps": ["1", 0], "cfg": ["2", 0], "positive": ["1", 0]}},
         "2": {"class_type": "X", "inputs": {"value": ["2", 0], "model": ["2", 0]}}},
        {"1": {"class_type": "KSampler", "inputs": {"steps": True, "cfg": "x", "positive": 3, "model": ["1", 0]}}},
        pytest.param(
            {str(n): {"class_type": "Y", "inputs": {"a": [str(n + 1), 0]}} for n in range(30_000)},
            marks=pytest.mark.slow,
        ),
        {"1": {"class_type": 3, "inputs": {}}, "2": 4, "3": {"class_type": "SaveImage", "inputs": []}},
    ],
)  # fmt: skip
def test_graphs_that_lead_nowhere_or_in_circles_end(graph: dict[str, Any]) -> None:
    facts = comfyui_facts({"prompt": json.dumps(graph)})
    assert facts is None or facts.program == "ComfyUI"


def test_parameters_of_a1111_are_read_with_adapters_taken_out_of_the_prompt() -> None:
    facts = parameters_facts(A1111)
    assert values(facts) == {
        "prompt": "a red circle,  on white\nsecond line",
        "neg": "blurry,\nugly",
        "model": "Chroma1-HD",
        "model_revision": None,
        "sample_steps": 20,
        "sampler": "Euler",
        "scheduler": "Beta",
        "seed": 43,
        "guidance_scale": 3.5,
        "guidance": "classifier-free",
        "noise_draw": None,
        "profile": None,
        "width": 64,
        "height": 64,
        "loras.0.path": "ink",
        "loras.0.sha256": None,
        "loras.0.network_multiplier": 0.8,
        "loras.0.placement": None,
        "versions": "v1.10.1",
    }
    assert facts is not None
    assert "1a2b3c4d5e" in facts.facts["model_revision"].note
    assert "0123456789ab" in facts.facts["loras.0.sha256"].note
    assert facts.facts["noise_draw"].note == "drawn by CPU"


def test_parameters_of_forge_are_told_from_those_of_a1111() -> None:
    facts = parameters_facts(FORGE)
    assert facts is not None
    assert facts.program == "Forge f2.0.1v1.10.1-previous"
    assert values(facts)["loras.0.network_multiplier"] == 0.25
    assert "Distilled CFG Scale 3.5" in facts.facts["guidance"].note
    assert facts.facts["dtype"].note == "its weights are held as Automatic (fp16 LoRA)"


@pytest.mark.parametrize("hashes", ["ink: ", "ink", "ink: a: b", ":", '"', "ink: 1, ink: 2"])
def test_hashes_that_make_no_sense_leave_the_rest_as_it_is(hashes: str) -> None:
    facts = parameters_facts(f'a <lora:ink:0.5>\nSteps: 3, Lora hashes: "{hashes}", Seed: 4')
    assert facts is not None
    assert values(facts)["loras.0.network_multiplier"] == 0.5
    assert values(facts)["loras.0.sha256"] is None


@pytest.mark.parametrize("text", ["", "a cat", "Steps: many", "\n\n", "Negative prompt: x"])
def test_a_text_without_settings_is_none_of_parameters(text: str) -> None:
    assert parameters_facts(text) is None


def test_long_texts_of_parameters_take_no_time() -> None:
    begun = time.process_time()
    for text in ("Steps: 1, " + "a" * 500_000, 'Steps: 1, a: "' + "\\" * 100_000, "Steps: 1, " + "a:" * 200_000,
                 "<lora:" * 100_000 + "\nSteps: 1"):  # fmt: skip
        assert parameters_facts(text) is not None
    assert time.process_time() - begun < 2
