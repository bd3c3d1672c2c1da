"""What tells requests apart under one request id: the same on every wire, in every version."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import struct_pb2
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from chromarpc.json_request import parse_request_json
from chromarpc.v1 import generation_service_pb2, job_service_pb2, options_pb2
from chromarpc_server.jobs.submission import Fingerprint
from chromarpc_server.transport.messages.fingerprints import canonical_form, fingerprint

GenerateRequest = generation_service_pb2.GenerateRequest
WRITTEN_DOWN: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "fingerprints.json").read_text("utf-8")
)
"""Requests and their fingerprints. Stores are full of these: what is here is added to, and never changed."""


def _request(**fields: Any) -> GenerateRequest:
    return parse_request_json(json.dumps({"model": "chroma", "prompts": [{"prompt": "a"}], **fields})).request


def _field(number: int, wire_type: int, payload: bytes) -> bytes:
    return _varint(number << 3 | wire_type) + payload


def _text(number: int, data: bytes) -> bytes:
    return _field(number, 2, _varint(len(data)) + data)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


@pytest.mark.parametrize("name", WRITTEN_DOWN)
def test_fingerprints_that_were_released_stay(name: str) -> None:
    known = WRITTEN_DOWN[name]
    made = fingerprint(parse_request_json(json.dumps(known["request"])).request)
    assert made == Fingerprint(known["fingerprint"], legacy=known["legacy"])


def test_every_written_request_has_another_fingerprint() -> None:
    assert len({known["fingerprint"] for known in WRITTEN_DOWN.values()}) == len(WRITTEN_DOWN) > 5


def test_neither_the_request_id_nor_a_secret_is_part_of_what_was_asked() -> None:
    bare = fingerprint(_request())
    assert fingerprint(_request(request_id="one", hf_token="hf_secret")) == bare
    assert fingerprint(_request(request_id="two")) == bare


@pytest.mark.parametrize(
    "wire",
    [
        _text(18, b"exact") + _text(5, _text(1, b"a")) + _text(1, b"chroma"),
        _text(1, b"another") + _text(5, _text(1, b"a")) + _text(18, b"exact") + _text(1, b"chroma"),
        _text(1, b"chroma") + _text(5, b"\x8a\x80\x00" + b"\x81\x00" + b"a") + _text(18, b"exact"),
    ],
    ids=["fields in another order", "a field twice", "numbers written long"],
)
def test_the_same_request_has_one_fingerprint_however_it_was_written(wire: bytes) -> None:
    assert fingerprint(GenerateRequest.FromString(wire)) == fingerprint(_request(profile="exact"))


def test_a_message_in_two_parts_is_one() -> None:
    whole = _request(output={"format": "IMAGE_FORMAT_WEBP", "quality": 80})
    begun = _request(output={"format": "IMAGE_FORMAT_WEBP"})
    rest = GenerateRequest(output=options_pb2.OutputOptions(quality=80))
    joined = GenerateRequest.FromString(begun.SerializeToString() + rest.SerializeToString())
    assert fingerprint(joined) == fingerprint(whole)


def test_numbers_of_a_list_may_be_packed_or_not() -> None:
    packed, unpacked = b"\x1a\x02\x03\x05", b"\x18\x03\x18\x05"
    forms = {canonical_form(job_service_pb2.ListJobsRequest.FromString(wire)) for wire in (packed, unpacked)}
    assert forms == {b"{s6:states[e3;e5;]}"}


def test_a_map_has_no_order() -> None:
    one, other = struct_pb2.Struct(), struct_pb2.Struct()
    names = ["b", "a", "aa", "c"]
    for name in names:
        one[name] = name
    for name in reversed(names):
        other[name] = name
    assert canonical_form(one) == canonical_form(other)
    other["c"] = "d"
    assert canonical_form(one) != canonical_form(other)


def test_zero_has_no_sign_and_every_nan_is_the_same() -> None:
    strengths = [_request(loras=[{"path": "a", "network_multiplier": value}]) for value in (0.0, -0.0)]
    assert len({fingerprint(request).current for request in strengths}) == 1
    quiet, other = b"\x00\x00\x00\x00\x00\x00\xf8\x7f", b"\x01\x00\x00\x00\x00\x00\xf8\xff"
    nans = {canonical_form(struct_pb2.Value.FromString(b"\x11" + bits)) for bits in (quiet, other)}
    assert nans == {b"{s12:number_valuednan;}"}


def test_numbers_that_differ_in_their_last_bit_are_told_apart() -> None:
    exact = {
        fingerprint(_request(prompts=[{"prompt": "a", "guidance_scale": value}])).current
        for value in (0.1, 0.1 + 2**-56)
    }
    assert len(exact) == 2


def test_left_out_is_not_the_default_and_an_empty_message_is_not_none() -> None:
    requests = [
        _request(),
        _request(trigger_word=""),
        _request(kv_cache=False),
        _request(output={}),
        _request(output={"picture_record": False}),
        _request(loras=[{}]),
        _request(loras=[{}, {}]),
        _request(loras=[{"path": ""}]),
    ]
    assert len({fingerprint(request).current for request in requests}) == len(requests)


def test_text_cannot_pass_for_structure() -> None:
    one = _request(prompts=[{"prompt": "a"}, {"prompt": "b"}])
    other = _request(prompts=[{"prompt": "a}{s6:prompts1:b"}])
    assert fingerprint(one) != fingerprint(other)


class TestFieldsOfALaterVersion:
    """Fields that this version of the contract does not have are asked for all the same."""

    GROUP = _field(60, 3, b"") + _field(1, 0, b"\x07") + _field(60, 4, b"")
    FIELDS = (
        _field(60, 0, b"\x01"),
        _field(60, 0, b"\x02"),
        _field(61, 0, b"\x01"),
        _field(60, 1, b"\x01" + b"\x00" * 7),
        _field(60, 5, b"\x01" + b"\x00" * 3),
        _text(60, b"\x01"),
        _text(60, b""),
        GROUP,
        GROUP.replace(b"\x07", b"\x08"),
        _field(60, 0, b"\x01") * 2,
        _field(60, 0, b"\x01") + _field(60, 0, b"\x02"),
        _field(60, 0, b"\x02") + _field(60, 0, b"\x01"),
    )

    def test_requests_that_differ_in_one_are_told_apart(self) -> None:
        plain = _request().SerializeToString()
        seen = [plain, *(plain + field for field in self.FIELDS)]
        nested = GenerateRequest.FromString(plain + _text(5, _text(1, b"b") + _field(60, 0, b"\x01")))
        made = [*(GenerateRequest.FromString(wire) for wire in seen), nested]
        for one, other in combinations(made, 2):
            assert fingerprint(one).current != fingerprint(other).current

    def test_their_order_on_the_wire_says_nothing(self) -> None:
        plain = _request().SerializeToString()
        one, two = _field(60, 0, b"\x01"), _text(61, b"x")
        wires = (one + two + plain, plain + two + one)
        assert len({fingerprint(GenerateRequest.FromString(wire)).current for wire in wires}) == 1


class TestStoredFingerprints:
    """Stores of 0.1.0 hold hashes of protobuf's own bytes."""

    def test_the_old_form_is_known_by_the_old_hash_and_the_new_one_by_the_new(self) -> None:
        made = Fingerprint("2:new", legacy="old")
        assert [made.matches(stored) for stored in ("2:new", "old", "new", "2:old", "")] == [
            True,
            True,
            False,
            False,
            False,
        ]

    def test_a_request_that_0_1_0_did_not_have_matches_none_of_its_jobs(self) -> None:
        made = Fingerprint("2:new")
        assert not made.matches("")
        assert not made.matches("new")


_texts = st.none() | st.text(max_size=3)
_floats = st.none() | st.sampled_from([0.0, 1.0, 1.5, -1.0])


def _set(message: Message, **fields: object) -> Any:
    for name, value in fields.items():
        if value is not None:
            setattr(message, name, value)
    return message


_prompts = st.builds(
    lambda prompt, neg, guidance, seed: _set(
        generation_service_pb2.Prompt(), prompt=prompt, neg=neg, guidance_scale=guidance, seed=seed
    ),
    _texts,
    _texts,
    _floats,
    st.none() | st.integers(-2, 2),
)
_requests = st.builds(
    lambda model, word, kv_cache, prompts, draw: _set(
        GenerateRequest(prompts=prompts, noise_draw=draw), model=model, trigger_word=word, kv_cache=kv_cache
    ),
    _texts,
    _texts,
    st.none() | st.booleans(),
    st.lists(_prompts, max_size=2),
    st.sampled_from([0, 1, 2, 7]),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(_requests, _requests)
def test_two_requests_have_one_fingerprint_where_they_are_equal_and_nowhere_else(
    one: GenerateRequest, other: GenerateRequest
) -> None:
    assert (fingerprint(one).current == fingerprint(other).current) == (one == other)
    assert fingerprint(GenerateRequest.FromString(one.SerializeToString())) == fingerprint(one)
