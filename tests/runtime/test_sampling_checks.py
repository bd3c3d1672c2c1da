"""What a device refuses to begin: samplers that have no numbers for a schedule, or that it does not know."""

from __future__ import annotations

from dataclasses import replace

import pytest

from chromarpc_server.domain.errors import InvalidParameter
from chromarpc_server.domain.plan import Plan
from chromarpc_server.domain.requests import GenerationRequest, PromptRequest
from chromarpc_server.domain.resolve import Serving, resolve
from chromarpc_server.runtime.worker import _require_computable


def _plan(**sampled: str | int) -> Plan:
    request = GenerationRequest(model="chroma-mini", prompts=(PromptRequest("a"), PromptRequest("b")))
    plan = resolve(request, Serving())
    return replace(plan, prompts=(plan.prompts[0], replace(plan.prompts[1], **sampled)))


@pytest.mark.parametrize(
    ("sampled", "field", "told"),
    [
        ({"sampler": "of-tomorrow"}, "prompts.1.sampler", "does not know the sampler of-tomorrow"),
        ({"schedule": "of-tomorrow"}, "prompts.1.schedule", "does not know the schedule of-tomorrow"),
        (
            {"sampler": "uni_pc", "schedule": "exponential", "sample_steps": 50},
            "prompts.1.sampler",
            "uni_pc cannot be computed over 50 steps of the schedule exponential",
        ),
    ],
)
def test_a_plan_that_cannot_be_computed_names_the_prompt(
    sampled: dict[str, str | int], field: str, told: str
) -> None:
    with pytest.raises(InvalidParameter, match=told) as caught:
        _require_computable(_plan(**sampled))
    assert [violation.field for violation in caught.value.violations] == [field]


def test_every_other_plan_is_begun() -> None:
    _require_computable(_plan())
    _require_computable(_plan(sampler="uni_pc", schedule="beta", sample_steps=50))
