"""deploy/kuberay: manifests that fit each other, the flags and docs/scale.md; their schemas are KubeRay's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from chromarpc_server.device_settings import RayDevices, RaySettings, ray_devices
from chromarpc_server.limit_settings import LimitSettings
from chromarpc_server.settings import ServerSettings

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kuberay"
PAGE = (ROOT / "docs" / "scale.md").read_text("utf-8")
GROUPS = {"limits": LimitSettings, "ray": RaySettings}
FROM_OPERATORS = {"chromarpc-tls", "chromarpc-callers"}
FROM_KUBERAY = "chromarpc"
"""A Secret with Ray's token: made by KubeRay, named as the cluster is."""
CLUSTER_LABEL, NODE_LABEL = "ray.io/cluster", "ray.io/node-type"


@cache
def objects() -> list[dict[str, Any]]:
    files = sorted(FOLDER.glob("*.yaml"))
    return [found for file in files for found in yaml.safe_load_all(file.read_text("utf-8"))]


def of_kind(kind: str) -> dict[str, dict[str, Any]]:
    return {found["metadata"]["name"]: found for found in objects() if found["kind"] == kind}


def cluster() -> Any:
    (found,) = of_kind("RayCluster").values()
    return found["spec"]


def head() -> Any:
    return cluster()["headGroupSpec"]["template"]["spec"]


def front() -> Any:
    (found,) = (container for container in head()["containers"] if container["name"] == "front")
    return found


def pods() -> dict[str, Any]:
    found = {"head": head()}
    found |= {group["groupName"]: group["template"]["spec"] for group in cluster()["workerGroupSpecs"]}
    return found | {name: job["spec"]["template"]["spec"] for name, job in of_kind("Job").items()}


def flags() -> dict[str, str]:
    """The front's, by their names as settings."""
    pairs = [argument.removeprefix("--").partition("=") for argument in front()["args"]]
    return {name.replace("-", "_"): value for name, _, value in pairs}


def settings() -> set[str]:
    grouped = {f"{group}.{name}" for group, model in GROUPS.items() for name in model.model_fields}
    return {*ServerSettings.model_fields, *grouped} - set(GROUPS)


def ports() -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in front()["ports"]}


def test_the_front_is_started_with_flags_that_the_server_has() -> None:
    assert front()["command"] == ["chromarpc-server"]
    assert all(argument.startswith("--") and "=" in argument for argument in front()["args"])
    assert set(flags()) <= settings()


def test_the_front_s_flags_make_settings() -> None:
    """As the server itself reads them."""
    from pydantic_settings import CliApp

    made = CliApp.run(ServerSettings, cli_args=[a.replace("$(POD_IP)", "192.0.2.1") for a in front()["args"]])
    assert made.ray.port == ports()["actors"]
    assert (made.port, made.metrics_port) == (ports()["grpc"], ports()["status"])
    assert made.ray.address == "192.0.2.1:6379"
    assert not made.insecure


def test_flags_volumes_and_environment_agree() -> None:
    mounted = {mount["mountPath"] for mount in front()["volumeMounts"]}
    for name in ("tls_cert", "tls_key", "callers", "data_dir"):
        assert any(Path(flags()[name]).is_relative_to(path) for path in mounted), name
    given = {variable["name"] for variable in front()["env"]}
    used = {name for argument in front()["args"] for name in re.findall(r"\$\((\w+)\)", argument)}
    assert used <= given
    assert {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} <= given


def test_as_many_devices_are_asked_for_as_workers_may_come() -> None:
    (group,) = cluster()["workerGroupSpecs"]
    assert ray_devices(flags()["devices"]) == RayDevices(group["minReplicas"], group["maxReplicas"])
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    (worker,) = group["template"]["spec"]["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert cluster()["enableInTreeAutoscaling"]
    assert cluster()["autoscalerOptions"]["version"] == "v1"  # v2 has pods never restart their containers


def test_probes_ask_the_port_of_metrics_and_no_device_that_is_missing_restarts_the_front() -> None:
    for name, path in {"startupProbe": "/livez", "livenessProbe": "/livez", "readinessProbe": "/readyz"}.items():
        assert front()[name]["httpGet"] == {"path": path, "port": "status"}, name


def test_ray_stays_until_the_front_has_drained() -> None:
    assert head()["terminationGracePeriodSeconds"] >= float(flags()["grace_s"]) + 30
    (command,) = (c["lifecycle"]["preStop"]["exec"]["command"] for c in head()["containers"] if "lifecycle" in c)
    assert f"/{flags()['metrics_port']})" in command[-1]
    # The front's driver looks for the Ray node of its pod among the processes, and speaks to it in this folder.
    assert head()["shareProcessNamespace"] is True
    for container in head()["containers"]:
        assert {"name": "ray-logs", "mountPath": "/tmp/ray"} in container["volumeMounts"]


@pytest.mark.parametrize("name", pods())
def test_what_a_pod_names_exists(name: str) -> None:
    volumes = {volume["name"]: volume for volume in pods()[name]["volumes"]}
    secrets = set()
    for container in pods()[name]["containers"]:
        mounts = container.get("volumeMounts", [])
        assert {mount["name"] for mount in mounts} <= set(volumes)
        places = [mount["mountPath"] for mount in mounts]
        assert len(places) == len(set(places))
        for variable in container.get("env", []):
            reference = variable.get("valueFrom", {}).get("secretKeyRef")
            secrets |= set() if reference is None else {reference["name"]}
    secrets |= {volume["secret"]["secretName"] for volume in volumes.values() if "secret" in volume}
    assert secrets <= {*FROM_OPERATORS, FROM_KUBERAY}
    claims = [v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "persistentVolumeClaim" in v]
    assert set(claims) <= set(of_kind("PersistentVolumeClaim"))
    mounted = {mount["name"] for c in pods()[name]["containers"] for mount in c.get("volumeMounts", [])}
    assert mounted == set(volumes)


@pytest.mark.parametrize("name", pods())
def test_a_pod_runs_as_nobody_in_particular_and_writes_nowhere_else(name: str) -> None:
    pod = pods()[name]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert set(container["resources"]) == {"requests", "limits"}
        written = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        assert {"/tmp", "/home/chromarpc"} <= written
    assert f"USER {pod['securityContext']['runAsUser']}:" in (FOLDER / "Dockerfile").read_text("utf-8")
    # The token of KubeRay's autoscaler, which changes the cluster, is for its own container.
    hidden = {m["mountPath"] for c in pod["containers"] for m in c["volumeMounts"] if m["name"] == "nothing"}
    assert hidden if name == "head" else pod["automountServiceAccountToken"] is False


def test_every_container_has_the_same_image() -> None:
    images = {container["image"] for pod in pods().values() for container in pod["containers"]}
    assert images == {"chromarpc:0.1.0"}
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    assert pinned is not None  # which the Dockerfile installs with
    assert cluster()["rayVersion"] == pinned[1]
    assert "image: chromarpc:" in PAGE  # what the page's command replaces


def selectors() -> Iterator[tuple[str, dict[str, str]]]:
    for found in objects():
        name, spec = f"{found['kind']} {found['metadata']['name']}", found.get("spec", {})
        if found["kind"] == "Service":
            yield name, spec["selector"]
        elif found["kind"] == "PodDisruptionBudget":
            yield name, spec["selector"]["matchLabels"]
        elif found["kind"] == "NetworkPolicy":
            yield name, spec["podSelector"]["matchLabels"]
            for rule in (*spec.get("ingress", []), *spec.get("egress", [])):
                for peer in (*rule.get("from", []), *rule.get("to", [])):
                    if "podSelector" in peer:
                        yield name, peer["podSelector"]["matchLabels"]


def test_selectors_match_the_labels_that_kuberay_sets() -> None:
    (name,) = of_kind("RayCluster")
    found = list(selectors())
    assert len(found) > 5
    for where, labels in found:
        assert labels[CLUSTER_LABEL] == name, where
        assert labels.get(NODE_LABEL, "head") in ("head", "worker"), where
        assert set(labels) <= {CLUSTER_LABEL, NODE_LABEL}, where


def test_callers_reach_the_front_s_port_and_no_other() -> None:
    (service,) = of_kind("Service").values()
    assert [(port["port"], port["targetPort"]) for port in service["spec"]["ports"]] == [(ports()["grpc"], "grpc")]
    open_to_all = [
        (policy["spec"]["podSelector"]["matchLabels"], rule["ports"])
        for policy in of_kind("NetworkPolicy").values()
        for rule in policy["spec"].get("ingress", [])
        if "from" not in rule
    ]
    assert open_to_all == [
        ({CLUSTER_LABEL: "chromarpc", NODE_LABEL: "head"}, [{"port": ports()["grpc"], "protocol": "TCP"}])
    ]
    # Policies add up: one that names every pod closes what none opens.
    assert any(
        set(p["spec"]["podSelector"]["matchLabels"]) == {CLUSTER_LABEL} for p in of_kind("NetworkPolicy").values()
    )


def test_the_page_names_every_file_every_secret_and_the_flags_that_there_are() -> None:
    kubernetes = PAGE.partition("\n## On Kubernetes\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `([\w.-]+)` \|", kubernetes, re.MULTILINE)) == {p.name for p in FOLDER.iterdir()}
    for secret in FROM_OPERATORS:
        assert f" {secret} " in kubernetes
    named = set(re.findall(r"deploy/kuberay/([\w-]+\.yaml)", kubernetes))
    assert named == {path.name for path in FOLDER.glob("*.yaml")}
    told = set(re.findall(r"`--((?:ray\.)?[a-z-]+)`", PAGE)) | set(
        re.findall(r"--((?:ray\.)?[a-z-]+)", "\n".join(re.findall(r"^chromarpc-server .*$", PAGE, re.MULTILINE)))
    )
    assert len(told) > 10
    assert {flag.replace("-", "_") for flag in told} <= settings()
