"""`requests`: bodies of the reference's HTTP API, and what it makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chromarpc.json_request import InvalidRequestJson, parse_request_json
from chromarpc_server.domain.errors import InvalidParameter
from chromarpc_server.domain.plan import Plan
from chromarpc_server.domain.resolve import Serving, resolve
from chromarpc_server.transport.messages.requests import generation_request
from chromarpc_server.verify.report import Outcome, Reporter, Result


def run(path: Path, reporter: Reporter) -> None:
    """Every accepted and every rejected body of the file."""
    cases = json.loads(path.read_text(encoding="utf-8"))
    for index, case in enumerate(cases.get("accepted", [])):
        name = f"requests/accepted/{index}"
        reporter.guarded(name, lambda name=name, case=case: _accepted(name, case, reporter))  # type: ignore[misc]
    for index, case in enumerate(cases.get("rejected", [])):
        name = f"requests/rejected/{index}"
        reporter.guarded(name, lambda name=name, case=case: _rejected(name, case, reporter))  # type: ignore[misc]


def _plan(body: object) -> Plan:
    parsed = parse_request_json(json.dumps(body))
    return resolve(generation_request(parsed.request), Serving())


def _accepted(name: str, case: dict[str, Any], reporter: Reporter) -> None:
    plan = _plan(case["request"])
    differing = []
    for index, (prompt, wanted) in enumerate(zip(plan.prompts, case["resolved"], strict=True)):
        for key, value in wanted.items():
            found = getattr(prompt, key)
            drawn = key == "seed" and value == -1 and found >= 0
            if found != value and not drawn:
                differing.append(f"prompts.{index}.{key} is {found!r}, should be {value!r}")
    if "lora_scale" in case and plan.loras and plan.loras[0].network_multiplier != case["lora_scale"]:
        differing.append(f"multiplier is {plan.loras[0].network_multiplier}, should be {case['lora_scale']}")
    outcome = Outcome.FAIL if differing else Outcome.PASS
    reporter.add(Result(name, outcome, note="; ".join(differing[:3])))


def _rejected(name: str, case: dict[str, Any], reporter: Reporter) -> None:
    wanted = set(case["fields"])
    try:
        _plan(case["request"])
    except InvalidParameter as error:
        named = {violation.field for violation in error.violations}
    except InvalidRequestJson as error:
        named = {path for path, _ in error.violations}
    else:
        reporter.add(Result(name, Outcome.FAIL, note=f"was accepted, should be refused for {sorted(wanted)}"))
        return
    outcome = Outcome.PASS if wanted <= named else Outcome.FAIL
    reporter.add(Result(name, outcome, note=f"refused for {', '.join(sorted(named))}"))
