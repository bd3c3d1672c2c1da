"""Which checkpoint of Chroma a name means, and when an adapter's is another one."""

from __future__ import annotations

import pytest

from chromarpc_server.domain.base_names import (
    base_name_of,
    is_of_family,
    is_other_base,
    known_base,
    usual_defaults,
)
from chromarpc_server.domain.models import CHROMA, CHROMA_FLASH, CHROMA_HD


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("Chroma1-HD.safetensors", "lodestones/Chroma1-HD"),
        ("chroma1_hd_fp8_scaled.safetensors", "lodestones/Chroma1-HD"),
        ("Chroma1-HD-Q4_K_M.gguf", "lodestones/Chroma1-HD"),
        ("Chroma1-HD-Flash-heun.safetensors", "lodestones/Chroma1-Flash"),
        ("lodestones/Chroma1-Base", "lodestones/Chroma1-Base"),
        ("chroma-unlocked-v48.safetensors", "lodestones/Chroma1-Base"),
        ("chroma-unlocked-v37-detail-calibrated.safetensors", "lodestones/Chroma/v37"),
        ("lodestones/Chroma/v29", "lodestones/Chroma/v29"),
        (r"C:\models\Chroma1-HD.safetensors", "lodestones/Chroma1-HD"),
        ("lodestones/Chroma", None),
        ("/models/Chroma1-HD/my merge.safetensors", None),
        ("chroma-mini", None),
        ("v29", None),
        ("dreamshaper_v10", None),
    ],
)
def test_published_checkpoints_are_known_by_their_names(name: str, base: str | None) -> None:
    assert known_base(name) == base


def test_a_file_of_no_published_name_is_its_own_base() -> None:
    assert base_name_of("/models/My Merge.v2.safetensors") == "My Merge.v2"
    assert base_name_of("Chroma1-HD_fp8.gguf") == "lodestones/Chroma1-HD"


@pytest.mark.parametrize(
    ("named", "base", "other"),
    [
        ("Chroma1-Base.safetensors", "lodestones/Chroma1-HD", True),
        ("/home/me/Chroma1-HD-fp8.safetensors", "lodestones/Chroma1-HD", False),
        ("chroma-unlocked-v48", "lodestones/Chroma1-Base", False),
        ("chroma", "lodestones/Chroma1-HD", False),
        ("lodestones/Chroma", "lodestones/Chroma1-HD", False),
        ("my merge", "lodestones/Chroma1-HD", True),
        ("models/My Merge.safetensors", "my merge", False),
        ("Chroma1-HD", "my merge", True),
        ("Chroma1-HD", "", False),
        ("  ", "lodestones/Chroma1-HD", False),
    ],
)
def test_an_adapters_base_is_another_one_where_its_name_says_so(named: str, base: str, other: bool) -> None:
    assert is_other_base(named, base) is other


def test_relatives_of_other_architectures_are_not_of_the_family() -> None:
    assert is_of_family("chroma")
    assert not any(map(is_of_family, ("chroma_radiance", "zeta_chroma", "flux1")))


def test_a_known_base_has_its_models_defaults() -> None:
    assert usual_defaults("Chroma1-HD-Q8_0.gguf") == CHROMA_HD.defaults
    assert usual_defaults("lodestones/Chroma1-Flash") == CHROMA_FLASH.defaults
    assert usual_defaults("my merge") == usual_defaults("") == CHROMA.defaults
