"""Why a faster way is not taken, in words that may leave the server."""

from __future__ import annotations

from chromarpc_server.pipeline.memory_errors import translate_memory_error


class WrongResult(ArithmeticError):
    """A faster way gave another result than the plain one; the message is for people."""


def unusable(problem: Exception) -> str:
    """The reason: a library's own message may name files or hold anything, and stays in the log."""
    if isinstance(problem, WrongResult):
        return str(problem)
    if translate_memory_error(problem) is not None:
        return "there was too little memory for it"
    return f"it fails here ({type(problem).__name__}; the server's log has more)"
