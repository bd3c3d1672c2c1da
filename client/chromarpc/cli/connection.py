"""The options every command shares: which server, with what token and certificates."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from chromarpc.channel import DEFAULT_TARGET, TlsOptions
from chromarpc.cli.exits import UsageError, reported
from chromarpc.cli.interrupt import interruptible
from chromarpc.client import Client

TOKEN_VARIABLE = "CHROMARPC_TOKEN"  # noqa: S105 - the name of a variable
"""Holds a token; not an option, because command lines show in the list of processes."""


def connect(
    *,
    target: Annotated[
        str,
        typer.Option(
            envvar="CHROMARPC_TARGET", show_envvar=True, help="Server, as HOST:PORT, [::1]:PORT or unix:/PATH."
        ),
    ] = DEFAULT_TARGET,
    token_file: Annotated[
        Path | None, typer.Option(help=f"File that holds a bearer token; or set {TOKEN_VARIABLE}.")
    ] = None,
    insecure_token: Annotated[
        bool, typer.Option("--insecure-token", help="Send the token to another machine without TLS.")
    ] = False,
    tls: Annotated[bool, typer.Option("--tls", help="Use TLS; implied by the options below.")] = False,
    tls_root: Annotated[Path | None, typer.Option(help="PEM file of the authorities to trust.")] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="PEM file of this client's certificate; needs --tls-key.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of its key.")] = None,
    tls_name: Annotated[str | None, typer.Option(help="Name to expect in the server's certificate.")] = None,
) -> Client:
    """The client that the options describe.

    Raises:
        UsageError: they contradict each other, or a file cannot be read.
    """
    options = TlsOptions(tls_root, tls_cert, tls_key, tls_name)
    try:
        token = token_file.read_text("utf-8").strip() if token_file else os.environ.get(TOKEN_VARIABLE) or None
        return Client(
            target,
            token=token,
            tls=options if tls or options != TlsOptions() else False,
            allow_insecure_token=insecure_token,
        )
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{token_file}: holds no token") from None
    except ValueError as error:
        raise UsageError(f"{error}".replace("allow_insecure_token=True", "--insecure-token")) from None


def with_client(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command its first argument, the client; the options of `connect`; and a report of errors."""
    _, *own = inspect.signature(command, eval_str=True).parameters.values()
    shared = inspect.signature(connect, eval_str=True).parameters

    @functools.wraps(command)
    def run(**options: Any) -> None:
        with reported(), connect(**{name: options.pop(name) for name in shared}) as client:
            interruptible(lambda: command(client, **options), client.close)

    parameters = [*own, *shared.values()]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
