"""Log lines: the job and its caller in each, and nobody forges one."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import chromarpc
from chromarpc_server.domain.callers import Caller, set_current_caller
from chromarpc_server.domain.devices import set_current_device_id
from chromarpc_server.observability.logs import JsonFormatter, TextFormatter
from tests.conftest import RunningServer
from tests.security.conftest import TOKENS


def record(**fields: Any) -> logging.LogRecord:
    return logging.getLogger("chromarpc_server").makeRecord(
        "chromarpc_server", logging.INFO, __file__, 1, "job.accepted", (), None, extra=fields
    )


def test_text_stays_on_its_line_and_fields_apart() -> None:
    line = TextFormatter().format(record(job_id="j", path="a\n12:00:00 INFO forged", name_="x y=1", count=3))
    assert line.endswith(r'INFO job.accepted job_id=j path="a\n12:00:00 INFO forged" name_="x y=1" count=3')


def test_json_is_one_object() -> None:
    entry = json.loads(JsonFormatter().format(record(job_id="j", path="a\nb")))
    assert (entry["event"], entry["level"], entry["job_id"], entry["path"]) == (
        "job.accepted",
        "info",
        "j",
        "a\nb",
    )
    assert "caller" not in entry


async def test_whoever_calls_is_in_every_line_of_the_call() -> None:
    set_current_caller(Caller("alice"))
    assert json.loads(JsonFormatter().format(record()))["caller"] == "alice"
    assert json.loads(JsonFormatter().format(record(caller="bob")))["caller"] == "bob"
    assert "caller=alice" in TextFormatter().format(record())


def test_what_a_device_s_thread_logs_says_which_device() -> None:
    with ThreadPoolExecutor(1, initializer=set_current_device_id, initargs=("cuda:1",)) as thread:
        said = json.loads(thread.submit(JsonFormatter().format, record()).result())
        named = json.loads(thread.submit(JsonFormatter().format, record(device="cuda:0")).result())
    assert (said["device"], named["device"]) == ("cuda:1", "cuda:0")
    assert "device" not in json.loads(JsonFormatter().format(record())), "any other thread is no device's"


def test_a_job_s_lines_have_its_id_and_its_caller(
    serve: Callable[..., RunningServer],
    callers_file: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="chromarpc_server")
    server = serve(callers=callers_file())
    with chromarpc.Client(server.target, token=TOKENS["alice"]) as client:
        client.generate_images("a", model="chroma-mini", width=64, height=64, sample_steps=1)
    lines = [found for found in caplog.records if found.getMessage().startswith("job.")]
    assert [found.getMessage() for found in lines] == ["job.accepted", "job.begun", "job.completed"]
    assert {found.__dict__["caller"] for found in lines} == {"alice"}
    assert [found.__dict__.get("device") for found in lines] == [None, "cpu", "cpu"]
    assert len({found.__dict__["job_id"] for found in lines}) == 1


def test_what_an_exception_quotes_is_no_line_of_its_own() -> None:
    error = ValueError("a\n12:00:00 INFO job.completed job_id=forged\r12:00:01 INFO x\u2028y")
    made = record()
    made.exc_info = (ValueError, error, None)
    first, *rest = TextFormatter().format(made).splitlines()
    assert first.endswith("INFO job.accepted")
    assert len(rest) == 4
    assert all(line.startswith("    ") for line in rest)
