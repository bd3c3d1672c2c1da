"""The tool that writes the blocking client from the asyncio one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import unasync


def test_code_that_waits_becomes_code_that_blocks() -> None:
    text = """
    async def __aenter__(self) -> AsyncClient:
        async with self.stream as stream:
            return [await one async for one in stream]
    """
    assert (
        unasync.blocking(text)
        == """
    def __enter__(self) -> Client:
        with self.stream as stream:
            return [one for one in stream]
    """
    )


def test_what_is_marked_is_left_out_with_what_is_indented_below() -> None:
    text = """
class A:
    loop = 1  # async only
    other = 2

    def close(self) -> None:  # async only
        self.over = True

        self.cancel()

    def cancel(self) -> None:
        pass
"""
    assert (
        unasync.without_marked(text)
        == """
class A:
    other = 2

    def cancel(self) -> None:
        pass
"""
    )


def test_what_has_no_blocking_counterpart_is_refused() -> None:
    with pytest.raises(ValueError, match=r"asyncio\.gather"):
        unasync.blocking("    asyncio.gather(one, other)\n")


def test_a_phrase_that_nothing_says_any_more_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unasync, "PHRASES", (*unasync.PHRASES, ("no such words", "none")))
    with pytest.raises(ValueError, match="no such words"):
        unasync.generated()


def test_a_file_that_was_edited_by_hand_is_found_and_written_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edited = tmp_path / "client.py"
    edited.write_text("edited")
    monkeypatch.setattr(unasync, "generated", lambda: {str(edited): "generated"})
    assert unasync.main(["--check"]) == 1
    assert "make sync-client" in capsys.readouterr().err
    assert unasync.main([]) == 0
    assert edited.read_text() == "generated"
    assert unasync.main(["--check"]) == 0
