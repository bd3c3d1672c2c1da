"""Prompts as the trainer tokenizes them: as transformers 5 does, whatever the file says of white space."""

from __future__ import annotations

import base64
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from chromarpc_server import settings as settings_module
from chromarpc_server.domain.errors import WeightsInvalid
from chromarpc_server.pipeline.models.text_encoder import Tokenizer
from tests.tiny_checkpoint import GOLDENS

MINI = Path(settings_module.__file__).parent / "assets" / "chroma_mini"
PLAIN = ["", "a red circle", "a hlw medium red circle, (on:1.2) white", "ä ≠ 日本", "word " * 300 + "end"]
BY_WHITE_SPACE = ["a  red circle", "a red circle ", "   ", "a\nred\tcircle", "a\u00a0red", "a \n red", "a ▁red"]
"""Prompts with other ids in transformers 5.5.3 than by the file of chroma-mini."""
EITHER = [" a red circle", "a<pad>red", "a</s> red", "ared▁circle"]
NO_REPLACEMENTS = base64.b64encode(struct.pack("<257I", 1024, *[0] * 256)).decode()
"""A table of characters' replacements without entries."""


@pytest.fixture(params=["as it is", "spaces put together", "characters replaced"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The tokenizer of chroma-mini, in the forms that such files come in."""
    folder = tmp_path / "tokenizer_2"
    shutil.copytree(MINI / "tokenizer_2", folder)
    path = folder / "tokenizer.json"
    if request.param != "as it is":
        tokenizer = FastTokenizer.from_file(str(path))
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "▁")]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        tokenizer.save(str(path))
    if request.param == "characters replaced":
        said = json.loads(path.read_text(encoding="utf-8"))
        said["normalizer"]["normalizers"].insert(
            0, {"type": "Precompiled", "precompiled_charsmap": NO_REPLACEMENTS}
        )
        path.write_text(json.dumps(said), encoding="utf-8")
    return folder


@pytest.mark.filterwarnings("ignore")  # of the library, which is asked for what it does
def test_every_prompt_has_the_ids_that_transformers_gives_it(folder: Path) -> None:
    from transformers import T5TokenizerFast

    theirs: Any = T5TokenizerFast.from_pretrained(folder)
    ours = Tokenizer(folder, as_trainer=True)
    for prompt in (*PLAIN, *BY_WHITE_SPACE, *EITHER):
        expected = theirs(prompt, padding="max_length", max_length=512, truncation=True)["input_ids"]
        assert ours(prompt).ids[0].tolist() == expected, prompt


def test_only_white_space_tells_the_two_apart() -> None:
    folder = MINI / "tokenizer_2"
    by_file, as_trainer = Tokenizer(folder), Tokenizer(folder, as_trainer=True)
    for prompts, same in ((PLAIN, True), (BY_WHITE_SPACE, False)):
        for prompt in prompts:
            assert (by_file(prompt).ids.tolist() == as_trainer(prompt).ids.tolist()) == same, prompt


def test_every_prompt_of_the_recorded_runs_has_the_same_ids_in_both() -> None:
    by_file, as_trainer = (Tokenizer(MINI / "tokenizer_2", as_trainer=which) for which in (False, True))
    texts = set()
    for path in sorted((GOLDENS / "preview_runs").glob("*/*.json")):
        texts |= _texts(json.loads(path.read_text(encoding="utf-8")))
    assert len(texts) > 5
    for text in sorted(texts):
        assert by_file(text).ids.tolist() == as_trainer(text).ids.tolist(), text


def _texts(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value[key] for key in ("prompt", "negative_prompt", "neg") if isinstance(value.get(key), str)}
        return own.union(*(_texts(one) for one in value.values()))
    return set().union(*(_texts(one) for one in value)) if isinstance(value, list) else set()


def test_a_file_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(WeightsInvalid, match=r"tokenizer\.json"):
        Tokenizer(tmp_path, as_trainer=True)
