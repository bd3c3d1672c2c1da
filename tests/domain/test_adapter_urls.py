"""What a URL's text alone tells: passwords and pages are refused with the request, beside its other faults."""

from __future__ import annotations

import pytest

from chromarpc_server.domain.errors import InvalidParameter
from chromarpc_server.domain.plan import Plan
from chromarpc_server.domain.requests import GenerationRequest, LoraRequest, PromptRequest
from chromarpc_server.domain.resolve import Serving, resolve


def plan_with(*paths: str, **prompt: int) -> Plan:
    loras = tuple(LoraRequest(path) for path in paths)
    return resolve(GenerationRequest("chroma", loras, prompts=(PromptRequest("a", **prompt),)), Serving())


def refusals(*paths: str, **prompt: int) -> dict[str, str]:
    """What is wrong with a request, by field; nothing where it is taken."""
    try:
        plan_with(*paths, **prompt)
    except InvalidParameter as error:
        return {violation.field: violation.description for violation in error.violations}
    return {}


@pytest.mark.parametrize(
    "url",
    [
        "https://user:s3cret@adapters.example/a",
        "https://s3cret@adapters.example/a",
        "HTTPS://:s3cret@adapters.example/a",
        "https://@adapters.example/s3cret",
        "http://user:s3cret@adapters.example:8080?x",
        "http://user:s3cret@[::1]/a",
        "http://user:s3cret@",
        "https://user:s3cret\\@adapters.example/a",
        "https://us\ter:s3cret@adapters.example/a",
        "https://user%3As3cret%40adapters.example/a",
        "https://user:s3cret@adapters.example@huggingface.co/o/r/tree/main",
    ],
)
def test_a_url_with_a_user_name_or_password_is_refused_and_not_repeated(url: str) -> None:
    found = refusals("a.safetensors", url, width=1)
    assert set(found) == {"loras.1.path", "prompts.0.width"}
    assert "user name or password" in found["loras.1.path"]
    assert "s3cret" not in str(found)


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("https://huggingface.co/owner/name/tree/main", "/resolve/"),
        ("https://huggingface.co/owner/name/tree/main/folder?token=s3cret", "/resolve/"),
        ("https://huggingface.co/owner/name", "/resolve/"),
        ("https://huggingface.co/owner/name/", "/resolve/"),
        ("https://huggingface.co/owner", "/resolve/"),
        ("https://hf.co./gpt2/tree/main", "/resolve/"),
        ("https://www.huggingface.co/datasets/owner/name/tree/main", "/resolve/"),
        ("https://huggingface.co/datasets/owner/name", "/resolve/"),
        ("https://HuggingFace.co:443/owner/name/discussions/1", "/resolve/"),
        ("https://huggingface.co/owner/name/commits/main", "/resolve/"),
        ("https://civitai.com/models/123/a-style?modelVersionId=456", "/api/download/models/"),
        ("https://github.com/owner/name/blob/main/a.safetensors", "/raw/"),
        ("https://github.com/owner/name/tree/main", "/raw/"),
        ("https://github.com/owner/name", "/raw/"),
    ],
)
def test_the_page_of_a_file_or_folder_is_refused_with_what_to_give_instead(url: str, hint: str) -> None:
    found = refusals(url)
    assert set(found) == {"loras.0.path"}
    assert hint in found["loras.0.path"]
    assert "s3cret" not in found["loras.0.path"]


@pytest.mark.parametrize(
    "path",
    [
        "https://huggingface.co/owner/name/resolve/main/tree/a.safetensors",
        "https://huggingface.co/owner/name/blob/main/a.safetensors",
        "https://huggingface.co/owner/tree/resolve/main/a.safetensors",
        "https://huggingface.co/gpt2/resolve/main/a.safetensors?download=true",
        "https://huggingface.co/datasets/owner/name/resolve/refs%2Fpr%2F1/a.safetensors",
        "https://cdn-lfs.huggingface.co/a/b",
        "https://civitai.com/api/download/models/456?type=Model&format=SafeTensor",
        "https://github.com/owner/name/releases/download/v1/a.safetensors",
        "https://github.com/owner/name/raw/main/a.safetensors",
        "https://raw.githubusercontent.com/owner/name/main/a.safetensors",
        "https://adapters.example/tree/a@b/user:name@c?d=e@f#g@h",
        "https://adapters.example",
        "user:name@folder/a.safetensors",
    ],
)
def test_what_may_be_a_file_is_left_as_it_is(path: str) -> None:
    assert plan_with(path).loras[0].path == path
