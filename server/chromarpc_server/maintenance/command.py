"""`chromarpc-server store …`: the command line of the tools."""

from __future__ import annotations

import argparse
import json
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from pydantic import Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from chromarpc_server.domain.callers import NOBODY
from chromarpc_server.jobs.store.unusable import StoreUnusable
from chromarpc_server.maintenance.backup import backup
from chromarpc_server.maintenance.check import check
from chromarpc_server.maintenance.forget import forget
from chromarpc_server.maintenance.layout import DataFolder
from chromarpc_server.maintenance.repair import repair
from chromarpc_server.maintenance.report import CannotBeDone, Report
from chromarpc_server.maintenance.restore import restore
from chromarpc_server.platform_folders import default_data_dir

EXIT_DONE, EXIT_PROBLEMS, EXIT_USAGE = 0, 1, 2
_PROGRAM = "chromarpc-server store"


class _DataDir(BaseSettings):
    """The one setting of the server's that tools have, from the environment or the server's file."""

    model_config = SettingsConfigDict(env_prefix="CHROMARPC_", frozen=True, extra="ignore")

    data_dir: Path = Field(default_factory=default_data_dir)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - not read
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """As the server's."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


def run(arguments: Sequence[str], config: Path | None, out: TextIO) -> int:
    """Runs one tool. Returns the exit code.

    Args:
        arguments: behind `store`, without `--config`.
        config: file of the server's settings.
        out: gets the report.
    """
    options = _parser().parse_args(arguments)
    try:
        folder = DataFolder(_data_dir(options.data_dir, config))
    except ValueError as error:
        print(f"{_PROGRAM}: {error}", file=sys.stderr)
        return EXIT_USAGE
    report = Report()
    try:
        _run_tool(options, folder, report)
    except (CannotBeDone, StoreUnusable) as error:
        return _failed(options, str(error), out)
    except sqlite3.Error as error:
        return _failed(options, f"{folder.database}: {error}: see to it, then run this again", out)
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        return _failed(options, f"{where}{error.strerror or error}: see to it, then run this again", out)
    if options.json:
        print(json.dumps({"command": options.command, "data_dir": str(folder.root), **report.as_json()}), file=out)
    else:
        for line in (*report.lines(), _verdict(options.command, report)):
            print(line, file=out)
    return EXIT_PROBLEMS if report.problems else EXIT_DONE


def _run_tool(options: argparse.Namespace, folder: DataFolder, report: Report) -> None:
    match options.command:
        case "check":
            check(folder, report)
        case "backup":
            backup(folder, options.target, report, with_downloads=not options.without_downloads)
        case "restore":
            restore(folder, options.source, report, replaces=options.replace, is_partial=options.partial)
        case "repair":
            repair(folder, report)
        case "forget":
            forget(folder, options.caller, report)


def _verdict(command: str, report: Report) -> str:
    if report.problems:
        return f"{command}: problems found: {len(report.problems)}"
    return f"{command}: all is well"


def _failed(options: argparse.Namespace, message: str, out: TextIO) -> int:
    if options.json:
        print(json.dumps({"command": options.command, "ok": False, "error": message}), file=out)
    else:
        print(f"{_PROGRAM} {options.command}: {message}", file=sys.stderr)
    return EXIT_PROBLEMS


def _data_dir(given: Path | None, config: Path | None) -> Path:
    """The server's data folder.

    Raises:
        ValueError: the environment or the file says nothing that makes sense.
    """
    if given is not None:
        return given

    class Found(_DataDir):
        model_config = SettingsConfigDict(toml_file=config)

    try:
        return Found().data_dir
    except ValidationError:
        raise ValueError("data_dir, as the environment or --config has it, is no path") from None


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="the server's data folder; by default what CHROMARPC_DATA_DIR or the file of --config says, or the "
        "platform's folder for this user's data",
    )
    common.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="Looks after what the server keeps below --data-dir. Exits 0 if all is well, 1 if there are "
        "problems or it could not be done, 2 if it was called wrongly. --config FILE reads the server's file.",
    )
    tools = parser.add_subparsers(dest="command", required=True, metavar="TOOL")

    def tool(name: str, summary: str) -> argparse.ArgumentParser:
        return tools.add_parser(name, parents=[common], help=summary, description=summary)

    tool("check", "Reads every row and hashes every file; changes nothing, beside a running server too.")
    making = tool("backup", "Copies the store, beside a running server too, and verifies every file meanwhile.")
    making.add_argument(
        "target", type=Path, metavar="DEST", help="folder of the backup; must not exist, or be empty"
    )
    making.add_argument(
        "--without-downloads", action="store_true", help="leave out adapters that were fetched from URLs"
    )
    putting = tool("restore", "Verifies a backup and puts it into the data folder; the server must be stopped.")
    putting.add_argument("source", type=Path, metavar="SRC", help="folder of the backup")
    putting.add_argument(
        "--replace", action="store_true", help="move the store that is there to quarantine/ rather than refuse"
    )
    putting.add_argument(
        "--partial", action="store_true", help="leave out files of the backup that are damaged rather than refuse"
    )
    tool("repair", "Makes a damaged store one that a server starts with; the server must be stopped.")
    wiping = tool("forget", "Wipes what is kept of one caller; the server must be stopped.")
    whose = wiping.add_mutually_exclusive_group(required=True)
    whose.add_argument(
        "--caller", metavar="NAME", type=_name, help="as the callers file has it, or certificate:NAME"
    )
    whose.add_argument(
        "--nobody",
        dest="caller",
        action="store_const",
        const=NOBODY.name,
        help="the one caller of a server without a callers file",
    )
    return parser


def _name(text: str) -> str:
    """A caller's name: an empty one may be a variable that somebody forgot to set."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; --nobody is the one caller of a server without a callers file")
    return text
