"""What clients ask and which faults happen, decided by a seed alone: no answer changes a choice."""

from __future__ import annotations

import random
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass

OWNERS = ("alice", "bob", "carol")
CLIENTS = tuple(f"{owner}-{number}" for owner in OWNERS for number in range(3))
NO_POLICY, CANCEL, DETACH = "", "cancel", "detach"

FAULTS: dict[str, tuple[str, ...]] = {
    "kill": ("kill", "kill_in_start", "kill_in_drain"),
    "term": ("term", "double_term"),
    "stop": ("stop",),
    "full": ("full",),
    "flip": ("flip_image", "flip_upload"),
    "clock": ("clock_forward", "clock_back"),
}
"""The kinds that `--faults` names, and what happens for each."""
DEFAULT_FAULTS = ("kill", "term", "stop")

_METHODS = {
    "CreateJob": 26,
    "Generate": 18,
    "WatchJob": 16,
    "GetJob": 9,
    "ListJobs": 8,
    "CancelJob": 8,
    "DeleteJob": 6,
    "GetImage": 9,
    "UploadLora": 2,
    "DeleteLora": 1,
}
_SLOT_CALLS = 4
"""After so many calls a client goes on to the next request id."""


@dataclass(frozen=True)
class Drawing:
    """What is to be drawn. Few different ones, so that equal plans come again."""

    seed: int
    size_px: int
    steps: int
    has_adapter: bool = False


@dataclass(frozen=True)
class Intent:
    """What a client is about to do. Which job it is about follows from `pick` and the jobs that it then knows."""

    method: str
    drawing: Drawing
    request_id: str
    """Of a job to be made; empty for none."""
    policy: str
    """What becomes of the job when its caller goes away."""
    pick: float
    part: float
    """How far into the job's log, or its image, a stream begins."""
    cut_after: int | None
    """Breaks the stream off after so many events."""
    deadline_s: float | None
    is_foreign: bool
    """About a job of another owner."""
    variant: int
    pause_s: float
    """Before it."""


@dataclass(frozen=True)
class PlannedFault:
    """A fault that is to happen."""

    kind: str
    after_s: float
    """Seconds of calm before it."""
    moment_s: float
    """How far into a start or a drain."""
    hold_s: float
    """How long it lasts."""
    pick: float
    """Of what there is to be damaged."""


def drawing(chance: random.Random) -> Drawing:
    """One of a few dozen; one in eight takes long enough to be met running."""
    has_adapter = chance.random() < 0.12
    if chance.random() < 0.12:
        return Drawing(chance.randrange(2), 128, chance.choice((20, 60)), has_adapter)
    return Drawing(chance.randrange(4), 64, chance.randint(1, 4), has_adapter)


def intents(seed: int, client: str) -> Iterator[Intent]:
    """All that a client will ever do."""
    chance = random.Random(f"{seed}/{client}")
    owner = client.rpartition("-")[0]
    methods, weights = list(_METHODS), list(_METHODS.values())
    made = 0
    while True:
        method = chance.choices(methods, weights)[0]
        own = drawing(chance)
        with_id, conflicts = chance.random() < 0.75, chance.random() < 0.12
        slot = max(0, made // _SLOT_CALLS - chance.choice((0, 0, 0, 1, 2)))
        if method in ("CreateJob", "Generate"):
            made += 1
        policy = chance.choice((NO_POLICY, NO_POLICY, CANCEL, DETACH))
        request_id = ""
        if with_id:
            # Every client of an owner has the same request for an id, unless it is to conflict.
            key = random.Random(f"{seed}/{owner}/{slot}")
            request_id = str(uuid.UUID(int=key.getrandbits(128), version=4))
            if not conflicts:
                own, policy = drawing(key), key.choice((NO_POLICY, NO_POLICY, CANCEL, DETACH))
        yield Intent(
            method=method,
            drawing=own,
            request_id=request_id,
            policy=policy,
            pick=chance.random(),
            part=chance.choice((0.0, 0.0, chance.random(), 1.0)),
            cut_after=chance.choice((None, None, None, 0, 1, chance.randint(2, 30))),
            deadline_s=chance.uniform(0.05, 1.5) if chance.random() < 0.1 else None,
            is_foreign=chance.random() < 0.08,
            variant=chance.randrange(4),
            pause_s=chance.choice((0.0, 0.02, 0.1, 0.3)),
        )


def planned_faults(seed: int, kinds: Collection[str]) -> Iterator[PlannedFault]:
    """All that will ever happen to the server.

    Args:
        seed: of the run.
        kinds: names of `FAULTS`; none for no faults.
    """
    chance = random.Random(f"{seed}/faults")
    enabled = [kind for kind in FAULTS if kind in kinds]
    while enabled:
        yield PlannedFault(
            kind=chance.choice(FAULTS[chance.choice(enabled)]),
            after_s=chance.uniform(0.5, 4.0),
            moment_s=chance.uniform(0.0, 2.0),
            hold_s=chance.uniform(0.5, 3.0),
            pick=chance.random(),
        )
