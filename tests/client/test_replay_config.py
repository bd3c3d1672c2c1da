"""What a training config decides about its samples, as ai-toolkit resolves it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from chromarpc.replay.config_file import MAX_CONFIG_BYTES, MAX_DEPTH, ConfigError, read_config
from chromarpc.replay.settings import SampleSettings, TrainingRun, effective_size, resolve_run

RUNS = Path(__file__).parent.parent / "goldens" / "preview_runs"


def run_of(
    sample: dict[str, Any] | None = None,
    *,
    name: str = "job",
    model: dict[str, Any] | None = None,
    environment: dict[str, str] | None = None,
    **process: Any,
) -> TrainingRun:
    config = {
        "job": "extension",
        "config": {
            "name": name,
            "process": [
                {
                    "type": "sd_trainer",
                    "network": {"type": "lora"},
                    "model": {"name_or_path": "m", "arch": "chroma"} | (model or {}),
                    "sample": {"neg": "", "prompts": ["a"]} | (sample or {}),
                }
                | process
            ],
        },
    }
    return resolve_run(read_config(yaml.safe_dump(config).encode(), "config.yaml", environment=environment or {}))


def settings_of(sample: dict[str, Any], index: int = 0, **more: Any) -> SampleSettings:
    found = run_of(sample, **more).samples[index]
    assert isinstance(found, SampleSettings), found
    return found


def problem_of(sample: dict[str, Any], **more: Any) -> str:
    found = run_of(sample, **more).samples[0]
    assert isinstance(found, str), found
    return found


@pytest.mark.parametrize("folder", ["exact", "rounded"])
def test_recorded_runs_resolve_to_what_the_trainer_recorded(folder: str) -> None:
    expected = json.loads((RUNS / folder / "expected.json").read_text())
    run = resolve_run(read_config((RUNS / folder / "config.yaml").read_bytes(), "config.yaml", environment={}))
    assert run.name == expected["name"]
    for recorded in expected["samples"]:
        sample = run.sample(recorded["step"], recorded["index"])
        assert isinstance(sample, SampleSettings)
        assert {
            "prompt": sample.prompt,
            "negative_prompt": sample.negative_prompt,
            "requested": [sample.requested_width, sample.requested_height],
            "width": sample.width,
            "height": sample.height,
            "seed": sample.seed,
            "steps": sample.steps,
            "guidance_scale": sample.guidance_scale,
            "network_multiplier": sample.network_multiplier,
            "qtype": run.trainer.qtype,
            "dtype": run.trainer.dtype,
            "quantize": run.trainer.quantize,
            "quantize_te": run.trainer.quantize_te,
        }.items() <= recorded.items()


def test_the_job_config_of_the_user_interface_says_the_same_as_the_trainers_own() -> None:
    from_json = resolve_run(
        read_config((RUNS / "rounded" / "job_config.json").read_bytes(), ".job_config.json", environment={})
    )
    from_yaml = resolve_run(
        read_config((RUNS / "rounded" / "config.yaml").read_bytes(), "config.yaml", environment={})
    )
    assert from_json == from_yaml


def test_what_nobody_says_is_the_trainers_default() -> None:
    run = run_of()
    assert run.trainer.quantize is False
    assert run.trainer.quantize_te is False
    assert (run.trainer.qtype, run.trainer.dtype) == ("qfloat8", "fp32")
    assert run.samples == (
        SampleSettings(
            prompt="a", negative_prompt="", requested_width=512, requested_height=512, seed=0, steps=20,
            guidance_scale=7, network_multiplier=1,
        ),
    )  # fmt: skip
    assert any("train.dtype is not set" in said for said in run.assumptions)


def test_the_text_encoder_is_quantized_as_the_model_and_by_the_models_quantizer() -> None:
    trainer = run_of(model={"quantize": True, "qtype": "qint8", "qtype_te": "qfloat8"}).trainer
    assert (trainer.quantize_te, trainer.qtype) == (True, "qint8")
    assert run_of(model={"quantize": True, "quantize_te": False}).trainer.quantize_te is False


def test_training_decides_the_type_and_the_model_does_not() -> None:
    assert run_of(model={"dtype": "float16"}, train={"dtype": "bf16"}).trainer.dtype == "bf16"


@pytest.mark.parametrize("key", ["layer_offloading", "auto_memory"])
def test_layer_offloading_turns_qfloat8_into_float8(key: str) -> None:
    run = run_of(model={"quantize": True, key: True})
    assert run.trainer.qtype == "float8"
    assert any("layer_offloading" in said for said in run.assumptions)
    assert run_of(model={"quantize": True, key: True, "qtype": "qint8"}).trainer.qtype == "qint8"


def test_an_accuracy_recovery_adapter_is_no_part_of_the_quantizer() -> None:
    assert run_of(model={"quantize": True, "qtype": "uint4|some/adapter"}).trainer.qtype == "uint4"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--w 320 --h 200", {"requested_width": 320, "requested_height": 200}),
        ("--seed 7", {"seed": 7}),
        ("--d 8", {"seed": 8}),
        ("--s 9", {"steps": 9}),
        ("--steps 9", {"steps": 9}),
        ("--l 3.5", {"guidance_scale": 3.5}),
        ("--cfg 3", {"guidance_scale": 3.0}),
        ("--m 0.5", {"network_multiplier": 0.5}),
        ("--network_multiplier 0.25", {"network_multiplier": 0.25}),
        ("--n blurry, bad ", {"negative_prompt": "blurry, bad"}),
        ("--n", {"negative_prompt": ""}),
        ("--p2 other --gr 0.7 --x y --", {}),
    ],
)
def test_flags_in_a_prompt_override(flags: str, expected: dict[str, Any]) -> None:
    plain = settings_of({"prompts": ["a cat"], "neg": "bad"})
    found = settings_of({"prompts": [f"a cat {flags}"], "neg": "bad"})
    assert {name: getattr(found, name) for name in expected} == expected
    for name in ("prompt", "seed", "steps", "requested_width", "guidance_scale"):
        if name not in expected:
            assert getattr(found, name) == getattr(plain, name)


def test_two_hyphens_end_a_prompt_and_a_flag_needs_a_space() -> None:
    assert settings_of({"prompts": ["well--known, --w\n320 --h 128"]}).prompt == "well"
    found = settings_of({"prompts": ["a --w\n320 --h 128"]})
    assert (found.requested_width, found.requested_height) == (512, 128)


def test_flags_that_the_config_folds_over_lines_are_read() -> None:
    text = (
        "job: e\nconfig:\n  name: j\n  process:\n  - network: {type: lora}\n    model: {arch: chroma}\n"
        "    sample:\n      neg: ''\n      prompts:\n      - a cat on a mat --s 8 --w\n        320 --h 200\n"
    )
    run = resolve_run(read_config(text.encode(), "config.yaml", environment={}))
    sample = run.samples[0]
    assert isinstance(sample, SampleSettings)
    assert (sample.requested_width, sample.requested_height, sample.steps) == (320, 200, 8)


def test_prompts_are_stripped_and_negatives_are_not() -> None:
    found = settings_of({"prompts": ["  a  cat  "], "neg": "  bad  "})
    assert (found.prompt, found.negative_prompt) == ("a  cat", "  bad  ")


def test_walk_seed_counts_from_the_first_and_an_own_seed_counts_for_one() -> None:
    samples = [{"prompt": "a"}, {"prompt": "b", "seed": 7}, {"prompt": "c"}]
    run = run_of({"seed": 42, "walk_seed": True, "samples": samples})
    assert [sample.seed for sample in run.samples if isinstance(sample, SampleSettings)] == [42, 7, 44]


def test_without_walk_seed_an_own_seed_sticks_and_a_flag_does_not() -> None:
    samples = [{"prompt": "a"}, {"prompt": "b", "seed": 7}, {"prompt": "c --seed 9"}, {"prompt": "d"}]
    run = run_of({"seed": 42, "samples": samples})
    assert [sample.seed for sample in run.samples if isinstance(sample, SampleSettings)] == [42, 7, 9, 7]


def test_a_drawn_seed_is_known_to_nobody_but_the_seeds_that_walk_from_it_are() -> None:
    run = run_of({"seed": -1, "walk_seed": True, "prompts": ["a", "b", "c --seed -1"]})
    assert [s.seed for s in run.samples if isinstance(s, SampleSettings)] == [None, 0, -1]
    last = run.samples[2]
    assert isinstance(last, SampleSettings)
    assert last.request_seed == 2**32 - 1  # what a generator on a CPU makes of it


def test_the_trigger_word_is_set_also_in_flags_and_only_if_there_is_one() -> None:
    prompts = ["a [trigger] cat, [trigger] --n no [trigger]"]
    found = settings_of({"prompts": prompts, "neg": "[trigger]"}, trigger_word="sks")
    assert (found.prompt, found.negative_prompt) == ("a sks cat, sks", "no sks")
    assert settings_of({"prompts": ["a [trigger] cat"]}).prompt == "a [trigger] cat"
    assert settings_of({"prompts": ["a [trigger] cat"]}, trigger_word="").prompt == "a  cat"
    assert settings_of({"neg": "no [trigger]"}, trigger_word="sks").negative_prompt == "no [trigger]"


def test_the_name_stands_for_itself_everywhere_also_with_a_trigger_word() -> None:
    found = settings_of({"prompts": ["by [name]"], "neg": "[name]"}, name="my job", trigger_word="sks")
    assert (found.prompt, found.negative_prompt) == ("by my job", "my job")


def test_a_multiplier_may_be_a_text_and_one_that_is_none_is_1() -> None:
    assert settings_of({"network_multiplier": "0.8"}).network_multiplier == 0.8
    assert settings_of({"network_multiplier": "much"}).network_multiplier == 1.0


def test_a_negative_text_that_is_left_out_is_taken_as_empty_and_said() -> None:
    run = run_of({"neg": False})
    assert run.assumptions == ("train.dtype is not set: the trainer computes in float32 then",)
    config = {"config": {"name": "j", "process": [{"model": {"arch": "chroma"}, "sample": {"prompts": ["a"]}}]}}
    left_out = resolve_run(read_config(json.dumps(config).encode(), "x.json", environment={}))
    assert any("sample.neg is not set" in said for said in left_out.assumptions)


def test_prompts_that_are_null_move_the_prompts_and_not_the_settings() -> None:
    samples = [{"prompt": "a", "width": 64}, {"prompt": None, "width": 128}, {"prompt": "c", "width": 256}]
    run = run_of({"samples": samples})
    found = [sample for sample in run.samples if isinstance(sample, SampleSettings)]
    assert [(sample.prompt, sample.requested_width) for sample in found] == [("a", 64), ("c", 128)]


def test_samples_outrank_prompts() -> None:
    run = run_of({"prompts": ["a", "b"], "samples": [{"prompt": "c"}]})
    assert [sample.prompt for sample in run.samples if isinstance(sample, SampleSettings)] == ["c"]


@pytest.mark.parametrize(
    ("sample", "says"),
    [
        ({"width": "wide"}, "width is no whole number: 'wide'"),
        ({"prompts": ["a --s 8.5"]}, "--s is no whole number: '8.5'"),
        ({"guidance_scale": None}, "guidance_scale is no number: None"),
        ({"prompts": ["a --cfg much"]}, "--cfg is no number: 'much'"),
        ({"seed": float("nan")}, "seed is no whole number: nan"),
    ],
)
def test_what_the_trainer_could_not_have_drawn_is_said_of_that_sample(sample: dict[str, Any], says: str) -> None:
    assert problem_of(sample) == says


def test_a_first_sample_of_its_own_is_drawn_over_unless_the_first_is_skipped() -> None:
    first = {"neg": "", "prompts": ["x", "y", "z"]}

    def prompts(run: TrainingRun) -> list[str]:
        found = [run.sample(0, index) for index in range(3)]
        return [sample.prompt if isinstance(sample, SampleSettings) else "-" for sample in found]

    assert prompts(run_of({"prompts": ["a", "b"]}, first_sample=first)) == ["a", "b", "z"]
    skipped = run_of({"prompts": ["a", "b"]}, first_sample=first, train={"skip_first_sample": True})
    assert prompts(skipped) == ["x", "y", "z"]
    later = skipped.sample(250, 0)
    assert isinstance(later, SampleSettings)
    assert later.prompt == "a"


@pytest.mark.parametrize(
    ("asked", "pixels"), [(1, 64), (63, 64), (64, 64), (79, 64), (80, 80), (200, 192), (215, 208), (1023, 1008)]
)
def test_sizes_are_floored_to_8_and_then_to_16(asked: int, pixels: int) -> None:
    assert effective_size(asked) == pixels


def test_numbers_with_exponents_are_numbers() -> None:
    config = read_config(b"a: 4e0\nb: 1e-4\nc: .5E1\nd: +2.E+1\ne: 1e\nf: 4", "config.yaml", environment={})
    assert config == {"a": 4.0, "b": 0.0001, "c": 5.0, "d": 20.0, "e": "1e", "f": 4}


def test_variables_are_replaced_only_where_they_are_allowed() -> None:
    sample = {"prompts": ["a ${THING} by ${WHO}"], "seed": "${SEED}"}
    run = run_of(sample, environment={"THING": "cat", "SEED": "7"})
    found = run.samples[0]
    assert isinstance(found, SampleSettings)
    assert (found.prompt, found.seed) == ("a cat by ${WHO}", 7)
    assert run.unresolved == ("WHO",)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"arch": "flux"}, "the run trains 'flux'; only 'chroma' can be redrawn"),
        ({"arch": "chroma_radiance"}, "'chroma_radiance'"),
        ({"arch": None}, "names no architecture"),
        ({"arch": "", "is_flux": True}, "the run trains 'flux'"),
    ],
)
def test_other_architectures_are_refused_by_name(model: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        run_of(model=model)


def test_an_architecture_may_carry_a_tag() -> None:
    assert run_of(model={"arch": "chroma:hd"}).samples


@pytest.mark.parametrize(
    "content",
    [b"a: 1", b"config: {name: x}", b"config: {name: x, process: []}", b"config: {name: x, process: [{type: y}]}",
     b"config: {process: [{model: {arch: chroma}}]}"],
)  # fmt: skip
def test_other_configs_are_none_of_ai_toolkit(content: bytes) -> None:
    with pytest.raises(ConfigError, match="no training config of ai-toolkit"):
        resolve_run(read_config(content, "config.yaml", environment={}))


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "b0: &b0 {k: 1}\n" + "".join(f"b{n}: &b{n} {{<<: [*b{n - 1}, *b{n - 1}]}}\n" for n in range(1, 60))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a: " + b"x" * MAX_CONFIG_BYTES, "has more than"),
        (BOMB.encode(), "aliases that stand for more than"),
        (b"a: &a [*a]", "holds itself"),
        (b"[" * 1000 + b"]" * 1000, "levels deep"),
        (b"a: " + b"{b: " * (MAX_DEPTH + 1) + b"1" + b"}" * (MAX_DEPTH + 1), "levels deep"),
        (b"a: " + b":".join([b"1"] * 1000), "more digits"),
        (b"a: " + b"9" * 5000, "more digits"),
        (b"a: !!python/object/apply:os.system [true]", "no YAML that can be read"),
        (b"a: [1, 2", "no YAML that can be read"),
        (b"\xff\xfe\x00", "no text in UTF-8"),
        (b"- a", "holds no settings"),
        (b"", "holds no settings"),
        pytest.param(b"a: [" + b"1," * 40_001 + b"1]", "more than 40000 values", marks=pytest.mark.slow),
    ],
)
def test_hostile_yaml_ends_in_a_sentence(content: bytes, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_config(content, "config.yaml", environment={})


def test_merged_keys_do_not_multiply() -> None:
    with pytest.raises(ConfigError, match="aliases that stand for more than"):
        read_config(MERGES.encode(), "config.yaml", environment={})


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 60 + b"1" + b"}" * 60, b"9" * 5000, b"{", b"[]"])
def test_hostile_json_ends_in_a_sentence(content: bytes) -> None:
    with pytest.raises(ConfigError):
        read_config(content, ".job_config.json", environment={})


def test_dates_and_keys_of_other_kinds_become_text() -> None:
    config = read_config(b"a: 2026-01-02\n2: x\ntrue: y\nnull: z", "config.yaml", environment={})
    assert config == {"a": "2026-01-02", "2": "x", "true": "y", "null": "z"}
