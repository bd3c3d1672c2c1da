"""What clients ask and which faults happen, decided by a seed alone: no answer changes a choice."""

from __future__ import annotations

import random
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass

ADAPTERS = 2
"""Of each owner."""
OWNERS = ("alice", "bob", "carol")
CLIENTS = tuple(f"{owner}-{number}" for owner in OWNERS for number in range(3))
NO_POLICY, CANCEL, DETACH = "", "cancel", "detach"

FAULTS: dict[str, tuple[str, ...]] = {
    "kill": ("kill", "kill_in_start", "kill_in_drain"),
    "term": ("term", "double_term"),
    "stop": ("stop",),
    "full": ("full", "kill_when_full", "term_when_full"),
    "flip": ("flip_image", "flip_upload"),
    "clock": ("clock_forward", "clock_back"),
}
"""The kinds that `--faults` names, and what happens for each."""
NEEDS_TMPFS = frozenset({"kill_when_full", "term_when_full"})
"""A limit on a process ends with it, so that the next one would not find the disk full."""
DEFAULT_FAULTS = ("kill", "term", "stop", "full", "flip")
"""All but `clock`, whose library makes the server several times slower."""

_METHODS = {
    "CreateJob": 26,
    "Generate": 18,
    "WatchJob": 16,
    "GetJob": 9,
    "ListJobs": 8,
    "CancelJob": 8,
    "DeleteJob": 6,
    "GetImage": 9,
    "RedrawJob": 7,
    "UploadLora": 3,
    "DeleteLora": 1,
    "ListLoras": 1,
    "InspectLora": 1,
}
_SLOT_CALLS = 4
"""After so many calls a client goes on to the next request id."""


@dataclass(frozen=True)
class Drawing:
    """What is to be drawn. Few different ones, so that equal plans come again."""

    seed: int | None
    """None leaves it to the server: such a request is the same one, and draws something else each time."""
    size_px: int
    steps: int
    adapter: int | None = None
    """Which of its owner's it is drawn with."""


@dataclass(frozen=True)
class Intent:
    """What a client is about to do. Which job it is about follows from `pick` and the jobs that it then knows."""

    method: str
    drawing: Drawing
    request_id: str
    """Of a job to be made; empty for none."""
    conflicts: bool
    """Whether the id may have another request."""
    policy: str
    """What becomes of the job when its caller goes away."""
    pick: float
    part: float
    """How far into the job's log, or its image, a stream begins."""
    cut_after: int | None
    """Breaks the stream off after so many events."""
    deadline_s: float | None
    is_foreign: bool
    """About a job or an adapter of another owner."""
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
    adapter = chance.randrange(ADAPTERS) if chance.random() < 0.12 else None
    if chance.random() < 0.12:
        return Drawing(chance.randrange(2), 128, chance.choice((20, 60)), adapter)
    seed = None if chance.random() < 0.1 else chance.randrange(4)
    return Drawing(seed, 64, chance.randint(1, 4), adapter)


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
        is_redraw = method == "RedrawJob"
        policy = chance.choice((NO_POLICY, NO_POLICY, CANCEL, DETACH))
        request_id = ""
        if with_id:
            # Every client of an owner has the same request for an id, unless it is to conflict.
            purpose = "redraw/" if is_redraw and (not conflicts or chance.random() < 0.5) else ""
            key = random.Random(f"{seed}/{owner}/{purpose}{slot}")
            request_id = str(uuid.UUID(int=key.getrandbits(128), version=4))
            if not conflicts:
                own, policy = drawing(key), key.choice((NO_POLICY, NO_POLICY, CANCEL, DETACH))
        yield Intent(
            method=method,
            drawing=own,
            request_id=request_id,
            conflicts=conflicts,
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
