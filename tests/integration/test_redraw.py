"""Jobs that ended are drawn again: from the store, with the seeds and adapters that they had."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from safetensors.torch import load_file, save_file

import chromarpc
from chromarpc import Lora
from chromarpc.v1 import job_service_pb2, job_service_pb2_grpc
from chromarpc_server import model_catalogue
from chromarpc_server.domain import sampling_options
from chromarpc_server.domain.models import CHROMA
from chromarpc_server.transport.access.callers_file import entry_text
from tests.conftest import RunningServer
from tests.tiny_checkpoint import GOLDENS

Serve = Callable[..., RunningServer]
Job = job_service_pb2.Job
State = job_service_pb2.JobState
SMALL: dict[str, Any] = {"model": "chroma-mini", "width": 64, "height": 64, "sample_steps": 2}
LONG: dict[str, Any] = {"model": "chroma-mini", "width": 256, "height": 256, "sample_steps": 150}
ADAPTER = GOLDENS / "adapters" / "aitk.safetensors"


@pytest.fixture
def adapter(lora_root: Path) -> Iterator[Path]:
    """An adapter below the root of `server`."""
    file = lora_root / f"{uuid.uuid4().hex}.safetensors"
    shutil.copy(ADAPTER, file)
    yield file
    file.unlink(missing_ok=True)


@pytest.fixture
def client(server: RunningServer) -> Iterator[chromarpc.Client]:
    with chromarpc.Client(server.target) as client:
        yield client


def _drawn(client: chromarpc.Client, *prompts: str, **options: Any) -> Job:
    return _ended(client, client.create_job(list(prompts) or ["a red circle"], **{**SMALL, **options}))


def _cancelled(client: chromarpc.Client, **options: Any) -> Job:
    """A job that ended before it was run."""
    job = client.create_job("a red circle", **{**LONG, **options})
    client.cancel_job(job.job_id)
    return _ended(client, job)


def _ended(client: chromarpc.Client, job: Job) -> Job:
    """The job once it ended, whatever its end."""
    with suppress(chromarpc.StatusError):
        for _ in client.watch_job(job.job_id):
            pass
    return client.get_job(job.job_id)


def _redrawn(client: chromarpc.Client, job: Job) -> Job:
    return _ended(client, client.redraw_job(job.job_id))


def _hashes(job: Job) -> list[str]:
    assert job.state == State.JOB_STATE_SUCCEEDED, job.failure
    return [image.sha256 for image in job.images]


def _refused(client: chromarpc.Client, job_id: str, kind: type[chromarpc.StatusError]) -> list[str]:
    """The fields that are blamed."""
    with pytest.raises(chromarpc.StatusError) as caught:
        client.redraw_job(job_id)
    assert type(caught.value) is kind
    return [violation.field for violation in caught.value.violations]


def test_a_job_is_drawn_again_with_the_seeds_that_were_drawn(client: chromarpc.Client) -> None:
    before = _drawn(client, "a red circle", "a blue square", seed=-1, preview_every=1)
    after = _redrawn(client, before)
    once_more = _redrawn(client, after)
    pictures = [client.get_image_bytes(after.job_id, index) for index in range(2)]
    assert len({before.job_id, after.job_id, once_more.job_id}) == 3
    assert uuid.UUID(after.request_id), (
        "the client draws one, so that an answer that was lost can be asked for again"
    )
    assert len(set(_hashes(before))) == 2
    assert _hashes(before) == _hashes(after) == _hashes(once_more)
    assert [hashlib.sha256(data).hexdigest() for data in pictures] == _hashes(before)
    assert [prompt.seed for prompt in after.plan.prompts] == [image.seed for image in before.images]


def test_adapters_are_the_ones_that_the_job_had(client: chromarpc.Client, adapter: Path) -> None:
    """One below the root, which is known again by its hash when it was touched, and one that was uploaded."""
    uploaded = client.upload_lora(ADAPTER)
    before = _drawn(client, loras=[Lora(adapter.name, 0.5), Lora(uploaded.path, 0.25)])
    assert _hashes(_redrawn(client, before)) == _hashes(before) != _hashes(_drawn(client))
    os.utime(adapter, (1, 1))
    assert _hashes(_redrawn(client, before)) == _hashes(before)


def test_a_server_that_keeps_nothing_on_disk_draws_again_too(serve: Serve, lora_root: Path, adapter: Path) -> None:
    with chromarpc.Client(serve(lora_root=lora_root, store="memory").target) as client:
        before = _drawn(client, seed=-1, loras=[Lora(adapter.name)])
        os.utime(adapter, (1, 1))
        assert _hashes(_redrawn(client, before)) == _hashes(before)


def test_another_process_draws_it_again(serve: Serve, lora_root: Path, adapter: Path) -> None:
    server = serve(lora_root=lora_root)
    by_hash = f"sha256:{hashlib.sha256(adapter.read_bytes()).hexdigest()}"
    with chromarpc.Client(server.target) as client:
        before = _drawn(client, seed=-1, loras=[Lora(by_hash)])
    server.stop()
    with chromarpc.Client(serve(lora_root=lora_root).target) as client:
        assert _hashes(_redrawn(client, before)) == _hashes(before)


def test_the_call_may_be_repeated_under_a_request_id_and_makes_one_job(
    client: chromarpc.Client, server: RunningServer
) -> None:
    request_id = str(uuid.uuid4())
    old, other = _drawn(client), _drawn(client, "another")
    with grpc.insecure_channel(server.target) as channel:
        redraw = job_service_pb2_grpc.JobServiceStub(channel).RedrawJob
        request = job_service_pb2.RedrawJobRequest(job_id=old.job_id, request_id=request_id)
        made, found = redraw(request), redraw(request)
    assert (made.existed, found.existed) == (False, True)
    assert made.job.job_id == found.job.job_id != old.job_id
    assert made.job.request_id == request_id
    _ended(client, made.job)
    client.delete_job(old.job_id)
    again = client.redraw_job(old.job_id, request_id=request_id)
    assert (again.job_id, _hashes(again)) == (made.job.job_id, _hashes(old))
    with pytest.raises(chromarpc.RequestIdReused):
        client.redraw_job(other.job_id, request_id=request_id)
    with pytest.raises(chromarpc.RequestIdReused):
        client.create_job("a red circle", request_id=request_id, **SMALL)


def test_a_request_id_is_a_uuid(client: chromarpc.Client) -> None:
    with pytest.raises(chromarpc.InvalidRequest) as caught:
        client.redraw_job("any", request_id="no UUID")
    assert [violation.field for violation in caught.value.violations] == ["request_id"]


def test_a_job_that_has_not_ended_is_not_drawn_again_and_a_cancelled_one_is(client: chromarpc.Client) -> None:
    running = client.create_job("a", **LONG)
    waiting = client.create_job("a", **SMALL)
    for job in (running, waiting):
        assert _refused(client, job.job_id, chromarpc.JobNotEnded) == ["job_id"]
        client.cancel_job(job.job_id)
    assert _ended(client, waiting).state == State.JOB_STATE_CANCELLED
    assert _hashes(_redrawn(client, waiting)) == _hashes(_drawn(client, "a"))


def test_the_new_job_goes_on_without_callers_although_the_old_one_did_not(serve: Serve) -> None:
    with chromarpc.Client(serve(reattach_s=0).target) as client:
        events = list(client.generate("a", request_id=str(uuid.uuid4()), **SMALL))
        assert isinstance(events[0], chromarpc.Accepted)
        after = client.redraw_job(events[0].job_id)
        with client.watch_job(after.job_id) as watched:
            next(watched)
        assert _hashes(_ended(client, after)) == _hashes(client.get_job(events[0].job_id))


def test_a_job_of_nobody_or_of_somebody_else_is_not_found(serve: Serve, tmp_path: Path) -> None:
    callers = tmp_path / "callers.toml"
    callers.write_text("".join(entry_text(name, f"token of {name}") for name in ("one", "other")))
    target = serve(callers=callers).target
    with (
        chromarpc.Client(target, token="token of one") as one,
        chromarpc.Client(target, token="token of other") as other,
    ):
        job = _cancelled(one)
        assert _refused(other, job.job_id, chromarpc.JobNotFound) == ["job_id"]
        assert _refused(one, "nothing", chromarpc.JobNotFound) == ["job_id"]
        assert _refused(one, "", chromarpc.InvalidRequest) == ["job_id"]


class TestAdaptersThatAreNotWhatTheyWere:
    def test_one_that_is_gone(self, client: chromarpc.Client, adapter: Path) -> None:
        before = _drawn(client, loras=[Lora(adapter.name)])
        adapter.unlink()
        assert _refused(client, before.job_id, chromarpc.LoraChanged) == ["loras.0.path"]

    def test_an_upload_that_was_deleted_and_sent_again(self, client: chromarpc.Client) -> None:
        uploaded = client.upload_lora(ADAPTER)
        before = _drawn(client, loras=[Lora(uploaded.path)])
        client.delete_lora(uploaded.path)
        assert _refused(client, before.job_id, chromarpc.LoraChanged) == ["loras.0.path"]
        client.upload_lora(ADAPTER)
        assert _hashes(_redrawn(client, before)) == _hashes(before)

    def test_one_that_holds_other_bytes(self, client: chromarpc.Client, adapter: Path) -> None:
        """Which is known once it is read: the new job fails, and nothing is drawn."""
        before = _drawn(client, loras=[Lora(adapter.name)])
        weights = load_file(adapter)
        save_file({name: 2 * tensor for name, tensor in weights.items()}, adapter)
        after = client.redraw_job(before.job_id)
        with pytest.raises(chromarpc.LoraChanged) as caught:
            list(client.watch_job(after.job_id))
        assert [violation.field for violation in caught.value.violations] == ["loras.0.path"]
        assert not client.get_job(after.job_id).images

    def test_one_that_was_written_anew_before_it_was_ever_read(
        self, client: chromarpc.Client, adapter: Path
    ) -> None:
        running = client.create_job("a", **LONG)
        waiting = _cancelled(client, loras=[Lora(adapter.name)])
        client.cancel_job(running.job_id)
        os.utime(adapter, (1, 1))
        assert _refused(client, waiting.job_id, chromarpc.LoraChanged) == ["loras.0.path"]


def test_without_stored_prompts_there_is_nothing_to_draw(serve: Serve) -> None:
    with chromarpc.Client(serve(store_prompts=False).target) as client:
        assert _refused(client, _cancelled(client).job_id, chromarpc.NotKept) == ["prompts"]


def test_a_sampler_that_another_version_had_is_refused_by_its_name(
    client: chromarpc.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _cancelled(client, sampler="heun", schedule="beta")
    monkeypatch.setattr(sampling_options, "SAMPLERS", {"flowmatch": None})
    assert _refused(client, before.job_id, chromarpc.InvalidRequest) == ["prompts.0.sampler"]


def test_sampler_schedule_shift_settings_and_negative_text_are_the_jobs(client: chromarpc.Client) -> None:
    said: dict[str, Any] = {"sampler": "heun", "schedule": "beta", "shift": 1.5, "neg": "ugly", "use_neg": True}
    before = _cancelled(client, settings="comfyui", **said)
    again = client.redraw_job(before.job_id)
    client.cancel_job(again.job_id)
    assert (again.plan.prompts, again.plan.settings) == (before.plan.prompts, "comfyui")
    (prompt,) = again.plan.prompts
    assert (prompt.sampler, prompt.schedule, prompt.shift, prompt.neg) == ("heun", "beta", 1.5, "ugly")


def test_a_model_or_a_profile_that_is_not_served_any_more(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()
    with chromarpc.Client(server.target) as client:
        before = _cancelled(client, profile="preview-exact")
    server.stop()
    server = serve(dtype="float32")
    with chromarpc.Client(server.target) as client:
        assert _refused(client, before.job_id, chromarpc.InvalidRequest) == ["profile"]
    server.stop()
    monkeypatch.setattr(model_catalogue, "REGISTRY", {"chroma": CHROMA})
    with chromarpc.Client(serve(model_folder={}).target) as client:
        assert _refused(client, before.job_id, chromarpc.ModelNotFound) == ["model"]


def test_quotas_are_those_of_any_job(serve: Serve) -> None:
    with chromarpc.Client(serve(limits={"max_queued_jobs_per_caller": 1}).target) as client:
        before = _cancelled(client)
        running = client.create_job("a", **LONG)
        with client.watch_job(running.job_id) as events:
            next(event for event in events if isinstance(event, chromarpc.Loading | chromarpc.Step))
        waiting = client.redraw_job(before.job_id)
        with pytest.raises(chromarpc.QuotaExceeded):
            client.redraw_job(before.job_id)
        for job in (waiting, running):
            client.cancel_job(job.job_id)


@pytest.mark.parametrize("harm", ["a flipped bit", "gone"])
def test_a_damaged_picture_is_whole_again_once_its_job_is_drawn_again(
    serve: Serve, tmp_path: Path, harm: str
) -> None:
    with chromarpc.Client(serve(data_dir=tmp_path / "store").target) as client:
        before = _drawn(client, seed=-1)
        (sha256,) = _hashes(before)
        good = client.get_image_bytes(before.job_id)
        _harm(tmp_path / "store" / "jobs" / "images" / sha256[:2] / sha256, harm)
        with pytest.raises(chromarpc.ImageDamaged) as caught:
            client.get_image_bytes(before.job_id)
        assert caught.value.metadata["job_id"] == before.job_id
        assert _hashes(_redrawn(client, before)) == [sha256]
        assert client.get_image_bytes(before.job_id) == good
        assert isinstance(list(client.watch_job(before.job_id))[-1], chromarpc.Completed)


def _harm(file: Path, harm: str) -> None:
    """As a disk does, which changes no time."""
    if harm == "gone":
        file.unlink()
        return
    status, data = file.stat(), bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
