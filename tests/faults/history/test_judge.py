"""The judge on histories made by hand: each broken promise is found, and what may be is left alone."""

from __future__ import annotations

import pytest

from tests.faults.history.hand_made import (
    AWAY,
    CUT,
    IMAGE,
    KILL,
    NOT_FOUND,
    SHA256,
    Made,
    event,
    image,
    job,
    under,
)
from tests.faults.history.recorded import Asked, Fault, Outcome, SeenImage


def test_a_job_that_is_gone_is_lost(made: Made) -> None:
    made.create()
    made.about("GetJob", outcome=NOT_FOUND)
    assert made.rules() == {"lost"}


def test_a_job_may_be_gone_once_its_deletion_was_asked_for_whatever_came_of_that(made: Made) -> None:
    made.create()
    made.about("DeleteJob", outcome=AWAY)
    made.about("GetJob", outcome=NOT_FOUND)
    assert made.rules(KILL) == set()


def test_a_deletion_that_was_refused_deletes_nothing(made: Made) -> None:
    made.create()
    made.about("DeleteJob", outcome=Outcome("FAILED_PRECONDITION", "JOB_NOT_ENDED"))
    made.about("GetJob", outcome=NOT_FOUND)
    assert made.rules() == {"lost"}


def test_a_job_that_a_list_leaves_out_is_lost(made: Made) -> None:
    made.create("a", view=job("a", created_us=1))
    made.create("b", view=job("b", created_us=2))
    made.call("ListJobs", views=(job("b", created_us=2),))  # the first page of two
    assert made.rules() == set()
    made.call("ListJobs", asked=Asked(before=(2, "b")), is_last_page=True)
    assert made.rules() == {"lost"}


def test_a_job_that_was_deleted_stays_deleted(made: Made) -> None:
    made.create(view=job(state="succeeded"))
    made.about("DeleteJob")
    made.get(job(state="succeeded"))
    assert made.rules() == {"revived"}


def test_a_job_that_was_missing_once_never_comes_back(made: Made) -> None:
    made.create(view=job(state="succeeded"))
    made.about("DeleteJob", outcome=CUT)
    made.about("GetJob", outcome=NOT_FOUND)
    made.call("ListJobs", views=(job(state="succeeded"),), is_last_page=True)
    assert made.rules() == {"revived"}


def test_a_look_beside_a_deletion_may_still_see_the_job(made: Made) -> None:
    made.create(view=job(state="succeeded"))
    deleted = made.about("DeleteJob")
    made.get(job(state="succeeded"), beside=deleted.begun_s)
    assert made.rules() == set()


def test_an_end_never_changes(made: Made) -> None:
    made.create()
    made.get(job(state="failed", last_sequence=5, reason="ATTEMPTS_EXHAUSTED"))
    made.get(job(state="succeeded", last_sequence=9))
    assert "one_end" in made.rules(KILL, KILL)


def test_an_end_is_never_undone(made: Made) -> None:
    made.create()
    made.watch([event(1, "accepted"), event(2, "completed")], images=(image(),))
    made.get(job(state="running", last_sequence=2))
    assert made.rules() == {"one_end"}


def test_a_look_that_began_before_the_end_may_tell_less(made: Made) -> None:
    created = made.create()
    made.watch([event(1, "accepted"), event(2, "completed")], images=(image(),))
    made.get(job(state="running"), beside=created.ended_s)
    assert made.rules() == set()


def test_a_cancel_that_was_acknowledged_is_the_end(made: Made) -> None:
    made.create()
    made.about("CancelJob", views=(job(state="running"),))
    made.get(job(state="succeeded"))
    assert made.rules() == {"cancel"}


def test_a_cancel_that_came_too_late_or_was_cut_holds_nobody_to_anything(made: Made) -> None:
    made.create()
    made.about("CancelJob", outcome=AWAY)
    made.about("CancelJob", views=(job(state="succeeded"),))
    made.get(job(state="succeeded"))
    assert made.rules(KILL) == set()


def test_nothing_is_cancelled_that_nobody_cancelled(made: Made) -> None:
    made.create()
    made.get(job(state="cancelled"))
    assert made.rules() == {"unasked_cancel"}
    made.about("CancelJob", outcome=AWAY, beside=1.0)
    assert made.rules(KILL) == set()


def test_a_job_fails_for_kills_only_where_there_were_enough(made: Made) -> None:
    made.create()
    made.get(job(state="failed", reason="ATTEMPTS_EXHAUSTED"))
    assert made.rules(KILL) == {"failure"}
    assert made.rules(KILL, KILL) == set()


def test_sequences_rise_in_a_stream(made: Made) -> None:
    made.create()
    made.watch([event(1, "accepted"), event(3, "step"), event(2, "queued")], outcome=CUT)
    assert made.rules() == {"sequence"}


def test_a_stream_begins_after_what_its_reader_has(made: Made) -> None:
    made.create()
    made.watch([event(5, "step")], after=5, outcome=CUT)
    assert made.rules() == {"sequence"}


def test_a_heartbeat_repeats_the_last_sequence_and_a_gap_is_no_fault(made: Made) -> None:
    made.create()
    events = [event(1, "accepted"), event(1, "heartbeat"), event(4, "step")]
    made.watch(events, outcome=CUT)
    assert made.rules() == set()


def test_a_sequence_is_one_event_for_all_streams(made: Made) -> None:
    made.create()
    made.watch([event(1, "accepted"), event(2, "step", "one")], outcome=CUT)
    made.watch([event(1, "accepted"), event(2, "step", "another")], outcome=CUT)
    assert made.rules() == {"sequence"}


def test_the_last_sequence_never_falls(made: Made) -> None:
    made.create()
    made.get(job(state="running", last_sequence=9))
    made.get(job(state="running", last_sequence=8))
    assert made.rules() == {"sequence"}


def test_a_sequence_that_was_told_is_not_refused(made: Made) -> None:
    made.create()
    made.watch([], after=9, outcome=Outcome("INVALID_ARGUMENT", "INVALID_PARAMETER"))
    assert "sequence" in made.rules()


def test_a_request_id_makes_one_job(made: Made) -> None:
    made.create("a", asked=under(), view=job("a", request_id="r"))
    made.create("b", asked=under(), view=job("b", request_id="r"))
    assert made.rules() == {"doubled"}


def test_a_request_id_makes_another_job_once_the_first_may_be_deleted(made: Made) -> None:
    made.create("a", asked=under(), view=job("a", request_id="r"))
    made.about("DeleteJob", "a", outcome=CUT)
    made.create("b", asked=under(), view=job("b", request_id="r"))
    assert made.rules() == set()


@pytest.mark.parametrize(("earlier", "is_right"), [(5, True), (12, False)])
def test_a_job_that_was_given_up_may_be_seen_only_after_the_one_in_its_place(
    made: Made, earlier: int, is_right: bool
) -> None:
    asked = Asked(request_id="r", what="w", request="w")
    made.call("Generate", asked=asked, outcome=CUT)
    events = (event(1, "accepted"), event(2, "completed"))
    made.call("Generate", asked=asked, job_id="b", events=events, images=(image(),))
    views = [job("b", "succeeded", request_id="r", created_us=9, last_sequence=2, images=(SHA256,))]
    views.append(job("a", "cancelled", request_id="r", created_us=earlier))
    views.sort(key=lambda view: view.place, reverse=True)
    made.call("ListJobs", views=tuple(views), is_last_page=True)
    assert made.rules() == (set() if is_right else {"doubled"})


def test_a_request_id_makes_a_job_for_each_owner(made: Made) -> None:
    made.create("a", asked=under(), view=job("a", request_id="r"))
    made.create("b", owner="bob", asked=under(), view=job("b", request_id="r"))
    assert made.rules() == set()


def test_a_job_is_new_once(made: Made) -> None:
    made.create(asked=under())
    made.create(asked=under())
    assert made.rules() == {"doubled"}


def test_a_job_that_no_call_can_have_made_is_one_too_many(made: Made) -> None:
    made.get(job())
    assert made.rules() == {"doubled"}


def test_a_call_of_unknown_outcome_may_have_made_a_job(made: Made) -> None:
    made.call("CreateJob", asked=Asked(what="w", request="w"), outcome=AWAY)
    made.call("CreateJob", asked=under(), outcome=AWAY)
    made.get(job("a"))
    made.get(job("b", request_id="r"))
    assert made.rules(KILL) == set()


def test_another_request_under_an_id_is_refused(made: Made) -> None:
    made.create(asked=under())
    made.create(asked=under(request="other"), existed=True)
    assert "request_id" in made.rules()


def test_the_same_request_under_an_id_is_not_refused(made: Made) -> None:
    made.create(asked=under())
    reused = Outcome("ALREADY_EXISTS", "REQUEST_ID_REUSED", told_job="j")
    made.call("CreateJob", asked=under(), outcome=reused)
    assert made.rules() == {"request_id"}


def test_another_request_under_an_id_may_be_refused_for_a_call_that_was_cut(made: Made) -> None:
    made.call("CreateJob", asked=under(request="other"), outcome=AWAY)
    reused = Outcome("ALREADY_EXISTS", "REQUEST_ID_REUSED", told_job="j")
    made.call("CreateJob", asked=under(), outcome=reused)
    assert made.rules(KILL) == set()


@pytest.mark.parametrize("method", ["GetJob", "ListJobs"])
def test_nobody_sees_anothers_job(made: Made, method: str) -> None:
    made.create()
    made.call(method, owner="bob", views=(job(),))
    assert made.rules() == {"foreign"}


def test_a_refusal_that_tells_of_anothers_job_is_found(made: Made) -> None:
    made.create()
    made.about("DeleteJob", owner="bob", outcome=Outcome("FAILED_PRECONDITION", "JOB_NOT_ENDED"))
    assert made.rules() == {"foreign"}
    made.calls.pop()
    made.about("DeleteJob", owner="bob", outcome=NOT_FOUND)
    assert made.rules() == set()


@pytest.mark.parametrize(
    ("served", "is_right"),
    [
        (image(), True),
        (image(IMAGE[3:], 3), True),
        (image(IMAGE[:3], is_last=False), True),
        (image(b"An image"), False),
        (image(b"An", is_last=False), False),
        (image(b"imagE", 3), False),
        (image(IMAGE[:3]), False),
        (image(IMAGE + b"s"), False),
    ],
)
def test_an_image_has_the_bytes_of_its_hash(made: Made, served: SeenImage, is_right: bool) -> None:
    made.create()
    made.about("GetImage", images=(image(),))
    made.about("GetImage", images=(served,))
    assert made.rules() == (set() if is_right else {"bytes"})


def test_equal_plans_have_equal_images(made: Made) -> None:
    made.create("a", view=job("a", images=("one",)))
    made.create("b", view=job("b", images=("another",)))
    assert made.rules() == {"pixels"}


def test_data_is_lost_only_where_it_was_damaged(made: Made) -> None:
    made.create(view=job(state="succeeded", images=(SHA256,)))
    made.about("GetImage", outcome=Outcome("DATA_LOSS", "IMAGE_DAMAGED"))
    assert made.rules() == {"status"}
    assert made.rules(Fault("flip_image", 2.2, 2.4, damaged="other")) == {"status"}
    assert made.rules(Fault("flip_image", 2.2, 2.4, damaged=SHA256)) == set()


def test_a_repeated_generate_may_meet_a_damaged_image_too(made: Made) -> None:
    made.create(asked=under(), view=job(state="succeeded", images=(SHA256,)))
    lost = Outcome("DATA_LOSS", "IMAGE_DAMAGED")
    made.call("Generate", asked=under(), job_id="j", events=(event(1, "accepted"),), outcome=lost)
    assert made.rules() == {"status"}
    assert made.rules(Fault("flip_image", 2.2, 2.4, damaged=SHA256)) == set()


def test_a_repeated_generate_may_meet_a_job_that_is_being_deleted(made: Made) -> None:
    made.create(asked=under(), view=job(state="succeeded", request_id="r"))
    delete = made.about("DeleteJob")
    made.call("Generate", asked=under(), outcome=NOT_FOUND, beside=delete.begun_s)
    assert made.rules() == set()
    made.call("Generate", asked=under(), outcome=NOT_FOUND)
    assert made.rules() == {"status"}


def test_a_server_is_away_only_while_something_happens_to_it(made: Made) -> None:
    made.about("GetJob", outcome=AWAY)
    assert made.rules() == {"status"}
    assert made.rules(Fault("stop", 0.0, 9.0)) == {"status"}
    assert made.rules(Fault("kill", 0.0, 9.0)) == set()


def test_an_error_that_nobody_foresaw_is_never_right(made: Made) -> None:
    made.about("GetJob", outcome=Outcome("INTERNAL", "INTERNAL"))
    assert made.rules(KILL) == {"status"}


def test_a_server_gets_ready_again_and_ends_when_it_is_told_to(made: Made) -> None:
    assert made.rules(Fault("kill", 0.0, 1.0, is_ready=False)) == {"readiness"}
    assert made.rules(Fault("term", 0.0, 1.0, hung=True)) == {"exit"}
    assert made.rules(Fault("term", 0.0, 1.0, exit_code=1)) == {"exit"}


def test_in_the_end_every_job_has_ended(made: Made) -> None:
    made.create()
    assert made.rules() == set()
    assert made.rules(is_settled=True) == {"unsettled"}
