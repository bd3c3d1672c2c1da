"""The judge on histories made by hand: jobs drawn again, adapters, and full disks."""

from __future__ import annotations

import pytest

from tests.faults.history.hand_made import AWAY, KILL, NOT_FOUND, SHA256, Made, image, job, under
from tests.faults.history.recorded import Asked, Fault, JobView, Outcome

DAMAGED = Outcome("DATA_LOSS", "IMAGE_DAMAGED")
NO_STORE = Outcome("UNAVAILABLE", "STORE_UNAVAILABLE")
OTHER_SHA256 = "0" * 64


def done(job_id: str = "j", sha256: str = SHA256, **told: str) -> JobView:
    return job(job_id, state="succeeded", images=(sha256,), **told)


def uploaded(made: Made, adapter: str = "a", owner: str = "alice") -> None:
    made.call("UploadLora", owner=owner, asked=Asked(adapter=adapter))


@pytest.mark.parametrize(("sha256", "rules"), [(SHA256, set()), (OTHER_SHA256, {"pixels"})])
def test_a_job_that_is_drawn_again_has_the_same_images(made: Made, sha256: str, rules: set[str]) -> None:
    made.create(asked=Asked(request="a seed of the server's", is_detached=True))
    made.get(done())
    made.redraw("new")
    made.redraw("newer", "new")
    made.get(done("newer", sha256))
    assert made.rules() == rules


def test_a_job_whose_making_was_cut_is_drawn_again_as_it_was(made: Made) -> None:
    made.call("CreateJob", asked=under(), outcome=AWAY)
    made.get(done(request_id="r"))
    made.redraw("new")
    made.get(done("new", OTHER_SHA256))
    assert made.rules(KILL) == {"pixels"}


def test_a_job_is_drawn_again_by_the_same_plan(made: Made) -> None:
    made.create(view=done())
    made.redraw("new", view=job("new", plan="another"))
    assert made.rules() == {"plan"}


def test_requests_without_a_seed_draw_what_they_like(made: Made) -> None:
    for job_id, sha256 in (("a", SHA256), ("b", OTHER_SHA256)):
        made.create(job_id, asked=Asked(request="w", is_detached=True), view=done(job_id, sha256))
    assert made.rules() == set()


def test_a_repeated_redraw_makes_one_job(made: Made) -> None:
    made.create(view=done())
    made.redraw("new", request_id="r")
    made.redraw("new", request_id="r", existed=True)
    assert made.rules() == set()
    made.redraw("newer", request_id="r")
    assert made.rules() == {"doubled"}


def test_the_id_of_a_redraw_is_no_other_jobs(made: Made) -> None:
    made.create("a", view=done("a"))
    made.create("b", view=done("b"))
    made.redraw("new", "a", request_id="r")
    reused = Outcome("ALREADY_EXISTS", "REQUEST_ID_REUSED", told_job="new")
    made.call("RedrawJob", asked=Asked(job_id="b", request_id="r", request="redraw b"), outcome=reused)
    assert made.rules() == set()
    made.redraw("new", "b", request_id="r", existed=True)
    assert made.rules() == {"request_id"}


def test_nobody_draws_anothers_job_again(made: Made) -> None:
    made.create(view=done())
    made.call("RedrawJob", owner="bob", asked=Asked(job_id="j"), outcome=NOT_FOUND)
    assert made.rules() == set()
    made.redraw("new", owner="bob")
    assert made.rules() == {"foreign"}


def test_a_refused_redraw_does_not_tell_of_anothers_job(made: Made) -> None:
    made.create()
    refused = Outcome("FAILED_PRECONDITION", "JOB_NOT_ENDED")
    made.call("RedrawJob", owner="bob", asked=Asked(job_id="j"), outcome=refused)
    assert made.rules() == {"foreign"}


def test_a_job_that_is_drawn_again_is_there(made: Made) -> None:
    made.create(view=done())
    made.call("RedrawJob", asked=Asked(job_id="j", request="redraw j"), outcome=NOT_FOUND)
    assert made.rules() == {"lost"}


def test_a_job_that_was_deleted_is_not_drawn_again_but_what_was_made_of_it_is_found(made: Made) -> None:
    made.create(view=done())
    made.redraw("new", request_id="r")
    made.about("DeleteJob")
    made.redraw("new", request_id="r", existed=True)
    assert made.rules() == set()
    made.redraw("newer")
    assert made.rules() == {"revived"}


def test_nobody_cancels_a_job_that_is_drawn_again(made: Made) -> None:
    made.create(asked=Asked(what="w", request="w"), view=job(state="cancelled"))
    assert made.rules() == set()
    made.redraw("new")
    made.get(job("new", state="cancelled"))
    assert made.rules() == {"unasked_cancel"}


def test_a_damaged_image_is_whole_once_it_was_drawn_again(made: Made) -> None:
    made.create(view=done())
    flip = Fault("flip_image", 2.2, 2.4, damaged=SHA256)
    made.about("GetImage", outcome=DAMAGED)
    made.redraw("new")
    made.about("GetImage", outcome=DAMAGED)
    assert made.rules(flip) == set()
    made.get(done("new"))
    made.about("GetImage", images=(image(),))
    assert made.rules(flip) == set()
    made.about("GetImage", outcome=DAMAGED)
    assert made.rules(flip) == {"status"}
    assert made.rules(flip, Fault("flip_image", 11.2, 11.4, damaged=SHA256)) == set()


@pytest.mark.parametrize("method", ["GetJob", "GetImage", "ListJobs"])
def test_what_is_stored_can_be_read_on_a_full_disk(made: Made, method: str) -> None:
    made.create(view=done())
    made.about(method, outcome=NO_STORE)
    assert made.rules(Fault("kill_when_full", 0.0, 9.0)) == {"status"}


@pytest.mark.parametrize("kind", ["full", "kill_when_full", "term_when_full"])
def test_nothing_is_taken_and_cancelled_on_a_full_disk(made: Made, kind: str) -> None:
    made.create(view=done())
    made.call("CreateJob", asked=under(), outcome=Outcome("RESOURCE_EXHAUSTED", "DISK_FULL"))
    made.about("DeleteJob", outcome=NO_STORE)
    assert made.rules() == {"status"}
    assert made.rules(Fault(kind, 0.0, 9.0)) == set()


@pytest.mark.parametrize(("done_steps", "rules"), [(4, set()), (0, {"failure"})])
def test_a_job_waits_for_room_and_fails_only_where_its_images_have_none(
    made: Made, done_steps: int, rules: set[str]
) -> None:
    made.create()
    made.get(job(state="failed", reason="STORE_UNAVAILABLE", done_steps=done_steps))
    assert made.rules(Fault("full", 0.0, 9.0)) == rules


def test_an_adapter_is_kept_until_it_is_deleted_and_used_by_its_owner_alone(made: Made) -> None:
    uploaded(made)
    drawn = Asked(what="w", request="w", adapter="a")
    made.call("CreateJob", asked=drawn, outcome=Outcome("NOT_FOUND", "LORA_NOT_FOUND"))
    assert made.rules() == {"lost"}
    made.call("DeleteLora", asked=Asked(adapter="a"), outcome=AWAY, beside=1.5)
    assert made.rules(KILL) == set()
    made.create(owner="bob", asked=drawn)
    assert made.rules(KILL) == {"foreign"}


def test_a_job_is_drawn_again_with_its_adapter(made: Made) -> None:
    uploaded(made)
    made.create(asked=Asked(what="w", request="w", adapter="a"), view=done())
    changed = Outcome("FAILED_PRECONDITION", "LORA_CHANGED")
    made.call("RedrawJob", asked=Asked(job_id="j", request="redraw j"), outcome=changed)
    assert made.rules() == {"lost"}


@pytest.mark.parametrize("method", ["ListLoras", "InspectLora"])
def test_adapters_are_shown_to_their_owner_alone(made: Made, method: str) -> None:
    uploaded(made)
    made.call(method, adapters=("a",))
    assert made.rules() == set()
    made.call(method, owner="bob", adapters=("a",))
    assert made.rules() == {"foreign"}


def test_an_adapter_that_a_list_leaves_out_is_lost(made: Made) -> None:
    uploaded(made)
    made.call("ListLoras", owner="bob", is_last_page=True)
    assert made.rules() == set()
    made.call("ListLoras", is_last_page=True)
    assert made.rules() == {"lost"}


def test_an_adapter_that_was_deleted_is_gone_until_it_is_uploaded_again(made: Made) -> None:
    uploaded(made)
    made.call("DeleteLora", asked=Asked(adapter="a"))
    made.call("ListLoras", adapters=("a",))
    assert made.rules() == {"revived"}
    made.calls.pop()
    uploaded(made)
    made.call("ListLoras", adapters=("a",))
    assert made.rules() == set()
