"""Hand a run to the job server of a cluster: `ray job submit`, with the checks that save a wait and an upload."""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydiff import credentials, placement
from raydiff.config import ConfigError, load
from raydiff.placement import Node

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

EXCLUDES = (
    ".env", ".netrc", ".aws", ".ssh",
    ".git", ".venv", "runs", "pictures", "mlruns", "node_modules", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache",
)  # fmt: skip
"""Names that are left out of the upload, beside what .gitignore and .rayignore name."""

_MOST = 200 * 2**20  # bytes of an upload
_STOP = 600  # seconds that a stopped job gets for its last checkpoint; Ray's own 3 are for nothing


def submit(
    recipe: Path,
    overrides: Sequence[str] = (),
    *,
    resume: str | None = None,
    address: str | None = None,
    working_dir: Path | None = Path(),
    grows: bool = False,
    follow: bool = True,
    own_code: bool = True,
) -> int:
    """Check a run against a cluster, submit it there, follow its log, and return an exit code: 0, its own, or 130 if stopped.

    `address` is the job server's, None for the one that RAY_API_SERVER_ADDRESS names. `working_dir` is uploaded, None runs what
    the nodes have. On a cluster that `grows`, what has no room yet is submitted too. Without `own_code` a recipe that names
    code is refused, here and there. Raises ConfigError for a run that cannot work there, a folder that is too large, a refused
    token and a cluster of another version of Ray; ConnectionError when the job server does not answer. No argument may hold
    credentials: the dashboard shows them.
    """
    from raydiff.preflight import faults

    for field, text in {"--resume": resume, "--address": address, "--working-dir": working_dir}.items():
        credentials.refuse(text, field)
    run = load(recipe, overrides, own_code=own_code)
    if found := faults(run):
        raise ConfigError("\n".join(found))
    inside = recipe if working_dir is None else _inside(recipe, working_dir)
    server = client(address)
    if not grows and (found := placement.faults(run, nodes(server), "the cluster")):
        raise ConfigError("\n".join([*found, "a cluster that grows by itself takes it with --grows"]))
    environment: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP)}}
    if working_dir is not None:
        check_size(working_dir)
        environment |= {"working_dir": str(working_dir), "excludes": list(EXCLUDES)}
    job = server.submit_job(
        entrypoint=command(inside, overrides, resume, own_code), runtime_env=environment, metadata={"raydiff": run.name}
    )
    print(job, flush=True)
    if not follow:
        return 0
    try:
        return outcome(asyncio.run(followed(server, job)))
    except KeyboardInterrupt:
        print(f"{job} goes on: `ray job logs --follow {job}` shows it, `ray job stop {job}` stops it", file=sys.stderr)
        return 130


def command(recipe: Path, overrides: Sequence[str], resume: str | None, own_code: bool = True) -> str:
    """What the job runs, in a shell."""
    words = ["python", "-m", "raydiff.cli", "train", recipe.as_posix(), *overrides]
    return shlex.join([*words, *(["--resume", resume] if resume else []), *([] if own_code else ["--no-own-code"])])


def client(address: str | None) -> JobSubmissionClient:
    """Connected. Raises ConnectionError, or ConfigError when the token is refused and when Ray's versions differ."""
    import ray
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        server = JobSubmissionClient(address)
    except ConnectionError:
        where = address or "RAY_API_SERVER_ADDRESS"
        raise ConnectionError(f"no job server answers at {where}: give --address http://HEAD:8265") from None
    except AuthenticationError as error:
        raise ConfigError(f"the job server refuses this token: {error}") from None
    there = server._do_request("GET", "/api/version").json()["ray_version"]
    if there != ray.__version__:
        raise ConfigError(f"the cluster runs Ray {there}, and this is Ray {ray.__version__}: install ray=={there} here")
    return server


def nodes(server: JobSubmissionClient) -> list[Node]:
    """The nodes that are alive, by the dashboard's state API."""
    from ray.util.state import list_nodes

    found = list_nodes(
        address=server.get_address(),
        filters=[("state", "=", "ALIVE")],
        detail=True,
        limit=10_000,
        raise_on_missing_output=False,
    )
    return [Node(n.resources_total.get("CPU", 0), n.resources_total.get("GPU", 0), n.labels or {}) for n in found]


def check_size(folder: Path, most: int = _MOST) -> None:
    """Raise ConfigError, with the largest files, when an upload of this folder would be larger than `most` bytes."""
    from ray._private.runtime_env import packaging  # what is left out is Ray's to say

    files: list[tuple[int, Path]] = []

    def add(path: Path) -> None:
        if path.is_file() and not path.is_symlink():
            files.append((path.stat().st_size, path.relative_to(folder.absolute())))

    root = folder.absolute()
    packaging._dir_travel(root, [packaging._get_excludes(root, list(EXCLUDES))], add, include_gitignore=True)
    if (total := sum(size for size, _ in files)) > most:
        largest = "".join(f"\n  {_mib(size):>12}  {path}" for size, path in sorted(files, reverse=True)[:5])
        raise ConfigError(
            f"{root} is {_mib(total)}, and an upload may be {_mib(most)}: name what the run does not need in .rayignore, or"
            f" give another --working-dir; --no-upload runs what the nodes have. Its largest files:{largest}"
        )


async def followed(server: JobSubmissionClient, job: str) -> JobDetails:
    """Print a job's log until the job has ended."""
    shown = 0
    while True:
        place = 0
        async for text in server.tail_job_logs(job):  # from the start, each time
            place += len(text)
            if place > shown:
                print(text[-(place - shown) :], end="", flush=True)
                shown = place
        info = server.get_job_info(job)
        if info.status.is_terminal():
            return info
        await asyncio.sleep(2)


def outcome(info: JobDetails) -> int:
    """An ended job's exit code; why it failed is printed where its own log does not say so."""
    if info.status == "SUCCEEDED":
        return 0
    if info.status == "STOPPED":
        print(f"{info.submission_id} was stopped", file=sys.stderr)
        return 130
    if not info.driver_exit_code:
        print(f"{info.submission_id} failed: {info.message}", file=sys.stderr)
    return info.driver_exit_code or 1


def _inside(recipe: Path, working_dir: Path) -> Path:
    """The recipe's path from the folder that is uploaded."""
    try:
        return recipe.resolve().relative_to(working_dir.resolve())
    except ValueError:
        raise ConfigError(f"{recipe} is not in {working_dir.resolve()}, which is uploaded: give --working-dir") from None


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
