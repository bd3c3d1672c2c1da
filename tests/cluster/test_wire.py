"""Values cross as they are, and nothing else does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from chromarpc_server.adapters.file import AdapterFile
from chromarpc_server.cluster.messages import Cancel, Open, Opened, Reports, Resident, Run
from chromarpc_server.cluster.messages import HostSettings as Settings
from chromarpc_server.cluster.wire import NotOurs, decode, encode
from chromarpc_server.domain.errors import ChromaError, InvalidParameter, QuotaExceeded
from chromarpc_server.domain.events import ImageHeader, Loading, LoadingStage, Preview, Step
from chromarpc_server.domain.fallbacks import DeviceFallback, Part
from chromarpc_server.domain.models import CHROMA, CHROMA_MINI, LocalPart
from chromarpc_server.domain.sampling_choices import DrawingSettings
from chromarpc_server.domain.trainer import TrainerSettings
from chromarpc_server.runtime.model_cache import CacheSnapshot, ResidentSet, SetKey
from chromarpc_server.runtime.work import EncodedImage, StageDone
from tests.cluster.stand import plan

FILE = AdapterFile(Path("/loras/a"), 5, 1, 2, 3, Path("/loras"), "ab" * 32)
SET = ResidentSet(SetKey("m", "reference", ((FILE, 0.5),), TrainerSettings()), (("ab" * 32, 0.5),), 7)
HEADER = ImageHeader(0, "image/png", 3, 64, 64, "00", 2**63)


@pytest.mark.parametrize(
    "value",
    [
        Run(1, "id", plan("a.safetensors"), ()),
        Run(2, "id", plan(settings=DrawingSettings.COMFYUI), ()),
        Open("ray:0", Settings(model_folders=(("m", Path("/models")),))),
        Opened(None, InvalidParameter("no")),
        Open("ray:1", Settings(models=(CHROMA_MINI, replace(CHROMA, transformer=LocalPart(Path("/m.gguf")))))),
        Resident(CacheSnapshot(fallbacks=(DeviceFallback(Part.KERNELS, "too old"),))),
        Reports(2, (Loading(LoadingStage.READING, 1, 2), Step(0, 1, 2, 0.1 + 0.2, 1e-300, 0.0, None, (1.0, 0.5)))),
        Reports(3, (Preview(0, 1, "image/png", 1, 1, b"\0\xff"), EncodedImage(HEADER, b"abc", 0.1))),
        Reports(4, (StageDone("loading_s", 1.5, 2**60),)),
        Resident(CacheSnapshot({"m": 2**40}, sets=(SET,), revisions={"m": "1"})),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_message_comes_out_as_it_went_in(value: object) -> None:
    found = decode(*encode(value), lambda *_: FILE)
    if not isinstance(value, Opened):
        assert found == value
    assert repr(found) == repr(value)


def test_an_error_keeps_all_that_a_client_is_told() -> None:
    error = QuotaExceeded.of("caller", "max", 3, "too many", retry_after_s=1.5).at("prompts.0")
    found = decode(*encode(Cancel(1, error))).cause
    assert type(found) is QuotaExceeded
    assert vars(found) == vars(error)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"value":"Popen","of":["true"]}',
        '{"value":"Run","of":[]}',
        '{"error":"OSError","of":["x",[],{"map":[]},null,null]}',
        '{"enum":"LoadingStage","is":"no"}',
        '{"blob":3}',
        '{"what":1}',
        "[" * 100_000 + "]" * 100_000,
    ],
)
def test_what_is_no_value_of_ours_is_refused(text: str) -> None:
    with pytest.raises(NotOurs):
        decode(text.encode(), [])


def test_what_is_not_listed_does_not_cross() -> None:
    with pytest.raises(TypeError, match="object does not cross"):
        encode(object())
    with pytest.raises(TypeError):
        encode(ValueError("x"))


def test_bytes_go_beside_the_text() -> None:
    text, blobs = encode(Reports(1, (Preview(0, 1, "image/png", 1, 1, b"12"), Preview(0, 2, "x", 1, 1, b"3"))))
    assert blobs == [b"12", b"3"]
    assert json.loads(text)
    assert issubclass(NotOurs, ValueError)
    assert not issubclass(NotOurs, ChromaError)
