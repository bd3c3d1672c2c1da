"""JSON bodies: what parses, what does not, and which field is blamed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format

from chromarpc import InvalidRequestJson, parse_request_json
from chromarpc.json_request import MAX_UNKNOWN
from chromarpc.v1 import generation_service_pb2, options_pb2

GOLDENS = json.loads(
    (Path(__file__).parent.parent / "goldens" / "requests" / "reference_requests.json").read_text("utf-8")
)
CASES = [case["request"] for kind in ("accepted", "rejected") for case in GOLDENS[kind]]


@pytest.mark.parametrize("body", CASES)
def test_every_body_of_the_reference_parses_to_itself(body: dict[str, Any]) -> None:
    """Also those it refuses: which values are served is the server's to say."""
    parsed = parse_request_json(json.dumps(body))
    assert parsed.unknown == ()
    for given, found in zip(body["prompts"], parsed.request.prompts, strict=True):
        assert {field.name: value for field, value in found.ListFields()} == given
    for given, found in zip(body["loras"], parsed.request.loras, strict=True):
        assert {field.name: value for field, value in found.ListFields()} == given


def read(text: str) -> generation_service_pb2.GenerateRequest:
    """The request of a body that is to be accepted."""
    try:
        return parse_request_json(text).request
    except InvalidRequestJson as error:
        pytest.fail(f"refused: {error}")


def prompt(**fields: Any) -> dict[str, Any]:
    return {"prompts": [{"prompt": "a"}, {"prompt": "b", **fields}]}


REFUSED: list[tuple[object, str]] = [
    ([], ""),
    (None, ""),
    ("text", ""),
    ({"prompts": {}}, "prompts"),
    ({"prompts": "a"}, "prompts"),
    ({"prompts": ["a"]}, "prompts.0"),
    ({"prompts": [None]}, "prompts.0"),
    ({"loras": [["x"]]}, "loras.0"),
    ({"model": 1}, "model"),
    ({"model": "\ud800"}, "model"),
    ({"kv_cache": 1}, "kv_cache"),
    ({"kv_cache": "true"}, "kv_cache"),
    ({"output": {"format": "png"}}, "output.format"),
    ({"output": {"format": True}}, "output.format"),
    ({"output": {"format": 99}}, "output.format"),
    ({"output": {"format": [1]}}, "output.format"),
    ({"output": []}, "output"),
    ({"noise_draw": "LEGACY"}, "noise_draw"),
    ({"loras": [{"path": "x", "network_multiplier": True}]}, "loras.0.network_multiplier"),
    ({"loras": [{"path": "x", "network_multiplier": 10**400}]}, "loras.0.network_multiplier"),
    (prompt(width=2**31), "prompts.1.width"),
    (prompt(width=-(2**31) - 1), "prompts.1.width"),
    (prompt(width=64.5), "prompts.1.width"),
    (prompt(width=True), "prompts.1.width"),
    (prompt(width="wide"), "prompts.1.width"),
    (prompt(width=" 64"), "prompts.1.width"),
    (prompt(width="1_000"), "prompts.1.width"),
    (prompt(width=""), "prompts.1.width"),
    (prompt(width=[64]), "prompts.1.width"),
    (prompt(seed=2**63), "prompts.1.seed"),
    (prompt(seed="9" * 5000), "prompts.1.seed"),
    (prompt(width="64.5"), "prompts.1.width"),
    (prompt(seed="9223372036854775808.0"), "prompts.1.seed"),
    (prompt(guidance_scale={}), "prompts.1.guidance_scale"),
    (prompt(guidance_scale=""), "prompts.1.guidance_scale"),
    (prompt(guidance_scale=" 4"), "prompts.1.guidance_scale"),
    (prompt(guidance_scale="4,0"), "prompts.1.guidance_scale"),
    (prompt(guidance_scale="0x4"), "prompts.1.guidance_scale"),
    ({"max_queue_time": "soon"}, "max_queue_time"),
    ({"max_queue_time": {"seconds": 30}}, "max_queue_time"),
    (prompt(prompt=None, trigger_word=5), "prompts.1.trigger_word"),
    (prompt(sample_steps=1, sampleSteps=1), "prompts.1.sampleSteps"),
]


@pytest.mark.parametrize(("body", "path"), REFUSED)
def test_a_wrong_type_or_range_names_its_field(body: object, path: str) -> None:
    with pytest.raises(InvalidRequestJson) as caught:
        parse_request_json(json.dumps(body))
    assert caught.value.path == path
    assert str(caught.value).startswith(f"{path}: " if path else "must")
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "{'model': 1}", '{"model": "a"} x', b"\xff\xfe\xfa", b"\x80", "[" * 100_000,
        '{"prompts":' * 100_000, '{"x": ' + "9" * 5000 + "}",
    ],
    ids=lambda text: repr(text[:12]),
)  # fmt: skip
def test_what_is_no_json_is_refused_in_plain_words(text: str | bytes) -> None:
    with pytest.raises(InvalidRequestJson) as caught:
        parse_request_json(text)
    assert caught.value.path == ""


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_that_is_none_names_its_field(value: str) -> None:
    for field in ("guidance_scale", "width"):
        for written in (value, f'"{value}"'):
            with pytest.raises(InvalidRequestJson) as caught:
                parse_request_json(f'{{"prompts": [{{"{field}": {written}}}]}}')
            assert caught.value.path == f"prompts.0.{field}"


def test_a_key_given_twice_is_refused() -> None:
    with pytest.raises(InvalidRequestJson) as caught:
        parse_request_json('{"prompts": [{"prompt": "a", "seed": 1, "seed": 2}]}')
    assert caught.value.path == "prompts.0.seed"


def test_null_is_left_out_and_empty_is_not() -> None:
    request = parse_request_json(
        '{"model": null, "loras": null, "prompts": [{"prompt": "", "seed": null}]}'
    ).request
    assert not request.HasField("model")
    assert request.prompts[0].HasField("prompt")
    assert not request.prompts[0].HasField("seed")


def test_whole_numbers_may_be_text_or_have_a_zero_fraction() -> None:
    request = read(
        '{"prompts": [{"seed": "1099511627776", "width": 1024.0, "height": "1024.0", "guidance_scale": 4}]}'
    )
    assert request.prompts[0].seed == 2**40
    assert request.prompts[0].width == 1024
    assert request.prompts[0].height == 1024
    assert request.prompts[0].guidance_scale == 4.0


def test_a_whole_number_as_text_keeps_all_its_digits() -> None:
    seed = 2**53 + 1
    for written in (f"{seed}", f'"{seed}"', f'"{seed}.0"'):
        assert read(f'{{"prompts": [{{"seed": {written}}}]}}').prompts[0].seed == seed


@pytest.mark.parametrize(
    ("written", "value"), [("4.0", 4.0), ("4", 4.0), ("-0.5", -0.5), ("1e1", 10.0), ("3.70", 3.7)]
)
def test_any_finite_number_may_be_text(written: str, value: float) -> None:
    body = {"loras": [{"path": "x", "network_multiplier": written}], "prompts": [{"guidance_scale": written}]}
    request = read(json.dumps(body))
    assert request.prompts[0].guidance_scale == value
    assert request.loras[0].network_multiplier == value


def test_all_wrong_types_are_told_at_once() -> None:
    body = {
        "model": 1,
        "loras": ["x", {"path": "y", "network_multiplier": "NaN"}],
        "prompts": [7, {"prompt": "b", "width": "wide", "seed": 1.5, "sample_steps": 3}],
        "output": {"format": "gif"},
        "kv_cache": "no",
    }
    with pytest.raises(InvalidRequestJson) as caught:
        parse_request_json(json.dumps(body))
    wrong = [
        "model",
        "loras.0",
        "loras.1.network_multiplier",
        "prompts.0",
        "prompts.1.width",
        "prompts.1.seed",
        "output.format",
        "kv_cache",
    ]
    assert [path for path in wrong if f"{path}: must" not in str(caught.value)] == []
    assert [path for path, _ in caught.value.violations] == wrong
    assert caught.value.request is not None
    assert caught.value.request.prompts[1].sample_steps == 3, "the rest is read, at its own index"


def test_no_more_wrong_types_are_told_than_a_person_reads() -> None:
    with pytest.raises(InvalidRequestJson) as caught:
        parse_request_json(json.dumps({"prompts": [1] * 5000}))
    assert str(caught.value).count("prompts.") == 100


def test_empty_text_for_a_choice_means_left_out() -> None:
    request = read('{"output": {"format": ""}, "noise_draw": "", "on_disconnect": ""}')
    assert not request.output.format
    assert not request.noise_draw
    assert not request.on_disconnect


def test_a_time_is_written_as_protobuf_writes_it() -> None:
    assert read('{"max_queue_time": "1.5s"}').max_queue_time.ToMilliseconds() == 1500


def test_guidance_keeps_its_value() -> None:
    assert parse_request_json('{"prompts": [{"guidance_scale": 3.7}]}').request.prompts[0].guidance_scale == 3.7


def test_unknown_keys_are_collected_with_their_paths() -> None:
    parsed = parse_request_json(
        '{"a": [[]], "prompts": [{"prompt": "x"}, {"b": {"c": 1}}], "output": {"d": null}}'
    )
    assert parsed.unknown == ("a", "prompts.1.b", "output.d")
    assert len(parse_request_json(json.dumps({str(i): i for i in range(5000)})).unknown) == MAX_UNKNOWN
    assert all(len(path) < 200 for path in parse_request_json(json.dumps({"k" * 10**6: 1})).unknown)


def test_both_names_of_a_field_and_protobufs_own_json_are_understood() -> None:
    parsed = parse_request_json('{"triggerWord": "sks", "prompts": [{"sampleSteps": 3}], "noiseDraw": 2}')
    assert parsed.request.trigger_word == "sks"
    assert parsed.request.prompts[0].sample_steps == 3
    assert parsed.request.noise_draw == options_pb2.NOISE_DRAW_LEGACY
    for preserving in (True, False):
        text = json_format.MessageToJson(parsed.request, preserving_proto_field_name=preserving)
        assert parse_request_json(text).request == parsed.request
