"""Messages to events, and every way in which a stream can break its contract."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from chromarpc import (
    Accepted,
    Cancelled,
    Completed,
    Event,
    Heartbeat,
    ImageReady,
    Loading,
    LoadingStage,
    LoraIncompatible,
    Prepared,
    ProtocolError,
    Queued,
    Restarted,
    Step,
)
from chromarpc.request import build_request
from chromarpc.stream import MAX_IMAGE_BYTES, StreamReader
from chromarpc.v1 import generation_service_pb2, job_event_pb2
from tests.client.client_fake_server import JobEvent, Story, png, whole_job

REQUEST = build_request("[trigger] a", trigger_word="sks", loras="j/l.safetensors")
DATA = png(1)


def read(*messages: JobEvent) -> list[Event]:
    reader = StreamReader()
    found = [reader.read(generation_service_pb2.GenerateResponse(event=message)) for message in messages]
    reader.finish()
    return [event for event in found if event is not None]


def test_a_whole_job_becomes_typed_events() -> None:
    events = read(*whole_job(build_request(["a", "b"]), None))
    assert [type(event) for event in events] == [
        Accepted, Queued, Queued, Loading, Loading, Heartbeat, Prepared,
        Step, Step, ImageReady, Step, Step, ImageReady, Completed,
    ]  # fmt: skip
    assert events[0].time == datetime(2026, 1, 2, 3, 4, 5, 250_000, tzinfo=UTC)
    assert isinstance(events[1], Queued)
    assert events[1].estimated_wait_s == 40
    assert isinstance(events[2], Queued)
    assert events[2].estimated_wait_s is None
    assert isinstance(events[3], Loading)
    assert events[3].stage is LoadingStage.READING
    assert isinstance(events[7], Step)
    assert (events[7].duration_s, events[7].estimated_remaining_s) == (0.25, 0.75)
    assert len(events[7].sigmas) == events[7].total_steps + 1
    assert isinstance(events[-1], Completed)
    assert events[-1].timings.total_s == 1.5


def test_a_restart_makes_what_came_before_void() -> None:
    story = Story()
    events = read(
        story.accepted(REQUEST),
        story.prepared(REQUEST),
        *list(story.image(DATA))[:-1],
        story.restarted(2),
        story.prepared(REQUEST),
        *story.image(DATA),
        story.completed(),
    )
    assert [type(event) for event in events] == [Accepted, Prepared, Restarted, Prepared, ImageReady, Completed]
    assert isinstance(events[2], Restarted)
    assert (events[2].attempt, events[2].moved_from, events[2].bits_may_differ) == (2, "", False)


def test_a_job_that_moves_to_another_device_says_from_where_and_what_to_expect() -> None:
    story = Story()
    events = read(
        story.accepted(REQUEST),
        story.prepared(REQUEST, device_id="cuda:0+cuda:1", second_device="cuda:1"),
        story.restarted(2, moved_from="cuda:0+cuda:1", bits_may_differ=True),
        story.prepared(REQUEST, device_id="cuda:2"),
        *story.image(DATA),
        story.completed(),
    )
    before, moved, after = events[1:4]
    assert isinstance(before, Prepared)
    assert isinstance(moved, Restarted)
    assert isinstance(after, Prepared)
    assert (before.device_id, before.second_device) == ("cuda:0+cuda:1", "cuda:1")
    assert (moved.moved_from, moved.bits_may_differ) == ("cuda:0+cuda:1", True)
    assert (after.device_id, after.second_device) == ("cuda:2", "")


def test_an_image_carries_its_plan_and_only_its_own_warnings() -> None:
    story = Story()
    request = build_request(["a"] * 11)
    about = ["prompts.1.width", "prompts.10.width", "prompts.1", "neg", ""]
    warnings = [job_event_pb2.Warning(code="W", field=field, message="m") for field in about]
    events = read(
        story.accepted(request, warnings=warnings[:3]),
        story.prepared(request, warnings=warnings[3:]),
        *story.image(DATA, prompt_index=1),
        story.completed(),
    )
    ready = events[2]
    assert isinstance(ready, ImageReady)
    assert ready.image.data == DATA
    assert ready.image.seed == 43
    assert [warning.field for warning in ready.image.warnings] == ["prompts.1.width", "prompts.1", "neg", ""]


def began(story: Story, **header: object) -> list[JobEvent]:
    return [story.accepted(REQUEST), story.header(DATA, **header)]


def numbered(sequences: list[int], *messages: JobEvent) -> list[JobEvent]:
    for message, sequence in zip(messages, sequences, strict=True):
        message.sequence = sequence
    return list(messages)


def from_year_9_billion(message: JobEvent) -> JobEvent:
    message.time.seconds = 2**60
    return message


BROKEN: dict[str, Callable[[Story], list[JobEvent]]] = {
    "wrong hash": lambda s: [*began(s, sha256="00" * 32), s.chunk(DATA)],
    "changed byte": lambda s: [*began(s), s.chunk(DATA[:-1] + bytes([DATA[-1] ^ 1]))],
    "chunks swapped": lambda s: [*began(s), s.chunk(DATA[10:], 10), s.chunk(DATA[:10])],
    "chunk repeated": lambda s: [*began(s), s.chunk(DATA[:10]), s.chunk(DATA[:10])],
    "chunk too long": lambda s: [*began(s), s.chunk(DATA + b"more")],
    "chunk empty": lambda s: [*began(s), s.chunk(b"")],
    "chunk without header": lambda s: [s.accepted(REQUEST), s.chunk(DATA)],
    "chunk of another image": lambda s: [*began(s), s.chunk(DATA, prompt_index=1)],
    "completed within an image": lambda s: [*began(s), s.chunk(DATA[:10]), s.completed(0)],
    "image within an image": lambda s: [*began(s), s.header(DATA)],
    "image nobody asked for": lambda s: began(s, prompt_index=1),
    "image before accepted": lambda s: [s.header(DATA)],
    "empty image": lambda s: began(s, size_bytes=0),
    "incredible image": lambda s: began(s, size_bytes=MAX_IMAGE_BYTES + 1),
    "image missing": lambda s: [s.accepted(REQUEST), s.completed(1)],
    "no last event": lambda s: [s.accepted(REQUEST), s.queued(1)],
    "nothing at all": lambda s: [],
    "not accepted first": lambda s: [s.queued(1)],
    "accepted twice": lambda s: [s.accepted(REQUEST), s.accepted(REQUEST)],
    "going back": lambda s: numbered([1, 3, 2], s.accepted(REQUEST), s.queued(2), s.queued(1)),
    "standing still": lambda s: numbered([1, 2, 2], s.accepted(REQUEST), s.queued(2), s.queued(1)),
    "heartbeat going back": lambda s: numbered([1, 3, 2], s.accepted(REQUEST), s.queued(1), s.heartbeat()),
    "something after the end": lambda s: [s.accepted(REQUEST), s.completed(0), s.queued(1)],
    "impossible time": lambda s: [from_year_9_billion(s.accepted(REQUEST))],
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
def test_a_stream_that_breaks_its_contract_is_refused(broken: Callable[[Story], list[JobEvent]]) -> None:
    with pytest.raises(ProtocolError):
        read(*broken(Story()))


def test_gaps_and_news_from_a_later_server_are_fine() -> None:
    story = Story()
    first = story.accepted(REQUEST)
    story.sequence += 40
    unknown = story()  # an event of a kind that this client does not know
    stage = story(loading=job_event_pb2.Loading(stage=99))  # type: ignore[arg-type]
    events = read(first, unknown, stage, story.completed(0))
    assert [type(event) for event in events] == [Accepted, Loading, Completed]
    assert isinstance(events[1], Loading)
    assert events[1].stage is LoadingStage.UNKNOWN


def test_a_failed_event_is_an_error_with_everything_it_told() -> None:
    story = Story()
    failed = job_event_pb2.Failed(
        code=9,
        reason="LORA_INCOMPATIBLE",
        message="no key matches",
        violations=[job_event_pb2.FieldViolation(field="loras.0.path", description="no key matches")],
        metadata={"keys": "3"},
    )
    failed.retry_after.FromSeconds(3)
    with pytest.raises(LoraIncompatible, match="no key matches") as caught:
        read(story.accepted(REQUEST), story(failed=failed))
    assert caught.value.violations[0].field == "loras.0.path"
    assert caught.value.metadata == {"keys": "3"}
    assert caught.value.retry_after_s == 3


def test_a_cancelled_event_is_an_error() -> None:
    story = Story()
    with pytest.raises(Cancelled, match="server stops"):
        read(story.accepted(REQUEST), story(cancelled=job_event_pb2.Cancelled(message="server stops")))
