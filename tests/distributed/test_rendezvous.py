"""What the workers of a run listen on, as the kernel tells it; without Ray."""

import multiprocessing
import os
import socket
import subprocess
import sys
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import ValidationError

pytest.importorskip("ray")

import ray
import torch.distributed as dist

from raydiff.config import TrainPool
from raydiff.distributed import rendezvous
from raydiff.distributed.ranks import Ranks
from raydiff.distributed.rendezvous import Rendezvous, interface_of, listening

ADDRESSES = {name: [a.address for a in found if a.family == socket.AF_INET] for name, found in psutil.net_if_addrs().items()}
OUTER = [found[0] for found in ADDRESSES.values() if found and not found[0].startswith("127.")]
HOSTS = ["127.0.0.1", *OUTER[:1]]


def worker(rank: int, host: str, ports: tuple[int, int], mine: Connection) -> None:
    """One of two workers, as a run starts them: tells its address, meets the other, and tells what it listens on."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.pop(name, None)
    if rank == 0:
        mine.send(rendezvous.serve(ports, host))
    rendezvous.join(mine.recv(), rank, 2, "gloo", timedelta(seconds=60), host)
    ranks = Ranks(60)
    assert [told["rank"] for told in ranks.gather({"rank": rank, "said": "x" * 10_000})] == [0, 1]
    mine.send([tuple(c.laddr) for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN])
    dist.barrier(ranks.group)
    dist.destroy_process_group()


@pytest.mark.parametrize("host", HOSTS)
def test_workers_listen_on_one_address_and_the_first_free_port(host: str) -> None:
    fork = multiprocessing.get_context("fork")  # they need not import torch again
    with listening(host, (29700, 29799)) as first:
        port, mine = first.getsockname()[1], {tuple(first.getsockname())}  # which a fork holds too
        pipes = [fork.Pipe() for _ in range(2)]
        workers = [
            fork.Process(target=worker, args=(rank, host, (port, port + 9), pipes[rank][1]), daemon=True) for rank in range(2)
        ]
        for process in workers:
            process.start()
        try:
            assert pipes[0][0].poll(60)
            address = pipes[0][0].recv()
            for ours, _ in pipes:
                ours.send(address)
            assert all(ours.poll(60) for ours, _ in pipes)
            told = [ours.recv() for ours, _ in pipes]
        finally:
            for process in workers:
                process.join(20)
                process.kill()
    assert [process.exitcode for process in workers] == [0, 0]
    assert address[0] == host
    assert port < address[1] <= port + 9  # the first one is taken
    assert {at for of_one in told for at, _ in set(of_one) - mine} == {host}
    assert [tuple(address) in of_one for of_one in told] == [True, False]
    assert all(len(set(of_one) - mine) >= 2 for of_one in told)  # gloo's own, of both groups


def test_all_ports_taken() -> None:
    with listening("127.0.0.1", (29700, 29799)) as first:
        port = first.getsockname()[1]
        with pytest.raises(OSError, match=rf"pools.train.ports = {port}-{port}: 127.0.0.1 takes none of them"):
            listening("127.0.0.1", (port, port))
    listening("127.0.0.1", (port, port)).close()
    with pytest.raises(OSError, match="203.0.113.7 takes none of them"):  # not this machine's
        listening("203.0.113.7", (port, port))


def test_interfaces_by_their_address() -> None:
    for name, found in ADDRESSES.items():
        assert all(interface_of(address) == name for address in found)
    assert interface_of("203.0.113.7") is None
    assert interface_of("127.0.0.1") in ("lo", "lo0")


def test_the_ports_of_a_run() -> None:
    assert TrainPool().ports == Rendezvous().ports
    assert TrainPool(ports=(2000, 2000)).ports == (2000, 2000)
    for wrong in ((80, 90), (3000, 2000), (60000, 70000), (-1, 3000)):
        with pytest.raises(ValidationError, match="between 1024 and 65535"):
            TrainPool(ports=wrong)


def _listens() -> dict[str, Any]:
    """What Ray Train calls on each worker of the next test."""
    mine = psutil.Process().net_connections("inet")
    told = {"rank": dist.get_rank(), "at": [tuple(c.laddr) for c in mine if c.status == psutil.CONN_LISTEN]}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, told)
    return {"told": everyone, "host": ray.util.get_node_ip_address()}


@pytest.mark.ray
def test_ray_train_meets_there(cluster: str, tmp_path: Path) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        _listens,
        torch_config=Rendezvous(backend="gloo", timeout_s=60, ports=(29800, 29899)),
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(name="meets", storage_path=str(tmp_path)),
    )
    found = trainer.fit().return_value
    assert [one["rank"] for one in found["told"]] == [0, 1]
    at = [[(host, port) for host, port in one["at"] if 29800 <= port <= 29899] for one in found["told"]]
    assert [{host for host, _ in one} for one in at] == [{found["host"]}, set()]


ENTER = "import sys, ray; ray.init(address=sys.argv[1], logging_level='ERROR', log_to_driver=False); print('entered')"


@pytest.mark.ray
def test_a_ray_that_is_started_here_asks_for_a_token(tmp_path: Path) -> None:
    code = "from raydiff.distributed import cluster; cluster.start(); import ray; print(ray.get(ray.put('works')))"
    code += "; print(ray.get_runtime_context().gcs_address, flush=True); input()"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_AUTH", "RAY_ADDRESS"))} | {
        "HOME": str(tmp_path)
    }
    started = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert started.stdout is not None
        assert started.stdout.readline() == "works\n"
        address = started.stdout.readline().strip()
        quick = environment | {"RAY_NUM_REDIS_GET_RETRIES": "2"}  # Ray asks again, a second each time
        strangers = [
            subprocess.Popen(
                [sys.executable, "-c", ENTER, address],
                env=quick | given,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for given in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64})
        ]
        for stranger in strangers:
            told, error = stranger.communicate(timeout=120)
            assert (stranger.returncode != 0, told) == (True, "")
            assert "InvalidAuthToken" in error
    finally:
        started.communicate("\n", timeout=60)
    assert not (tmp_path / ".ray/auth_token").exists()
