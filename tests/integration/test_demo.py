"""`make demo` is the first thing that a stranger does."""

from __future__ import annotations

from chromarpc import Client
from tools.demo import running_server


def test_the_demo_finds_the_server_that_it_starts() -> None:
    with running_server() as target, Client(target) as client:
        client.wait_until_serving(timeout_s=60)
        assert {model.id for model in client.list_models()} >= {"chroma-mini"}
