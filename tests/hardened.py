"""What a file of cluster/ may not hold, of whatever kind it is: images without a digest, downloads that nothing verifies, and
containers with more rights than they need. `faults(name, text)` lists what it holds of these."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

# A digest, a variable that must be set to one, or what no registry takes for one
_PINNED = re.compile(r"\S+@(sha256:[0-9a-f]{64}|sha256:EDIT-ME|\$\{\w+:\?.+\})")
_FETCH = re.compile(
    r"\b(curl|wget|aria2c|fetch)\b(?=.*(https?://|ftp://|\$))|\bADD\s+(?!.*--checksum=sha256:)\S*\s*https?://", re.DOTALL
)
_VERIFIED = re.compile(r"\b(sha256sum|shasum|sha512sum)\b.*(\s-c\b|--check\b)|\bgpg\b.*--verify|\bcosign verify", re.DOTALL)
_INTO_SHELL = re.compile(r"\|\s*(sudo\s+(-\S+\s+)*)?(env\s+\S+\s+)?\S*\b(ba|z|da|)sh\b|\|\s*(sudo\s+)?\S*python[\d.]*\b")
_SUBSTITUTED = re.compile(r"(<\(|\$\(|`)\s*(curl|wget)\b")
_PIP = re.compile(r"\bpip3?\s+install\b[^|;&]*")
_SAFE_PIP = re.compile(r"--require-hashes|--constraint|-c\s|==")


def faults(name: str, text: str) -> list[str]:
    """One line per fault of a file."""
    if name.endswith((".yaml", ".yml")):
        documents = list(yaml.safe_load_all(text))
        return [f for document in documents for f in (*_tree(document, ""), *_pods(document), *_services(document))]
    if "Dockerfile" in name or "Containerfile" in name:
        return list(_dockerfile(text))
    return [f for command in _commands(text) for f in _command(command)] if not name.endswith((".txt", ".md", ".py")) else []


def _commands(text: str) -> Iterator[str]:
    """Logical lines, without comments."""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if not line.lstrip().startswith("#"):
            yield line


def _command(text: str) -> Iterator[str]:
    """Of one shell command, which may be a chain."""
    shown = " ".join(text.split())[:80]
    if _FETCH.search(text) and (_INTO_SHELL.search(text) or _SUBSTITUTED.search(text)):
        yield f"{shown!r} runs what it downloads"
    elif _FETCH.search(text) and not _VERIFIED.search(text):
        yield f"{shown!r} downloads what nothing verifies"
    for install in _PIP.findall(text):
        if not _SAFE_PIP.search(install):
            yield f"{shown!r} installs packages of no fixed version"


def _image(reference: str) -> Iterator[str]:
    if not _PINNED.fullmatch(reference):
        yield f"image {reference!r} has no digest"


def _dockerfile(text: str) -> Iterator[str]:
    stages = set[str]()
    for step in _commands(text):
        if found := re.match(r"\s*FROM\s+(?:--\S+\s+)*(.+?)(?:\s+AS\s+(\S+))?\s*$", step, re.IGNORECASE):
            if found[1] not in {"scratch", *stages}:
                yield from _image(found[1])
            stages.add(found[2] or "")
        for source in re.findall(r"--(?:from=|mount=\S*\bfrom=)([^\s,]+)", step):
            if source not in stages and not source.isdigit():
                yield from _image(source)
        yield from _command(step)


def _tree(value: Any, key: str) -> Iterator[str]:
    """Images and commands, wherever they stand."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _tree(inner, str(name))
    elif isinstance(value, list):
        if all(isinstance(word, str) for word in value) and key in ("command", "args", "entrypoint", "test"):
            yield from _command(" ".join(value))
        for inner in value:
            yield from _tree(inner, "")
    elif isinstance(value, str):
        if key.lower() in ("image", "docker_image", "head_image", "worker_image"):
            yield from _image(value)
        elif "FROM " in value:
            yield from _dockerfile(value)
        else:
            for line in _commands(value):
                yield from _command(line)


def _pods(value: Any, key: str = "") -> Iterator[str]:
    """Of Kubernetes: every pod's spec, each of its containers, and the sidecar that KubeRay adds to the head."""
    if isinstance(value, list):
        for inner in value:
            yield from _pods(inner, key)
    if not isinstance(value, Mapping):
        return
    if "headGroupSpec" in value:
        yield from _container({"name": "autoscaler", **value.get("autoscalerOptions", {})})
        yield from _pod(
            value["headGroupSpec"].get("template", {}).get("spec", {}), token=bool(value.get("enableInTreeAutoscaling"))
        )
    elif "containers" in value:
        yield from _pod(value)
    for name, inner in value.items():
        if name != "headGroupSpec":
            yield from _pods(inner, name)


def _pod(spec: Mapping[str, Any], *, token: bool = False) -> Iterator[str]:
    """`token`: whether it needs one for Kubernetes."""
    context = spec.get("securityContext", {})
    names = [c.get("name") for c in spec.get("containers", [])]
    if context.get("runAsNonRoot") is not True or context.get("runAsUser") == 0:
        yield f"pod of {names}: may run as root"
    if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield f"pod of {names}: has no seccompProfile"
    if not token and spec.get("automountServiceAccountToken") is not False:
        yield f"pod of {names}: has a token for Kubernetes"
    for shared in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(shared):
            yield f"pod of {names}: {shared}"
    if any("hostPath" in volume for volume in spec.get("volumes", [])):
        yield f"pod of {names}: mounts a folder of the node"
    for kind in ("initContainers", "containers", "ephemeralContainers"):
        for container in spec.get(kind, []):
            yield from _container(container)


def _container(container: Mapping[str, Any]) -> Iterator[str]:
    name, context = container.get("name"), container.get("securityContext", {})
    if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
        yield f"container {name}: may gain privileges"
    if context.get("capabilities") != {"drop": ["ALL"]}:
        yield f"container {name}: keeps capabilities"
    if context.get("readOnlyRootFilesystem") is not True:
        yield f"container {name}: may write to its image"
    if context.get("runAsNonRoot") is False or context.get("runAsUser") == 0:
        yield f"container {name}: runs as root"
    if any("hostPort" in port for port in container.get("ports", [])):
        yield f"container {name}: takes a port of the node"
    for entry in container.get("env", []):
        if "value" in entry and re.search(r"TOKEN|SECRET|PASSWORD|KEY", entry["name"]):
            yield f"container {name}: {entry['name']} belongs into a Secret"


def _services(document: Any) -> Iterator[str]:
    """Of Docker Compose."""
    services = document.get("services") if isinstance(document, Mapping) else None
    for name, service in services.items() if isinstance(services, Mapping) else ():
        if service.get("cap_drop") != ["ALL"] or service.get("cap_add") or service.get("privileged"):
            yield f"service {name}: keeps capabilities"
        if "no-new-privileges:true" not in service.get("security_opt", []):
            yield f"service {name}: may gain privileges"
        if service.get("read_only") is not True:
            yield f"service {name}: may write to its image"
        if any(
            str(volume).startswith(("/", "~", ".")) or "docker.sock" in str(volume) for volume in service.get("volumes", [])
        ):
            yield f"service {name}: mounts a folder of the machine"
        if service.get("network_mode") == "host" or service.get("pid") == "host":
            yield f"service {name}: is in the machine's namespaces"
        for port in service.get("ports", []):
            if not isinstance(port, str) or str(port).count(":") < 2 or str(port).startswith("0.0.0.0"):
                yield f"service {name}: port {port} is open to the network"
