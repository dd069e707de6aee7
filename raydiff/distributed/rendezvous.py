"""Where the workers of a run find each other: on the cluster's own address, at a port that a firewall can name.

What they send are pickles, and nothing asks for a token, so whoever reaches these ports runs code on the trainers. Ray Train's
own set-up lets torch's store listen on every interface of the node, at a port that the kernel picks.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import psutil
import ray
import torch.distributed as dist
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend

_served: dist.TCPStore | None = None  # of the process that is worker 0


@dataclass
class Rendezvous(TorchConfig):
    """Ray Train's set-up of torch.distributed, which listens on the node's address alone, at one of `ports`, first and last."""

    ports: tuple[int, int] = (29500, 29599)

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


class _Backend(_TorchBackend):  # ends as Ray's own does
    def on_start(self, worker_group: ray.train.WorkerGroup, backend_config: Rendezvous) -> None:
        address = worker_group.execute_single(0, serve, backend_config.ports)
        worker_group.execute(_set_torch_distributed_env_vars)
        size = len(worker_group)
        joining = [
            worker_group.execute_single_async(
                rank, join, address, rank, size, backend_config.backend, timedelta(seconds=backend_config.timeout_s)
            )
            for rank in range(size)
        ]
        ray.get(joining)


def serve(ports: tuple[int, int], host: str | None = None) -> tuple[str, int]:
    """Start the store of a run in this process. Returns its address: `host`, by default the node's in the cluster, and port.

    Raises OSError when all ports are taken.
    """
    global _served
    host = host or ray.util.get_node_ip_address()
    listener = listening(host, ports)
    port = listener.getsockname()[1]
    _served = dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    return host, port


def listening(host: str, ports: tuple[int, int]) -> socket.socket:
    """A socket that is bound to an address, at the first port that is free. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in range(ports[0], ports[1] + 1):
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen()  # two may be bound to one port, until one of them listens
            return listener
        except OSError as error:
            listener.close()
            taken = error
    raise OSError(
        f"pools.train.ports = {ports[0]}-{ports[1]}: {host} takes none of them ({taken.strerror}); give more ports, or others"
    )


def join(address: tuple[str, int], rank: int, size: int, backend: str, timeout: timedelta, host: str | None = None) -> None:
    """Make this process the worker `rank` of `size`. Collective. `host` is its own address, by default the node's in the
    cluster."""
    interface = interface_of(host or ray.util.get_node_ip_address())
    if interface:
        # Else gloo takes the address that the host's name has, and NCCL the first interface that is up.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # this one, and none whose name begins so
    if "TORCH_NCCL_BLOCKING_WAIT" not in os.environ:
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # as Ray sets it: a hung worker must not hang the others
    store = _served if rank == 0 else dist.TCPStore(*address, is_master=False, timeout=timeout)
    assert store is not None, "serve() comes first"
    store.set_timeout(timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def interface_of(host: str) -> str | None:
    """The name of the network interface that has an address; None when none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.partition("%")[0] == host for address in addresses):
            return str(name)
    return None
