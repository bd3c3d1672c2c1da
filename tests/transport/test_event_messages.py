"""Events as messages: which device drew, and where a job moved from."""

from __future__ import annotations

from datetime import UTC, datetime

from chromarpc.v1 import job_event_pb2
from chromarpc_server.domain.events import Event, Prepared, Restarted, WeightsReport, WeightsSource
from chromarpc_server.domain.requests import GenerationRequest, PromptRequest
from chromarpc_server.domain.resolve import Serving, resolve
from chromarpc_server.jobs.log import LoggedEvent
from chromarpc_server.transport.messages.events import accepted_message, job_event

PREPARED = Prepared((), "ab" * 32, (), {}, "NVIDIA H100", WeightsReport(WeightsSource.BUILT, 0, 0.0, 1, 1), ())


def message(event: Event) -> job_event_pb2.JobEvent:
    return job_event(LoggedEvent(3, datetime(2026, 5, 4, tzinfo=UTC), event))


def test_prepared_names_one_device_and_no_second_one() -> None:
    prepared = message(Prepared(**vars(PREPARED) | {"device_id": "cuda:3"})).prepared
    assert (prepared.device, prepared.device_id, prepared.second_device) == ("NVIDIA H100", "cuda:3", "")


def test_prepared_names_both_devices_of_a_pair() -> None:
    pair = {"device_id": "cuda:0+cuda:1", "second_device": "cuda:1"}
    prepared = message(Prepared(**vars(PREPARED) | pair)).prepared
    assert (prepared.device_id, prepared.second_device) == ("cuda:0+cuda:1", "cuda:1")


def test_prepared_says_how_the_weights_were_stored() -> None:
    assert message(PREPARED).prepared.stored_as == ""
    assert message(Prepared(**vars(PREPARED) | {"stored_as": "fp8 scaled"})).prepared.stored_as == "fp8 scaled"


def test_accepted_says_what_each_image_is_sampled_with() -> None:
    request = GenerationRequest(
        "chroma",
        prompts=(PromptRequest("a"), PromptRequest("b", neg="c", use_neg=True, schedule="beta", shift=1.5)),
        settings="comfyui",
    )
    accepted = accepted_message("job", resolve(request, Serving()))
    first, second = accepted.prompts
    assert accepted.settings == "comfyui"
    assert (first.sampler, first.schedule, first.HasField("shift")) == ("euler", "simple", False)
    assert (second.sampler, second.schedule, second.shift, second.neg) == ("euler", "beta", 1.5, "c")


def test_a_job_that_was_taken_over_by_another_process_moved_from_no_device() -> None:
    restarted = message(Restarted(2)).restarted
    assert (restarted.attempt, restarted.moved_from, restarted.bits_may_differ) == (2, "", False)


def test_a_job_whose_device_was_lost_says_which_and_whether_bits_may_differ() -> None:
    restarted = message(Restarted(2, moved_from="cuda:0", bits_may_differ=True)).restarted
    assert (restarted.attempt, restarted.moved_from, restarted.bits_may_differ) == (2, "cuda:0", True)
