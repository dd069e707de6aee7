"""What there is to run on: this machine, the cluster that Ray knows, one behind a job server, or one that a file describes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raydiff import credentials
from raydiff.config import ConfigError
from raydiff.placement import Node


@dataclass(frozen=True)
class Machine:
    """What there is to run on."""

    where: str
    nodes: tuple[Node, ...]
    memory: int | None = None  # bytes of the whole machine; None: not known
    gpu_memory: int | None = None  # bytes of one GPU
    at_first: tuple[Node, ...] | None = None  # the nodes that a cluster starts with, which then grows

    @property
    def cpus(self) -> float:
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        return sum(node.gpus for node in self.nodes)


def here() -> Machine:
    """The cluster that RAY_ADDRESS names, or this machine."""
    if address := os.environ.get("RAY_ADDRESS"):
        credentials.refuse(address, "RAY_ADDRESS")
        import ray

        with contextlib.ExitStack() as stack:
            if not ray.is_initialized():
                ray.init(address=address, logging_level="ERROR", log_to_driver=False)
                stack.callback(ray.shutdown)
            return Machine(f"the cluster at {address}", tuple(cluster_nodes()))
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = torch.cuda.device_count()
    return Machine(
        where="this machine",
        nodes=(Node(cpus, gpus),),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpu_memory=torch.cuda.get_device_properties(0).total_memory if gpus else None,
    )


def cluster_nodes() -> list[Node]:
    """The nodes of the Ray cluster that is connected."""
    import ray

    return [
        Node(node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0), node["Labels"])
        for node in ray.nodes()
        if node["Alive"]
    ]


def at(address: str) -> Machine:
    """The cluster of a job server, http://HEAD:8265. Raises as `submit.client` does."""
    from raydiff import submit

    return Machine(f"the cluster at {address}", tuple(submit.nodes(submit.client(address))))


def of_file(path: Path) -> Machine:
    """The cluster that a file of KubeRay (RayCluster, RayJob) or of `ray up` describes, at its largest.

    Raises ConfigError for a file that is neither, and for a group whose CPUs it does not tell.
    """
    import yaml

    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--cluster {path}: {error}") from None
    if isinstance(config, dict) and str(config.get("apiVersion", "")).startswith("ray.io/"):
        groups = [*_kuberay(config["spec"].get("rayClusterSpec", config["spec"]), path)]
    elif isinstance(config, dict) and "available_node_types" in config:
        groups = [*_ray_up(config, path)]
    else:
        raise ConfigError(f"--cluster {path}: neither a RayCluster or RayJob of KubeRay nor a file of `ray up`")
    least, most = ([node for node, *counts in groups for _ in range(counts[i])] for i in (0, 1))
    return Machine(f"{path.name}'s cluster", tuple(most), at_first=None if least == most else tuple(least))


def _kuberay(spec: Mapping[str, Any], path: Path) -> Iterator[tuple[Node, int, int]]:
    """Each worker group's node, and how many there are at first and at most. The head's CPUs are those that its Ray offers."""
    for group in spec.get("workerGroupSpecs", []):
        limits = group["template"]["spec"]["containers"][0].get("resources", {}).get("limits", {})
        cpus, gpus = _number(limits.get("cpu"), path, group["groupName"]), float(limits.get("nvidia.com/gpu", 0))
        first = int(group.get("replicas", 1))
        yield Node(cpus, gpus, group.get("labels", {})), first, int(group.get("maxReplicas", first))


def _ray_up(config: Mapping[str, Any], path: Path) -> Iterator[tuple[Node, int, int]]:
    for name, kind in config["available_node_types"].items():
        resources, head = kind.get("resources", {}), name == config.get("head_node_type")
        node = Node(_number(resources.get("CPU"), path, name), float(resources.get("GPU", 0)), kind.get("labels", {}))
        yield node, *((1, 1) if head else (int(kind.get("min_workers", 0)), int(kind.get("max_workers", 0))))


def _number(cpus: Any, path: Path, group: str) -> float:
    """CPUs, as Kubernetes writes them too: "500m" is half of one."""
    if cpus is None:
        raise ConfigError(f"--cluster {path}: group {group!r} does not tell its CPUs; add them to its resources")
    text = str(cpus)
    return float(text.removesuffix("m")) / (1000 if text.endswith("m") else 1)
