"""Settings from flags, environment and file; what is unknown or unsafe stops the start."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError
from pydantic_settings import CliApp

from chromarpc_server.__main__ import main
from chromarpc_server.settings import ServerSettings


def _from_flags(*flags: str) -> ServerSettings:
    return CliApp.run(ServerSettings, cli_args=list(flags))


def test_the_defaults_bind_to_loopback() -> None:
    assert (_from_flags().host, _from_flags().port) == ("127.0.0.1", 50051)


def test_flags_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHROMARPC_PORT", "1")
    monkeypatch.setenv("CHROMARPC_GRACE_S", "7")
    settings = _from_flags("--port", "2", "--alias", "chroma=chroma-mini", "--limits.max-prompts", "3")
    assert (settings.port, settings.grace_s, settings.limits.max_prompts) == (2, 7.0, 3)
    assert settings.alias == {"chroma": "chroma-mini"}


@pytest.mark.parametrize(
    "flags",
    [
        ("--host", "0.0.0.0"), ("--port", "70000"), ("--profile", "fast"), ("--dtype", "float16"),
        ("--alias", "chroma=nothing"), ("--lora-root", "/no/such/folder"), ("--limits.max-prompts", "0"),
        ("--preload", "nothing"), ("--model-folder", "chroma=/no/such/folder"),
    ],
)  # fmt: skip
def test_a_bad_value_stops_the_start(flags: tuple[str, ...]) -> None:
    with pytest.raises((ValidationError, SystemExit)):
        _from_flags(*flags)


def test_another_address_needs_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert _from_flags("--host", "0.0.0.0", "--insecure").host == "0.0.0.0"
    with pytest.raises(SystemExit) as caught:
        main(["--host", "0.0.0.0"])
    assert caught.value.code == 2
    assert "--insecure" in capsys.readouterr().err


def test_a_file_is_read_and_an_unknown_key_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "server.toml"
    config.write_text('host = "0.0.0.0"\nnonsense = 1\n')
    with pytest.raises(SystemExit) as caught:
        main(["--config", str(config)])
    assert caught.value.code == 2
    assert "nonsense" in capsys.readouterr().err


def test_an_unknown_command_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["paint"])
    assert caught.value.code == 2
    assert "serve, web, verify, models, fetch, token or store" in capsys.readouterr().err
