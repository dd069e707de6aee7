"""The files of cluster/ and the claims of docs/clusters.md and docs/operations.md, checked without a cluster or a cloud."""

import ast
import importlib.metadata
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from raydiff import placement
from raydiff.config import Run, load, override
from raydiff.placement import GENERATE, REWARD, TRAIN, Node
from tests.hardened import faults

pytest.importorskip("ray")
ROOT = Path(__file__).parents[1]
CLUSTER, DOCS = ROOT / "cluster", ROOT / "docs"
POOLS = {TRAIN, GENERATE, REWARD}
RAY = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]  # type: ignore[index]
RAY_UP = sorted((CLUSTER / "ray-up").glob("*.yaml"))
KUBERAY = [CLUSTER / "kuberay/raycluster.yaml", CLUSTER / "kuberay/rayjob.yaml"]
FILES = sorted(p for p in CLUSTER.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
# Each file that costs something, or decides what does.
WITH_HEADER = [p for p in FILES if p.suffix in (".yaml", ".sh") or p.name == "Dockerfile"]


def named(paths: Iterable[Path]) -> Any:
    return pytest.mark.parametrize("path", paths, ids=lambda p: str(p.relative_to(ROOT)))


def header(path: Path) -> str:
    """The comment at a file's top, as one line."""
    lines = path.read_text().splitlines()[1 if path.suffix == ".sh" else 0 :]
    found = []
    for line in lines:
        if not line.startswith("#"):
            break
        found.append(line.lstrip("# "))
    return " ".join(found)


def read(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text()))


def cluster_spec(path: Path) -> dict[str, Any]:
    spec = read(path)["spec"]
    return dict(spec.get("rayClusterSpec", spec))


def autoscaling(path: Path) -> dict[str, Any]:
    """The file as the autoscaler of Ray reads it. Raises what that raises."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr as derive
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = derive({"metadata": read(path)["metadata"], "spec": cluster_spec(path)}) if path in KUBERAY else read(path)
    prepared = prepare_config(config)
    validate_config(prepared)
    return dict(prepared)


def types(path: Path) -> dict[str, Any]:
    """Node types without the head."""
    config = autoscaling(path)
    return {name: kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]}


def nodes(path: Path, count: str = "min_workers", without: str = "") -> list[Node]:
    """The nodes that the file's cluster has from the start, or at most; `without` leaves one of a type out."""
    found = []
    for name, kind in types(path).items():
        node = Node(kind["resources"]["CPU"], kind["resources"].get("GPU", 0), kind["labels"])
        found += [node] * (kind[count] - (name == without))
    return found


def recipe(path: Path) -> Run:
    """The recipe that the file's header says it is sized for."""
    found = re.search(r"Sized for: (jobs/recipes/\w+\.toml)", header(path))
    assert found, f"{path.name}: its header names no recipe"
    return load(ROOT / found[1])


@named(WITH_HEADER)
def test_headers_tell_what_to_know_before(path: Path) -> None:
    for word in ("GPUs: ", "Cost: ", "Sized for: ", "To edit: "):
        assert word in header(path), f"{path.name}: its header does not tell {word!r}"


@named(RAY_UP + KUBERAY)
def test_ray_accepts_the_file_and_each_pool_has_its_nodes(path: Path) -> None:
    config = autoscaling(path)
    assert config["available_node_types"][config["head_node_type"]]["resources"]["CPU"] == 0
    assert set(types(path)) == POOLS
    for name, kind in types(path).items():
        assert kind["labels"] == {"raydiff-pool": name}
        assert kind["max_workers"] >= kind["min_workers"]
    assert types(path)[GENERATE]["max_workers"] > types(path)[GENERATE]["min_workers"]  # it can grow
    assert config["max_workers"] >= sum(kind["max_workers"] for kind in types(path).values())


@named(RAY_UP + KUBERAY)
def test_the_recipe_fits_and_needs_every_node(path: Path) -> None:
    run = recipe(path)
    for pool in POOLS:
        assert getattr(run.pools, pool).labels == {"raydiff-pool": pool}
    assert placement.faults(run, nodes(path), path.name) == []
    for pool in POOLS:
        assert placement.faults(run, nodes(path, without=pool), path.name), f"{pool} has a node that the recipe leaves idle"


@named(RAY_UP + KUBERAY)
def test_the_header_counts_the_gpus(path: Path) -> None:
    by_pool = {kind["labels"]["raydiff-pool"]: kind["min_workers"] for kind in types(path).values()}
    told = re.search(r"GPUs: (\d+) .*?1 train \+ (\d+) generate \+ (\d+) reward.*?up to (\d+)", header(path))
    assert told, "the header does not count"
    assert [int(n) for n in told.groups()] == [
        sum(node.gpus for node in nodes(path)),
        by_pool[GENERATE],
        by_pool[REWARD],
        sum(node.gpus for node in nodes(path, "max_workers")) - 1,  # reward grows only beside a smaller generate pool
    ] or int(told[4]) == sum(node.gpus for node in nodes(path, "max_workers"))


@named(RAY_UP)
def test_ray_up_spot_nodes_and_setup(path: Path) -> None:
    config = read(path)
    assert config["provider"]["type"] == path.stem
    spot = {
        name
        for name, kind in config["available_node_types"].items()
        if kind["node_config"].get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        or kind["node_config"].get("scheduling", {}).get("provisioningModel") == "SPOT"
    }
    assert spot == {GENERATE, REWARD}
    setup = " ".join(config["setup_commands"])
    assert "--python 3.11" in setup
    assert "--constraint ~/raydiff/constraints.txt" in setup
    for local in config["file_mounts"].values():
        assert local.startswith("~") or (ROOT / local).exists(), f"{local} is not in the repository"


@named(RAY_UP)
def test_ray_up_nodes_authenticate_by_token(path: Path) -> None:
    config = read(path)
    home = f"/home/{config['auth']['ssh_user']}"
    assert config["file_mounts"][f"{home}/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("chmod 600 ~/.ray/auth_token" in command for command in config["setup_commands"])
    for kind in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in config[kind] if "ray start" in command]
        assert len(starts) == 1
        assert re.search(r"RAY_AUTH_MODE=token \S*ray start", starts[0])


@named(KUBERAY)
def test_kuberay_kinds_versions_and_keys(path: Path) -> None:
    """What Ray's own validation passes over: a misspelt key, a wrong kind, another version."""
    config, spec = read(path), cluster_spec(path)
    assert config["apiVersion"] == "ray.io/v1"
    assert config["kind"] == {"raycluster": "RayCluster", "rayjob": "RayJob"}[path.stem]
    assert config["metadata"].keys() == {"name", "namespace"}
    assert spec["rayVersion"] == RAY
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["authOptions"] == {"mode": "token"}
    assert spec.keys() == {
        "rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "authOptions", "headGroupSpec", "workerGroupSpecs",
    }  # fmt: skip
    for group in spec["workerGroupSpecs"]:
        assert group.keys() == {
            "groupName", "labels", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template",
        }  # fmt: skip
        assert group["minReplicas"] == group["replicas"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["restartPolicy"] == "Never"
        (container,) = pod["containers"]
        assert f":ray-{RAY}@" in container["image"]
        assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/shared", "/tmp", "/home/raydiff"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert container["resources"]["limits"].get("nvidia.com/gpu") == container["resources"]["requests"].get(
            "nvidia.com/gpu"
        )
    claim = read(CLUSTER / "kuberay/storage.yaml")
    assert (claim["apiVersion"], claim["kind"]) == ("v1", "PersistentVolumeClaim")
    assert claim["metadata"]["namespace"] == config["metadata"]["namespace"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        (volume,) = [v for v in group["template"]["spec"]["volumes"] if "emptyDir" not in v]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def pods(path: Path) -> dict[str, dict[str, Any]]:
    """The template of each pod of a cluster, by group."""
    spec = cluster_spec(path)
    return {"head": spec["headGroupSpec"]["template"]} | {g["groupName"]: g["template"] for g in spec["workerGroupSpecs"]}


def test_rayjob_is_the_same_cluster() -> None:
    standing, once = (cluster_spec(path) for path in KUBERAY)
    for path, spec in zip(KUBERAY, (standing, once), strict=True):
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            assert group["template"].pop("metadata") == {"labels": {"raydiff-cluster": read(path)["metadata"]["name"]}}
    assert standing == once


@named(KUBERAY)
def test_each_secret_is_where_it_is_needed(path: Path) -> None:
    """MLflow: who drives runs. Buckets: who writes checkpoints too. The hub: who loads weights."""
    given = {
        name: {entry["secretRef"]["name"] for entry in pod["spec"]["containers"][0]["envFrom"]}
        for name, pod in pods(path).items()
    }
    assert given == {
        "head": {"raydiff-mlflow", "raydiff-bucket", "raydiff-hub"}, TRAIN: {"raydiff-bucket", "raydiff-hub"},
        GENERATE: {"raydiff-hub"}, REWARD: {"raydiff-hub"},
    }  # fmt: skip
    named_in_docs = set(re.findall(r"create secret generic (\S+)", (DOCS / "clusters.md").read_text()))
    assert named_in_docs == given["head"]


def policies() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / "kuberay/network.yaml").read_text()))


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    return selector.get("matchLabels", {}).items() <= labels.items()


def reaches(labels: dict[str, str], target: dict[str, str], port: int, namespace: str = "raydiff") -> bool:
    """Whether a pod with some labels may connect to another's port in the namespace raydiff, as Kubernetes decides it."""
    chosen = [policy["spec"] for policy in policies() if selects(policy["spec"]["podSelector"], target)]
    if not any("Ingress" in spec["policyTypes"] for spec in chosen):
        return True
    for rule in (rule for spec in chosen for rule in spec.get("ingress", [])):
        open_to_all = "from" not in rule
        known = any(
            selects(peer.get("podSelector", {}), labels)
            and (
                selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": namespace})
                if "namespaceSelector" in peer
                else namespace == "raydiff"
            )
            for peer in rule.get("from", [])
        )
        if (known or open_to_all) and ("ports" not in rule or port in [at["port"] for at in rule["ports"]]):
            return True
    return False


def test_only_the_pods_of_a_cluster_reach_each_other() -> None:
    """With the labels of the files, and those that KubeRay adds."""
    assert all(policy["metadata"]["namespace"] == read(KUBERAY[0])["metadata"]["namespace"] for policy in policies())
    assert all(policy["apiVersion"] == "networking.k8s.io/v1" and policy["kind"] == "NetworkPolicy" for policy in policies())
    clusters = [
        {
            name: pod["metadata"]["labels"] | {"ray.io/node-type": "head" if name == "head" else "worker"}
            for name, pod in pods(path).items()
        }
        for path in KUBERAY
    ]
    ports = (6379, 8265, 10001, 10002, 29500, 45678, 8080)
    for mine, others in (clusters, clusters[::-1]):
        for target in mine.values():
            for port in ports:
                assert all(reaches(labels, target, port) for labels in mine.values())
                assert not any(reaches(labels, target, port) for labels in others.values())
                for stranger in ({}, {"app": "web"}, {"ray.io/node-type": "head"}):
                    assert not reaches(stranger, target, port)
                    assert not reaches(stranger | target, target, port, namespace="other")
        operator = {"app.kubernetes.io/component": "kuberay-operator"}
        assert [port for port in ports if reaches(operator, mine["head"], port, namespace="default")] == [8265]
        assert not reaches(operator, mine["head"], 8265, namespace="other")
        assert not reaches(operator, mine[TRAIN], 8265, namespace="default")
    submitter = read(KUBERAY[1])["spec"]["submitterPodTemplate"]["metadata"]["labels"]
    assert [port for port in ports if reaches(submitter, clusters[1]["head"], port)] == [8265]
    assert not any(reaches(submitter, clusters[0]["head"], port) for port in ports)
    assert not reaches({}, {"app": "whatever runs there too"}, 80)


def test_the_docs_name_the_ports() -> None:
    from raydiff.config import TrainPool

    text = (DOCS / "clusters.md").read_text()
    first, last = TrainPool().ports
    assert f"{first} to {last}" in text
    for port in (6379, 8265, 10001):
        assert f"{port}" in text


def test_rayjob_runs_its_recipe_once() -> None:
    spec = read(KUBERAY[1])["spec"]
    assert spec.keys() == {
        "entrypoint", "runtimeEnvYAML", "submissionMode", "backoffLimit", "shutdownAfterJobFinishes",
        "ttlSecondsAfterFinished", "rayClusterSpec", "submitterPodTemplate",
    }  # fmt: skip
    assert spec["backoffLimit"] == 0
    assert spec["shutdownAfterJobFinishes"] is True
    shell, option, command = shlex.split(spec["entrypoint"])
    assert (shell, option) == ("sh", "-c")
    run = trained(command)
    assert run.storage == "/shared/runs"
    assert run.tracking.uri == "$MLFLOW_TRACKING_URI"  # which the head's shell fills in
    assert run.name == recipe(KUBERAY[1]).name
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"] == {
        "RAY_JOB_STOP_WAIT_TIME_S": "600",
    }


def trained(command: str) -> Run:
    """The run of a `python jobs/train.py RECIPE path=value ...` somewhere in a command. Raises what a bad one raises."""
    words = shlex.split(command.partition("jobs/train.py ")[2])
    words = [word for i, word in enumerate(words) if "--resume" not in (word, words[i - 1] if i else "")]
    return load(ROOT / words[0], words[1:])


def test_versions_are_the_pinned_ones() -> None:
    """Of Ray in each file, and of what else stands in several."""
    assert importlib.metadata.version("ray") == RAY
    text = {path: path.read_text() for path in FILES}
    pins = {path: re.findall(r"(?:ray\[[\w,]+\]==|rayVersion: \"|raydiff:ray-)([\d.]+\d)", text[path]) for path in FILES}
    for path in (*RAY_UP, *KUBERAY, CLUSTER / "Dockerfile"):
        assert pins[path], f"{path.name} pins no version of Ray"
    assert {pin for found in pins.values() for pin in found} == {RAY}
    pinned = re.findall(r"^uv==\S+ --hash=sha256:[0-9a-f]{64}$", text[CLUSTER / "uv.txt"], re.M)
    assert len(pinned) == 1
    for path in (*RAY_UP, CLUSTER / "Dockerfile"):
        assert re.search(r"pip install [^&;]*--require-hashes --requirement \S+/uv\.txt", text[path]), path.name
    assert set(re.findall(r"^ray==.+$", (ROOT / "constraints.txt").read_text(), re.M)) == {f"ray=={RAY}"}


def test_dockerfile() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    steps = re.sub(r"\\\n", " ", text).splitlines()
    (base,) = [step for step in steps if step.startswith("FROM ")]
    assert re.fullmatch(r"FROM nvidia/cuda:\$\{CUDA\}-runtime-ubuntu24\.04@\$\{CUDA_DIGEST:\?.+\}", base)
    assert "ARG CUDA_DIGEST" in steps[: steps.index(base)]  # with no default
    assert "uv venv --python 3.11" in text
    assert [step for step in steps if step.startswith("USER ")] == ["USER 1000"]
    assert not [step for step in steps[steps.index("USER 1000") :] if step.startswith("RUN ")]  # nothing after it needs root
    installs = [step for step in steps if step.startswith("RUN uv pip install")]
    assert installs
    assert all("--constraint constraints.txt" in step for step in installs)
    ignore = (ROOT / ".dockerignore").read_text().split()
    assert ignore[ignore.index("*") - 1] != "!*"
    for step in steps:
        if step.startswith("COPY ") and "--from" not in step:
            for source in step.split()[1:-1]:
                assert (ROOT / source).exists(), f"{source} is not in the repository"
                assert f"!{source}" in ignore, f".dockerignore keeps {source} out"
    allowed = {word[1:] for word in ignore if word.startswith("!")}
    assert allowed <= {source for step in steps if step.startswith("COPY ") for source in step.split()[1:]}


SECRET = re.compile(
    r"AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|-----BEGIN [A-Z ]*PRIVATE KEY|(?<!sha256:)\b[0-9a-f]{32,}"
    r"|(?i:password|token|secret|access_key|api_key)(?i:[a-z_]*)[\"']?\s*[:=]\s*[\"']?(?![$/~{<.])[A-Za-z0-9+_-]{8,}"
    r"|://[^\s:/@$]+:[^\s@$/]+@"
)


@named([*FILES, *sorted(DOCS.glob("*.md"))])
def test_no_secret_in_any_file(path: Path) -> None:
    assert not (found := SECRET.findall(path.read_text())), found


@pytest.mark.parametrize(
    "text",
    [
        "AWS_ACCESS_KEY_ID: AKIAIOSFODNN7EXAMPLE", "POSTGRES_PASSWORD=correct-horse", 'auth_token: "2f1d0c9b8a7e"',
        "postgresql://mlflow:hunter22@db/mlflow", "HF_TOKEN: hf_" + "a" * 30, "echo " + "0f" * 16,
    ],
)  # fmt: skip
def test_a_secret_would_be_found(text: str) -> None:
    assert SECRET.search(text)


@named(FILES)
def test_nothing_is_unpinned_unverified_or_too_privileged(path: Path) -> None:
    assert faults(path.name, path.read_text()) == []


DIGEST = f"sha256:{'0123456789abcdef' * 4}"
POD = f"""
apiVersion: batch/v1
kind: Job
spec:
  template:
    spec:
      automountServiceAccountToken: false
      securityContext: {{runAsNonRoot: true, seccompProfile: {{type: RuntimeDefault}}}}
      containers:
        - name: one
          image: registry/one:1@{DIGEST}
          command: [sh, -c, "curl https://host/x -o x && echo 0a x | sha256sum --check && sh x"]
          securityContext:
            allowPrivilegeEscalation: false
            capabilities: {{drop: [ALL]}}
            readOnlyRootFilesystem: true
"""
COMPOSE = f"""
services:
  one:
    image: registry/one:1@{DIGEST}
    cap_drop: [ALL]
    security_opt: [no-new-privileges:true]
    read_only: true
    ports: ["127.0.0.1:80:80"]
    volumes: [data:/data]
"""
DOCKERFILE = f"""
FROM registry/one:1@{DIGEST} AS first
FROM first
COPY --from=first /x /x
RUN curl -o x https://host/x \\
    && echo 0a x | sha256sum -c && sh x
RUN pip install --constraint constraints.txt package
"""
SCRIPT = "curl -o x https://host/x && echo 0a x | sha256sum -c && bash x\npip install package==1.0\n"
HARMLESS = {"job.yaml": POD, "compose.yml": COMPOSE, "Dockerfile.gpu": DOCKERFILE, "setup.sh": SCRIPT}


@pytest.mark.parametrize("name", HARMLESS)
def test_files_that_are_in_order_pass(name: str) -> None:
    assert faults(name, HARMLESS[name]) == []


@pytest.mark.parametrize(
    ("name", "old", "new", "fault"),
    [
        ("job.yaml", f"one:1@{DIGEST}", "one:1", "has no digest"),
        ("job.yaml", f"one:1@{DIGEST}", "one", "has no digest"),
        ("job.yaml", DIGEST, "sha256:0123", "has no digest"),
        ("job.yaml", DIGEST, "${DIGEST}", "has no digest"),
        ("job.yaml", "drop: [ALL]", "drop: [NET_RAW]", "keeps capabilities"),
        ("job.yaml", "{drop: [ALL]}", "{drop: [ALL], add: [SYS_ADMIN]}", "keeps capabilities"),
        ("job.yaml", "capabilities: {drop: [ALL]}", "privileged: true", "may gain privileges"),
        ("job.yaml", "allowPrivilegeEscalation: false", "runAsUser: 1000", "may gain privileges"),
        ("job.yaml", "readOnlyRootFilesystem: true", "runAsUser: 0", "runs as root"),
        ("job.yaml", "readOnlyRootFilesystem: true", "runAsUser: 1000", "may write to its image"),
        ("job.yaml", "runAsNonRoot: true", "runAsUser: 1000", "may run as root"),
        ("job.yaml", "type: RuntimeDefault", "type: Unconfined", "has no seccompProfile"),
        ("job.yaml", "automountServiceAccountToken: false", "automountServiceAccountToken: true", "a token for Kubernetes"),
        ("job.yaml", "automountServiceAccountToken: false", "hostNetwork: true", "hostNetwork"),
        (
            "job.yaml",
            "      containers:",
            "      initContainers: [{name: two, image: two}]\n      containers:",
            "container two",
        ),
        ("job.yaml", "&& echo 0a x | sha256sum --check && sh x", "| sh", "runs what it downloads"),
        ("job.yaml", "&& echo 0a x | sha256sum --check", "", "downloads what nothing verifies"),
        ("job.yaml", "          command:", "          env: [{name: HF_TOKEN, value: x}]\n          command:", "into a Secret"),
        ("compose.yml", f"@{DIGEST}", "", "has no digest"),
        ("compose.yml", "cap_drop: [ALL]", "cap_drop: [NET_RAW]", "keeps capabilities"),
        ("compose.yml", "read_only: true", "privileged: true", "keeps capabilities"),
        ("compose.yml", "read_only: true", "read_only: false", "may write to its image"),
        ("compose.yml", "[no-new-privileges:true]", "[]", "may gain privileges"),
        ("compose.yml", "127.0.0.1:80:80", "80:80", "open to the network"),
        ("compose.yml", "data:/data", "/var/run/docker.sock:/x", "a folder of the machine"),
        ("Dockerfile.gpu", f"one:1@{DIGEST}", "one:latest", "has no digest"),
        ("Dockerfile.gpu", "FROM first", "FROM --platform=linux/amd64 debian:13 AS second", "has no digest"),
        ("Dockerfile.gpu", "--from=first", "--from=registry/two:1", "has no digest"),
        (
            "Dockerfile.gpu",
            "RUN curl -o x https://host/x",
            "RUN curl -LsSf https://host/x | sh; true",
            "runs what it downloads",
        ),
        ("Dockerfile.gpu", "sha256sum -c", "cat", "downloads what nothing verifies"),
        ("Dockerfile.gpu", "RUN pip", "ADD https://host/x /x\nRUN pip", "downloads what nothing verifies"),
        ("Dockerfile.gpu", "--constraint constraints.txt", "--no-cache-dir", "of no fixed version"),
        (
            "setup.sh",
            "-o x https://host/x && echo 0a x | sha256sum -c && bash x",
            "https://host/x | sudo -E bash -s",
            "runs what",
        ),
        (
            "setup.sh",
            "curl -o x https://host/x && echo 0a x",
            'sh -c "$(curl -fsSL https://host/x)"; x',
            "runs what it downloads",
        ),
        ("setup.sh", "curl -o x https://host/x && echo 0a x", "bash <(curl -s https://host/x); x", "runs what it downloads"),
        ("setup.sh", "curl -o x https://host/x", "wget -qO- https://host/x | python3 -", "runs what it downloads"),
        ("setup.sh", "| sha256sum -c", "", "downloads what nothing verifies"),
        ("setup.sh", "package==1.0", "package", "of no fixed version"),
        ("ray.yaml", "", "setup_commands: ['test -x uv || curl -LsSf https://host/install.sh | sh']", "runs what it downloads"),
        ("ray.yaml", "", "docker: {image: 'rayproject/ray:2.60.0'}", "has no digest"),
        ("ray.yaml", "", "initialization_commands: ['wget $URL']", "downloads what nothing verifies"),
        ("ray.yaml", "", "build: {dockerfile_inline: 'FROM python:3.11'}", "has no digest"),
    ],
)
def test_a_sabotaged_file_is_noticed(name: str, old: str, new: str, fault: str) -> None:
    text = HARMLESS.get(name, "")
    assert old in text
    found = faults(name, text.replace(old, new, 1))
    assert any(fault in one for one in found), found


@named(KUBERAY)
@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false", "container autoscaler: may write to its image"),
        ("securityContext: *container", "", "container ray-head: keeps capabilities"),
        ("automountServiceAccountToken: false", "", "has a token for Kubernetes"),
        ("seccompProfile: {type: RuntimeDefault}", "", "pod of ['ray-head']: has no seccompProfile"),
        ("enableInTreeAutoscaling: true", "enableInTreeAutoscaling: false", "pod of ['ray-head']: has a token"),
        ("@sha256:EDIT-ME", "", "has no digest"),
    ],
)
def test_a_sabotaged_cluster_is_noticed(path: Path, old: str, new: str, fault: str) -> None:
    found = faults(path.name, path.read_text().replace(old, new, 1))
    assert any(fault in one for one in found), found


def test_passwords_come_from_outside() -> None:
    example = dict(re.findall(r"^(\w+)=(.*)$", (CLUSTER / "mlflow/.env.example").read_text(), re.M))
    assert example["POSTGRES_PASSWORD"] == ""
    assert ".env" in (ROOT / ".gitignore").read_text().split()


def test_mlflow_compose() -> None:
    path = CLUSTER / "mlflow/compose.yaml"
    config, text = read(path), path.read_text()
    assert config["services"].keys() == {"db", "mlflow"}
    db, server = config["services"]["db"], config["services"]["mlflow"]
    assert db["image"].startswith("postgres:17@${POSTGRES_DIGEST:?")
    assert "FROM python:3.11-slim@${PYTHON_DIGEST:?" in server["build"]["dockerfile_inline"]
    assert server["environment"]["MLFLOW_BACKEND_STORE_URI"].startswith("postgresql://mlflow:${POSTGRES_PASSWORD}@db:5432/")
    assert server["depends_on"]["db"]["condition"] == "service_healthy"
    assert "healthcheck" in db
    assert (path.parent / server["build"]["context"]).resolve() == ROOT
    destination = server["command"][server["command"].index("--artifacts-destination") + 1]
    assert f"artifacts:{destination}" in server["volumes"]
    used = {volume.partition(":")[0] for service in (db, server) for volume in service["volumes"]}
    assert config["volumes"].keys() == used
    variables = set(re.findall(r"\$\{(\w+)", text))
    assert variables == set(re.findall(r"^(\w+)=", (path.parent / ".env.example").read_text(), re.M))
    assert server["ports"] == ["${MLFLOW_LISTEN:-127.0.0.1}:5000:5000"]  # not open to the world by default


@named(sorted(CLUSTER.rglob("*.sh")))
def test_shell_scripts_parse(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert os.access(path, os.X_OK)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cpus", "1"], "unknown argument --cpus; it takes --train"),
        (["--train", "few"], "--train takes a whole number, not few"),
        (["--port", "10010"], "take 1024 to 9950"),
    ],
)
def test_local_cluster_refuses_wrong_arguments(arguments: list[str], message: str) -> None:
    done = subprocess.run(["bash", "cluster/local.sh", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""


def test_local_cluster_gives_each_node_ports_of_its_own() -> None:
    """The numbers that the script hands to `ray start`, worked out by bash."""
    text = (CLUSTER / "local.sh").read_text()
    options = re.findall(r"--([\w-]+port)=(\$\(\([^)]*\)\)|\"\$base\")", text)
    assert len(options) >= 10
    taken: dict[int, str] = {}
    for number in range(4):
        numbers = {}
        for option, expression in options:
            if number and option in ("port", "dashboard-port", "ray-client-server-port"):
                continue
            done = subprocess.run(
                ["bash", "-c", f"base=9950 number={number}; echo {expression}"], capture_output=True, text=True, check=True
            )
            numbers[option] = int(done.stdout)
        low, high = numbers.pop("min-worker-port"), numbers.pop("max-worker-port")
        for port in (*numbers.values(), *range(low, high + 1)):
            assert port not in taken, f"node {number}: port {port} is node {taken[port]}'s too"
            taken[port] = str(number)
        assert max(numbers.values()) < 10002 <= low <= high < 32768  # from there on the kernel gives ports out


def reserve() -> Any:
    spec = importlib.util.spec_from_file_location("reserve", CLUSTER / "reserve.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@named(RAY_UP + KUBERAY)
def test_reserve_asks_for_what_the_run_claims(path: Path) -> None:
    run = override(recipe(path), {"pools.generate.replicas": 8, "pools.reward.num_gpus": 0.5})
    bundles, labels = reserve().wanted(run)
    assert len(bundles) == len(labels) == 10
    assert bundles.count({"CPU": 1, "GPU": 1}) == 9
    assert bundles.count({"CPU": 1, "GPU": 0.5}) == 1
    assert [selector["raydiff-pool"] for selector in labels] == [TRAIN] + [GENERATE] * 8 + [REWARD]
    assert placement.faults(run, nodes(path), path.name)  # they are not there from the start,
    assert placement.faults(run, nodes(path, "max_workers"), path.name) == []  # but may come


def read_by_the_code() -> set[str]:
    """Environment variables by name: what is given to os.environ, and all that looks like one where os.environ is used."""
    found = set()
    for path in (*(ROOT / "raydiff").rglob("*.py"), *(ROOT / "jobs").glob("*.py"), *CLUSTER.glob("*.py")):
        tree = ast.parse(path.read_text())
        uses = any(isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") for node in ast.walk(tree))
        for node in ast.walk(tree):
            if uses and isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= set(re.findall(r"\A(?!SC_)[A-Z][A-Z0-9]*_\w+\Z", node.value))  # SC_: of os.sysconf
    return found


def test_every_variable_that_the_code_reads_is_documented() -> None:
    names = read_by_the_code()
    assert {"RAY_ADDRESS", "RAYDIFF_DEBUG", "RAY_worker_niceness"} <= names  # the search finds what is known to be there
    table = set(re.findall(r"^\| `(\w+)`", (DOCS / "clusters.md").read_text(), re.M))
    assert not (missing := names - table), f"docs/clusters.md does not name {sorted(missing)}"


def documents() -> dict[str, str]:
    return {name: (DOCS / name).read_text() for name in ("clusters.md", "operations.md")}


def test_docs_name_files_that_exist() -> None:
    for name, text in documents().items():
        paths = set(re.findall(r"\b((?:cluster|docs|jobs|tests|raydiff)/[\w./-]+\w)", text))
        assert paths, name
        for path in paths:
            assert (ROOT / path).exists(), f"docs/{name} names {path}, which is not there"
    readme = (ROOT / "README.md").read_text()
    assert "docs/clusters.md" in readme
    assert "docs/operations.md" in readme


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_operations_lists_tests_that_exist() -> None:
    """Each row ends with tests, by file and name, or with "not tested"."""
    rows = [line for line in documents()["operations.md"].splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith(("| what happens", "| ---"))]
    assert len(rows) > 10
    for row in rows:
        proof = row.rstrip(" |").rpartition("|")[2]
        files = re.findall(r"`(test_\w+)\.py`", proof)
        tests = re.findall(r"`(test_\w+)`", proof)
        if not tests:
            assert "not tested" in proof, row
            continue
        assert len(files) == 1, row
        (path,) = (ROOT / "tests").rglob(f"{files[0]}.py")
        assert not (missing := set(tests) - functions(path)), f"{files[0]}.py has no {sorted(missing)}"


def test_commands_in_the_docs_are_runs() -> None:
    """Every `python jobs/train.py` of the docs has a recipe and overrides that load."""
    for text in documents().values():
        for line in re.sub(r"\\\n\s*", " ", text).splitlines():
            if "jobs/train.py " in line and "RECIPE" not in line:
                command = line.partition("jobs/train.py ")[2].rstrip("'`").split("`")[0]
                trained(f"jobs/train.py {command}")
    commands = sum(text.count("python jobs/train.py jobs/recipes/") for text in documents().values())
    assert commands >= 2


def test_docs_do_not_leave_the_pool_names_to_chance() -> None:
    text = documents()["clusters.md"] + (CLUSTER / "local.sh").read_text()
    assert set(re.findall(r"raydiff-pool=([a-z]+)", text)) <= POOLS
    assert sys.version_info[:2] >= (3, 11)
