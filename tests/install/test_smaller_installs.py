"""`chromarpc-server` in installs that lack what it needs: a sentence and a command, no traceback."""

from __future__ import annotations

import tomllib

import pytest

from tests.smaller_install import ROOT, run
from tools.check_dependencies import declared, installed_modules, providers

LIGHT = "hide_all_but_requirements_of('chromarpc')"
SERVER = 'pip install "chromarpc[server]"'


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        ((), SERVER),
        (("--help",), SERVER),
        (("serve", "--port", "0"), SERVER),
        (("web",), 'pip install "chromarpc[server,web]"'),
        (("fetch", "chroma"), SERVER),
        (("verify", "tests/goldens"), SERVER),
        (("token", "studio"), SERVER),
        (("store", "check"), SERVER),
        (("models",), SERVER),
    ],
)
def test_the_light_install_says_what_to_install(arguments: tuple[str, ...], command: str) -> None:
    # With and without what the light install's own packages may bring along.
    prelude = f"{LIGHT}; smaller_install.hide(['pydantic', 'pydantic_settings'])"
    told = run(prelude, "chromarpc-server", *arguments)
    assert (told.returncode, told.stdout) == (1, "")
    assert len(told.stderr.splitlines()) == 1
    assert told.stderr.startswith("chromarpc-server: ")
    assert told.stderr.endswith(f"not installed: {command}\n")


@pytest.mark.parametrize(
    ("arguments", "hidden", "told"),
    [
        (("--port", "0"), ["torch"], "torch is not installed"),
        (("--port", "0"), ["numpy", "torch"], "numpy and torch are not installed"),
        (("web",), ["torch"], "torch is not installed"),
        (("fetch", "chroma"), ["huggingface_hub"], "huggingface_hub is not installed"),
        (("verify", "tests/goldens"), ["safetensors"], "safetensors is not installed"),
        (("--port", "0"), ["pydantic_settings"], "pydantic_settings is not installed"),
        (("store", "check"), ["filelock"], "filelock is not installed"),
        # What a package of ours needs in turn.
        (("token", "x"), ["pydantic_core"], "pydantic_core is not installed"),
    ],
)
def test_a_missing_part_is_named(arguments: tuple[str, ...], hidden: list[str], told: str) -> None:
    said = run(f"hide({hidden!r})", "chromarpc-server", *arguments)
    assert (said.returncode, said.stderr) == (1, f"chromarpc-server: {told}: pip install {_extra(arguments)}\n")


def _extra(arguments: tuple[str, ...]) -> str:
    return '"chromarpc[server,web]"' if arguments[0] == "web" else '"chromarpc[server]"'


@pytest.mark.parametrize("command", ["chromarpc", "chromarpc-server"])
def test_the_version_needs_no_extra_and_no_torch(command: str) -> None:
    told = run(f"hide(['torch', 'numpy', 'transformers']); smaller_install.{LIGHT}", command, "--version")
    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout.split()[0] == command
    assert told.stdout.split()[1][0].isdigit()


def test_a_wrong_flag_is_told_before_what_is_missing() -> None:
    told = run("hide(['torch'])", "chromarpc-server", "--port", "70000")
    assert told.returncode == 2
    assert "--port" in told.stderr


def test_whatever_the_server_declares_is_looked_for() -> None:
    from chromarpc_server import extras

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    installed = installed_modules()
    looked_for = {name for module in extras.SERVER for name in providers(module, installed)}
    assert declared(project)["server"] - looked_for == {"torchao"}  # verify alone does without
    assert looked_for <= declared(project)["server"]
