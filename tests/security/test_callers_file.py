"""The file of callers: what it may say, how it is read again, and that it never lets in more than it says."""

from __future__ import annotations

import hmac
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from chromarpc_server.__main__ import main
from chromarpc_server.domain.limits import CallerLimits
from chromarpc_server.transport.access import callers_file as module
from chromarpc_server.transport.access.callers_file import CallersFile, entry_text, new_token
from tests.security.conftest import entry, sha256_of

ONE, TWO = "chromarpc_one", "chromarpc_two"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def write(path: Path, text: str, age: int = 0) -> Path:
    """Writes a file whose time of change tells versions apart however fast the test is."""
    path.write_text(text)
    os.utime(path, ns=(age, age))
    return path


def test_limits_are_the_entry_s_own_or_the_server_s(tmp_path: Path) -> None:
    text = entry("one", ONE, "max_streams = 2\nmax_upload_bytes = 0") + entry("two", TWO)
    callers = CallersFile(write(tmp_path / "c.toml", text), CallerLimits(max_streams=7, max_queued_jobs=3))
    one, two = callers.by_token(ONE), callers.by_token(TWO)
    assert one is not None
    assert two is not None
    assert (one.name, one.limits) == ("one", CallerLimits(max_streams=2, max_queued_jobs=3, max_upload_bytes=0))
    assert (two.name, two.limits) == ("two", CallerLimits(max_streams=7, max_queued_jobs=3))
    assert callers.count == 2


@pytest.mark.parametrize("wrong", ["", " ", ONE[:-1], ONE + "x", ONE.upper(), sha256_of(ONE), "\udcff", "é"])
def test_nothing_but_the_token_itself_is_known(tmp_path: Path, wrong: str) -> None:
    assert CallersFile(write(tmp_path / "c.toml", entry("one", ONE))).by_token(wrong) is None


def test_every_entry_is_compared_whichever_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callers = CallersFile(write(tmp_path / "c.toml", entry("one", ONE) + entry("two", TWO)))
    compared, compare = [], hmac.compare_digest

    def count(known: bytes, given: bytes) -> bool:
        compared.append(known)
        return compare(known, given)

    monkeypatch.setattr(module.hmac, "compare_digest", count)
    for token in (ONE, TWO, "no"):
        callers.by_token(token)
    assert len(compared) == 6


def test_a_caller_may_have_two_tokens_while_one_replaces_the_other(tmp_path: Path) -> None:
    text = f'[[callers]]\nname = "one"\ntoken_sha256 = ["{sha256_of(ONE)}", "{sha256_of(TWO).upper()}"]\n'
    callers = CallersFile(write(tmp_path / "c.toml", text))
    assert callers.by_token(ONE) == callers.by_token(TWO) is not None
    assert callers.count == 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[[callers]\n", "line 1"),
        ('[[callers]]\nname = "a"\n', "needs token_sha256 or certificate"),
        (f'[[callers]]\nname = "a b"\ntoken_sha256 = "{"0" * 64}"\n', "callers.0.name"),
        ('[[callers]]\nname = "a"\ntoken_sha256 = "0"\n', "callers.0.token_sha256"),
        (entry("a", ONE, "max_stream = 1"), "max_stream"),
        (entry("a", ONE, "max_streams = -1"), "max_streams"),
        (entry("a", ONE) + entry("a", TWO), "the name a appears twice"),
        (entry("a", ONE) + entry("b", ONE), "a token_sha256 appears twice"),
        ("caller = 1\n", "caller"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_by_place_and_not_quoted(
    tmp_path: Path, text: str, problem: str
) -> None:
    with pytest.raises(ValueError, match=r"c\.toml") as caught:
        CallersFile(write(tmp_path / "c.toml", text))
    assert problem in str(caught.value)
    assert sha256_of(ONE) not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.toml: No such file"):
        CallersFile(tmp_path / "none.toml")


def test_a_changed_file_is_read_within_a_second_and_a_broken_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="chromarpc_server")
    clock, path = Clock(), write(tmp_path / "c.toml", entry("one", ONE))
    callers = CallersFile(path, clock=clock)
    write(path, entry("two", TWO), age=1)
    assert callers.by_token(TWO) is None
    clock.now = 1.0
    assert callers.by_token(TWO) is not None
    assert callers.by_token(ONE) is None
    write(path, "[[", age=2)
    clock.now = 2.0
    assert callers.by_token(TWO) is not None
    path.unlink()
    clock.now = 3.0
    assert callers.by_token(TWO) is not None
    events = [record.getMessage() for record in caplog.records]
    assert events == ["callers.reloaded", "callers.not_reloaded", "callers.not_reloaded"]


def test_a_token_is_shown_once_and_its_entry_lets_it_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["token", "studio"])
    assert caught.value.code == 0
    shown = capsys.readouterr()
    token = shown.out.strip()
    assert token not in shown.err
    path = write(tmp_path / "c.toml", shown.err)
    caller = CallersFile(path).by_token(token)
    assert caller is not None
    assert caller.name == "studio"
    assert len({new_token() for _ in range(100)}) == 100


def test_a_name_that_no_entry_can_have_makes_no_token(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["token", 'a"\nname = "b'])
    assert caught.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "is not a name" in shown.err
    with pytest.raises(ValueError, match="is not a name"):
        entry_text("certificate:x", "t")


def test_making_a_token_needs_no_torch() -> None:
    code = (
        "import sys; from chromarpc_server.__main__ import main\n"
        "try: main(['token', 'a'])\nfinally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
