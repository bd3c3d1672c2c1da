"""`chromarpc-server`: serve (the default), web, verify, fetch, token, store.

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
from chromarpc_server.domain.models import REGISTRY, HubSource
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
        case "fetch":
            return _fetch(rest)
        case "token":
            return _token(rest)
        case "store":
            return _store(rest)
        case _:
            known = "serve, web, verify, fetch, token or store"
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
            where = "--" + "-".join(str(part) for part in problem["loc"]).replace("_", "-")
            message = problem["msg"].removeprefix("Value error, ")
            print(f"chromarpc-server: {where + ': ' if problem['loc'] else ''}{message}", file=sys.stderr)
        return None
    except SettingsError as error:
        print(f"chromarpc-server: {error}", file=sys.stderr)
        return None
    finally:
        kind.model_config["toml_file"] = before


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


def _fetch(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="chromarpc-server fetch",
        description="Downloads a model's weights into the Hugging Face cache (HF_HOME), resuming what an "
        "earlier try left. A token for gated files is taken from HF_TOKEN or `hf auth login`.",
    )
    fetchable = [spec.id for spec in REGISTRY.values() if isinstance(spec.source, HubSource)]
    parser.add_argument("model", choices=fetchable, help="which model")
    options = parser.parse_args(arguments)
    extras.require(extras.FETCH)
    from chromarpc_server.runtime.model_files import fetch  # noqa: PLC0415 - slow imports

    try:
        fetch(REGISTRY[options.model])
    except OSError as error:  # huggingface_hub's HTTP errors are OSErrors too
        print(f"chromarpc-server fetch: {error}", file=sys.stderr)
        print("Run the same command again to go on where it stopped.", file=sys.stderr)
        return 1
    print(f"{options.model} is ready: start the server with `chromarpc-server --preload {options.model}`")
    return 0


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
