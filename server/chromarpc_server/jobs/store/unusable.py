"""Why a store on disk cannot be opened. The messages are for whoever starts the process."""

from __future__ import annotations


class StoreUnusable(ValueError):
    """The store cannot be opened; the message says which file, why, and what to do."""


class StoreInUse(StoreUnusable):
    """Another process has it."""
