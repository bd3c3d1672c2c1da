"""The soak works, and a server that holds more and more is found out."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.soak import FLAT, Sample, growing, run, table

FLAT_SAMPLES = [Sample(float(second), 10 * second, 400.0, 17, 16, 3.9, 200, 6.0) for second in range(40)]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what a process holds is read from /proc")
def test_a_server_that_made_and_forgot_some_hundred_jobs_holds_no_more_than_before(tmp_path: Path) -> None:
    report = run(200, 0, tmp_path, sample_s=0.25)
    print(table(report.samples), f"{report.jobs_per_s} jobs a second", sep="\n")
    assert report.is_good, report
    assert report.jobs == report.succeeded + report.cancelled == 200
    assert report.cancelled
    assert report.deleted
    assert report.repeated
    assert report.watched_twice


@pytest.mark.parametrize("what", FLAT)
def test_what_grows_is_found(what: str) -> None:
    assert growing(FLAT_SAMPLES) == []
    leaking = [
        replace(sample, **{what: type(getattr(sample, what))(getattr(sample, what) * (1 + index / 40))})
        for index, sample in enumerate(FLAT_SAMPLES)
    ]
    assert [text.partition(":")[0] for text in growing(leaking)] == [what]


def test_too_few_samples_tell_nothing() -> None:
    assert growing(FLAT_SAMPLES[:4]) == ["4 samples are too few to tell"]
