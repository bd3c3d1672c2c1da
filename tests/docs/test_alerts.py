"""deploy/alerts.yaml and docs/runbooks.md: alerts on metrics that exist, each with a runbook that can be done."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from chromarpc_server.settings import ServerSettings
from tests.docs.test_operations_page import PAGE, Metrics, metric_names

ROOT = Path(__file__).parents[2]
ALERTS, ALERTS_TEST = ROOT / "deploy" / "alerts.yaml", ROOT / "deploy" / "alerts_test.yaml"
RUNBOOKS = (ROOT / "docs" / "runbooks.md").read_text("utf-8")
SECTIONS = ["What it means", "What to look at", "What to do"]
STANDARD = {
    *(
        "chown",
        "chronyc",
        "curl",
        "date",
        "df",
        "dmesg",
        "du",
        "export",
        "find",
        "fuser",
        "grep",
        "head",
        "journalctl",
    ),
    *("ls", "mount", "nvidia-smi", "smartctl", "systemctl", "tail", "timedatectl", "top", "uptime"),
}
"""Commands that a Linux host has, its GPU's driver among them."""
PROMQL = {
    *(
        "abs",
        "and",
        "by",
        "changes",
        "increase",
        "instance",
        "job",
        "offset",
        "on",
        "or",
        "predict_linear",
        "rate",
        "sum",
    ),
    *("unless", "humanize"),
}
PROMETHEUS_OWN = {"up"}
"""Made by Prometheus itself at each scrape."""


@cache
def rules() -> list[dict[str, Any]]:
    loaded = yaml.safe_load(ALERTS.read_text("utf-8"))
    return [rule for group in loaded["groups"] for rule in group["rules"]]


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def exported() -> set[str]:
    """Every name of a sample that a server shows, with those of metrics that have no labels' values yet."""
    metrics = Metrics(version="1")
    families = {family.name: family.type for family in metrics.registry.collect()}
    names = metric_names() | {name for name in families if name.startswith("process_")}
    for name, kind in families.items():
        if kind == "histogram":
            names |= {f"{name}_{part}" for part in ("bucket", "count", "sum")}
    return names


def names_in(expr: str) -> set[str]:
    """The metrics that an expression reads."""
    bare = re.sub(r'"[^"]*"', "", expr)  # values of labels
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", bare)
    bare = re.sub(r"(?:by|on)\s*\([^)]*\)|offset\s+\w+", "", bare)
    return {word for word in re.findall(r"[a-z_][a-z0-9_:]*", bare) if word not in PROMQL}


@pytest.mark.parametrize("name", alerts())
def test_an_alert_says_what_it_is_and_where_its_runbook_is(name: str) -> None:
    alert = alerts()[name]
    assert {"expr", "for", "labels", "annotations"} <= set(alert)
    assert alert["labels"]["severity"] in ("critical", "warning", "info")
    annotations = alert["annotations"]
    assert set(annotations) == {"summary", "description", "runbook_url"}
    assert all(annotations.values())
    assert annotations["runbook_url"] == f"docs/runbooks.md#{name.lower()}"


def test_every_rule_reads_metrics_that_a_server_exports() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    known = exported() | recorded | PROMETHEUS_OWN
    for rule in rules():
        read = names_in(rule["expr"])
        assert read, rule
        assert read <= known, rule


def test_every_alert_has_its_runbook_with_its_sections_and_there_is_no_other() -> None:
    parts = re.split(r"^## ", RUNBOOKS, flags=re.MULTILINE)[1:]
    found = {part.partition("\n")[0]: re.findall(r"^### (.*)$", part, re.MULTILINE) for part in parts}
    assert found == dict.fromkeys(alerts(), SECTIONS)


def commands() -> list[list[str]]:
    """Each command of a runbook's blocks, and of each pipe in it."""
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```", RUNBOOKS, re.MULTILINE | re.DOTALL)
    found = []
    for line in "\n".join(blocks).splitlines():
        words = shlex.split(line, comments=True)
        while "|" in words:
            found.append(words[: words.index("|")])
            words = words[words.index("|") + 1 :]
        found.append(words)
    return [words for words in found if words]


def test_every_command_of_a_runbook_exists(capsys: pytest.CaptureFixture[str]) -> None:
    ours = [words for words in commands() if words[0] not in STANDARD]
    assert len(commands()) > 60
    assert {words[0] for words in ours} == {"chromarpc-server"}
    assert {words[2] for words in ours} >= {"check", "backup", "repair", "restore"}
    assert all(words[1] == "store" for words in ours)
    if find_spec("chromarpc_server.maintenance") is None:
        print("the store's tools are not here: their flags were not looked at")
        return
    from chromarpc_server.maintenance import command

    for words in ours:
        command._parser().parse_args(words[2:])


def test_every_flag_event_and_metric_that_a_runbook_names_exists() -> None:
    said = re.sub(r"```sh.*?```", "", RUNBOOKS, flags=re.DOTALL)
    flags = {flag.replace("-", "_") for flag in re.findall(r"`--([a-z-]+)`", said)}
    assert flags <= {*ServerSettings.model_fields}
    known = PAGE.read_text("utf-8")
    for named in set(
        re.findall(r"`((?:store|device|process|clock|adapter|server|model|checkpoint)\.[a-z_]+)`", said)
    ):
        assert f"`{named}`" in known, named
    assert set(re.findall(r"`(chromarpc_[a-z_]+)`", said)) <= metric_names()


def test_what_a_runbook_looks_for_in_the_metrics_is_there() -> None:
    patterns = [words for words in commands() if words[0] == "grep" and "chromarpc_" in words[-1]]
    assert len(patterns) > 8
    for words in patterns:
        pattern = re.compile(words[-1].partition(".*")[0])
        assert any(pattern.search(name) for name in exported()), words


def test_every_alert_is_tried_where_it_fires_and_where_it_does_not() -> None:
    fires, rests = set(), set()
    for case in yaml.safe_load(ALERTS_TEST.read_text("utf-8"))["tests"]:
        for look in case["alert_rule_test"]:
            (fires if look["exp_alerts"] else rests).add(look["alertname"])
    assert fires == rests == set(alerts())


@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no promtool here (Debian: apt-get install prometheus)"
)
@pytest.mark.parametrize(
    "command", [["check", "rules", ALERTS], ["test", "rules", ALERTS_TEST]], ids=["check", "test"]
)
def test_prometheus_agrees(command: list[str | Path]) -> None:
    done = subprocess.run(["promtool", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_service_levels_measure_what_the_alerts_do() -> None:
    page = PAGE.read_text("utf-8").partition("\n## Service levels\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```promql\n(.*?)```", page, re.DOTALL)
    said = re.sub(r"\s+", "", re.sub(r"^#.*$", "", block, flags=re.MULTILINE)).replace("[30d]", "[5m]")
    for level in ("admission_errors", "late_events"):
        (rule,) = [rule for rule in rules() if rule.get("record") == f"chromarpc:{level}:ratio_rate5m"]
        assert re.sub(r"\s+", "", rule["expr"]).replace("sumby(job)", "sum") in said
    for factor, budget in ((14.4, 0.001), (6, 0.001), (14.4, 0.01), (6, 0.01)):
        assert any(f"> {factor:g} * {budget}" in rule["expr"] for rule in rules())
