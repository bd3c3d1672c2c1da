"""Prompt weights as ComfyUI reads them."""

from __future__ import annotations

import time

import pytest

from chromarpc_server.domain.prompt_weights import MAX_DEPTH, names_embedding, weighted_parts


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("", []),
        ("a cat", [("a cat", 1.0)]),
        ("(a cat)", [("a cat", 1.1)]),
        ("a (red:1.3) cat", [("a ", 1.0), ("red", 1.3), (" cat", 1.0)]),
        ("(minus:-0.5)", [("minus", -0.5)]),
        ("((very)) much", [("very", 1.1 * 1.1), (" much", 1.0)]),
        ("((x:2) y)", [("x", 2.0), (" y", 1.1)]),
        ("(a (b:3):2)", [("a ", 2.0), ("b", 3.0)]),
        (r"a \(literal\) bracket", [("a (literal) bracket", 1.0)]),
        (r"(\(a\):1.5)", [("(a)", 1.5)]),
        ("(unbalanced", [("(unbalanced", 1.0)]),
        ("a) (b)", [("a) (b)", 1.0)]),
        ("(a (b)", [("a ", 1.1), ("(b", 1.1)]),
        ("[alternate] {braces}", [("[alternate] {braces}", 1.0)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(a:nan)", [("a:nan", 1.1)]),
        ("(a:inf)", [("a:inf", 1.1)]),
        ("(:2)", [(":2", 1.1)]),
    ],
)
def test_a_prompt_is_read_in_parts_with_weights(prompt: str, parts: list[tuple[str, float]]) -> None:
    assert weighted_parts(prompt) == parts


def test_brackets_as_deep_as_a_prompt_may_be_long_are_read_in_no_time() -> None:
    began = time.process_time()
    (part,) = weighted_parts("(" * 30_000 + "a" + ")" * 30_000)
    assert time.process_time() - began < 5
    assert part[1] == pytest.approx(1.1**MAX_DEPTH)


@pytest.mark.parametrize("prompt", ["embedding:x", "a embedding:x", "a\nembedding:x", "(embedding:x:1.2)"])
def test_a_textual_inversion_is_noticed_where_comfyui_reads_one(prompt: str) -> None:
    assert names_embedding(prompt)


@pytest.mark.parametrize("prompt", ["", "an embedding", "myembedding:x", "embedding of a face"])
def test_what_names_none_is_text(prompt: str) -> None:
    assert not names_embedding(prompt)
