"""Fixtures of tests of a cluster's connection."""

from __future__ import annotations

import pytest

from chromarpc_server.pipeline.libraries import libraries


@pytest.fixture(scope="session", autouse=True)
def imported() -> None:
    """Has no device's thread import diffusers and transformers, which parse sources, after its test has ended:
    before Python 3.11.8 two threads that parse at once fail.
    """
    libraries()
