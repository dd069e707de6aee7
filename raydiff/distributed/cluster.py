"""Connect to a Ray cluster, and wait until it has room."""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path

from raydiff import credentials
from raydiff.config import ConfigError
from raydiff.placement import Node
from raydiff.plan.clusters import cluster_nodes

_PATIENCE = 20.0  # seconds that an autoscaling cluster gets to show a node
_POLL = 0.5  # seconds between looks at it
_ENVIRONMENT = {
    "RAY_worker_niceness": "0",  # Ray's own 15 starves workers on a shared machine
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths in a recipe stay true on the workers
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "240",
}


def start(dashboard: bool = False) -> None:
    """Connect to the cluster that RAY_ADDRESS names, or start a local one, guarded by a token, unless that is done.

    `dashboard`: a local one answers the state API, which frees what a sweep's stopped trials leave.
    Raises ConfigError when that cluster does not let us in.
    """
    _guard()
    import ray

    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        credentials.refuse(address, "RAY_ADDRESS")
        local = {} if address else {"include_dashboard": dashboard}
        try:
            ray.init(log_to_driver=False, logging_level="ERROR", **local)
        except ConnectionError as error:
            raise ConfigError(
                f"RAY_ADDRESS = {address!r}: {error}. Either no head listens there, or it wants a token, as `ray start` makes"
                " it: set RAY_AUTH_MODE=token, and give this machine the head's ~/.ray/auth_token"
            ) from None


def _guard() -> None:
    """Let a Ray that is started here, which listens on every interface of the machine, ask for a token.

    Ray reads the mode when it is imported: who has done that before has chosen.
    """
    if "ray" in sys.modules or os.environ.get("RAY_ADDRESS") or "RAY_AUTH_MODE" in os.environ:
        return
    os.environ["RAY_AUTH_MODE"] = "token"
    given = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    if not given and not Path("~/.ray/auth_token").expanduser().exists():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # else Ray makes that file, for all to read


def check_fits(faults: Callable[[list[Node]], list[str]], patience: float = _PATIENCE) -> None:
    """Raise ConfigError, with `faults` of the nodes, when there are any and still are after `patience` seconds."""
    end = time.monotonic() + patience
    while found := faults(cluster_nodes()):
        if time.monotonic() > end or not os.environ.get("RAY_ADDRESS"):  # a local cluster does not grow
            raise ConfigError("\n".join(found))
        time.sleep(_POLL)
