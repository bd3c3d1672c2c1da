"""`chromarpc-server`: serve (the default), web, verify, models, fetch, token, store.

The light install has this command too, so whatever is not Python's own is imported where it is needed.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from chromarpc_server import extras
from chromarpc_server.domain.models import REGISTRY
from chromarpc_server.observability import logs

if TYPE_CHECKING:
    from chromarpc_server.settings import ServerSettings

EXIT_INCOMPLETE = 1
EXIT_USAGE = 2
THREADS_END_S = 1.0
"""How long a device's thread may take to end, once nothing is left for it to do."""

_Settings = TypeVar("_Settings", bound="ServerSettings")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line and exits with its code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        sys.exit(_run(arguments))
    except extras.NotInstalled as error:
        print(f"chromarpc-server: {error}", file=sys.stderr)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("chromarpc", "chromarpc_server"):
            raise
        # Something that a package of ours needs in turn.
        print(f"chromarpc-server: {extras.NotInstalled([error.name])}", file=sys.stderr)
    sys.exit(EXIT_INCOMPLETE)


def _run(arguments: list[str]) -> int:
    command = arguments[0] if arguments and not arguments[0].startswith("-") else "serve"
    rest = arguments[1:] if arguments and command == arguments[0] else arguments
    if rest[:1] == ["--version"]:
        print(f"chromarpc-server {_version()}")
        return 0
    match command:
        case "serve":
            return _serve(rest)
        case "web":
            return _web(rest)
        case "verify":
            return _verify(rest)
        case "models":
            return _models(rest)
        case "fetch":
            return _fetch(rest)
        case "token":
            return _token(rest)
        case "store":
            return _store(rest)
        case _:
            known = "serve, web, verify, models, fetch, token or store"
            print(f"chromarpc-server: no such command: {command}; try {known}", file=sys.stderr)
            return EXIT_USAGE


def _version() -> str:
    try:
        return importlib.metadata.version("chromarpc")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return "0.0.0"


def _serve(arguments: list[str]) -> int:
    extras.require(extras.SETTINGS)
    from chromarpc_server.settings import ServerSettings  # noqa: PLC0415 - an extra

    settings = _settings(ServerSettings, arguments)
    if settings is None:
        return EXIT_USAGE
    extras.require(extras.SERVER)
    if (settings.devices or "").startswith("ray"):
        extras.require(extras.RAY, "server,ray")
    logs.configure(settings.log_level, as_json=settings.log_format == "json")
    from chromarpc_server.app import serve  # noqa: PLC0415 - torch takes seconds; --help and bad flags do not wait

    return _leave(asyncio.run(serve(settings)))


def _leave(code: int) -> int:
    """Ends the process at once where something failed, or a device's thread hangs: Python would wait for it.

    Whoever asks once more for an end that has come, as with a second SIGTERM, does not change how it is told.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if code or _hangs():
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _hangs() -> bool:
    """Whether a device's thread does not end, although it has nothing to do any more."""
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("device")]
    for thread in threads:
        thread.join(THREADS_END_S)
    return any(thread.is_alive() for thread in threads)


def _web(arguments: list[str]) -> int:
    extras.require(extras.SETTINGS, "server,web")
    from chromarpc_server.web import WebSettings, serve_web  # noqa: PLC0415 - not needed by the rest

    settings = _settings(WebSettings, arguments)
    if settings is None:
        return EXIT_USAGE
    if settings.web_upstream is None and not settings.print_config:
        extras.require(extras.SERVER, "server,web")
    logs.configure(settings.log_level, as_json=settings.log_format == "json")
    return _leave(asyncio.run(serve_web(settings)))


def _settings(kind: type[_Settings], arguments: list[str]) -> _Settings | None:
    """The settings of a command; None where they are wrong, which was said."""
    from pydantic import ValidationError  # noqa: PLC0415 - an extra
    from pydantic_settings import CliApp, SettingsError  # noqa: PLC0415

    # Read when torch first allocates on a GPU: sizes vary from request to request, and fixed segments would split.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    config, arguments = _take_config(arguments)
    if config is not None and not config.is_file():
        print(f"chromarpc-server: --config {config}: no such file", file=sys.stderr)
        return None
    before = kind.model_config.get("toml_file")
    kind.model_config["toml_file"] = config or before
    try:
        return CliApp.run(kind, cli_args=arguments)
    except ValidationError as error:
        for problem in error.errors():
            message = problem["msg"].removeprefix("Value error, ")
            print(f"chromarpc-server: {_where(problem['loc'])}{message}", file=sys.stderr)
        return None
    except SettingsError as error:
        print(f"chromarpc-server: {error}", file=sys.stderr)
        return None
    finally:
        kind.model_config["toml_file"] = before


def _where(location: tuple[int | str, ...]) -> str:
    """The flag that a problem is about, and the key inside it; empty where the problem says it itself."""
    match location:
        case ("model", name, *keys):
            flag = f"--model {name}"
        case ("models", name, *keys):
            flag = f"[models.{name}]"
        case _:
            flag, keys = "--" + "-".join(str(part) for part in location).replace("_", "-"), []
    return "".join(f"{part}: " for part in (flag, *keys)) if location else ""


def _take_config(arguments: list[str]) -> tuple[Path | None, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path, default=os.environ.get("CHROMARPC_CONFIG"))
    known, rest = parser.parse_known_args(arguments)
    return (Path(known.config) if known.config else None), rest


def _verify(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="chromarpc-server verify",
        description="Checks this install against recorded outputs of the reference: a folder laid out like "
        "tests/goldens. Exits 0 if every case that ran passed, 1 if one failed or nothing ran.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder with recorded vectors")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        print(f"chromarpc-server verify: {options.folder}: no such folder", file=sys.stderr)
        return EXIT_USAGE
    extras.require(extras.VERIFY)
    from chromarpc_server.verify import verify  # noqa: PLC0415 - torch takes seconds; --help does not wait

    return verify(options.folder, device=options.device, as_json=options.json, out=sys.stdout)


def _models(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="chromarpc-server models",
        description="Lists the models that a server with these settings has: where each part lies and how it is "
        "stored, what is missing and how to fetch it, and which files are no Chroma. Exits 0 if one of the models "
        "that the settings bring is complete (without any: one that is built in), 1 if none is.",
        allow_abbrev=False,
    )
    _add_model_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args(arguments)
    extras.require((*extras.SETTINGS, *extras.FETCH))
    settings = _model_settings(options)
    if settings is None:
        return EXIT_USAGE
    from chromarpc_server.models_command import list_models  # noqa: PLC0415 - torch takes seconds

    try:
        return list_models(settings, as_json=options.json, out=sys.stdout)
    except ValueError as error:
        print(f"chromarpc-server models: {error}", file=sys.stderr)
        return EXIT_USAGE


def _fetch(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="chromarpc-server fetch",
        description="Downloads models' weights into the Hugging Face cache (HF_HOME), resuming what an "
        "earlier try left. A token for gated files is taken from HF_TOKEN or `hf auth login`.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "names",
        nargs="+",
        metavar="MODEL",
        help=f"{', '.join(REGISTRY)}, a model of the settings, or owner/name[:file or folder] of the hub",
    )
    _add_model_flags(parser)
    options = parser.parse_args(arguments)
    extras.require(extras.FETCH)
    settings = None
    if any(name not in REGISTRY for name in options.names) or options.model or options.config or options.comfyui:
        extras.require(extras.SETTINGS)
        settings = _model_settings(options)
        if settings is None:
            return EXIT_USAGE
    from chromarpc_server.models_command import fetch_models  # noqa: PLC0415 - slow imports

    return fetch_models(options.names, settings)


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Those of the server that say which models it has."""
    parser.add_argument("--comfyui", metavar="DIR", help="a ComfyUI models folder")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FILE_OR_REPO[,key=value...]")
    parser.add_argument("--config", metavar="FILE", help="the server's TOML file")


def _model_settings(options: argparse.Namespace) -> ServerSettings | None:
    """The server's settings, as far as these flags, the environment and the file have them."""
    from chromarpc_server.settings import ServerSettings  # noqa: PLC0415 - an extra

    flags = [flag for model in options.model for flag in ("--model", model)]
    flags += ["--comfyui", options.comfyui] if options.comfyui else []
    flags += ["--config", options.config] if options.config else []
    return _settings(ServerSettings, flags)


def _token(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="chromarpc-server token",
        description="Makes a bearer token. Prints the token, which is kept nowhere, on standard output, and the "
        "entry of the callers file (--callers) that lets it in on standard error.",
    )
    parser.add_argument("name", metavar="NAME", help="whose token it is, as logs and limits know it")
    options = parser.parse_args(arguments)
    extras.require(extras.TOKEN)
    from chromarpc_server.transport.access.callers_file import entry_text, new_token  # noqa: PLC0415 - slow imports

    token = new_token()
    try:
        entry = entry_text(options.name, token)
    except ValueError as error:
        print(f"chromarpc-server token: {error}", file=sys.stderr)
        return EXIT_USAGE
    # Everything on standard error is TOML, so that it can be appended to the file as it is.
    print(
        f"\n# The token of {options.name} is on standard output and kept nowhere; this lets it in:",
        file=sys.stderr,
    )
    print(entry, file=sys.stderr, flush=True)
    print(token)
    return 0


def _store(arguments: list[str]) -> int:
    extras.require(extras.STORE)
    from chromarpc_server.maintenance.command import run  # noqa: PLC0415 - an extra

    config, arguments = _take_config(arguments)
    if config is not None and not config.is_file():
        print(f"chromarpc-server store: --config {config}: no such file", file=sys.stderr)
        return EXIT_USAGE
    return run(arguments, config, sys.stdout)


if __name__ == "__main__":
    main()
