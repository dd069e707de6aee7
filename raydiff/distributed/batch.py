"""Many pictures through a pool of actors, as a dataset that can be stopped and gone on with.

A Ray Data row is a ticket: a range of input rows, of which its actor makes whole output files, each named by its own range. The
actors read and write for themselves, so nothing but them claims a resource, no picture crosses the object store, and whatever
is redone (a killed actor, a lost node, a second call) can only write the same bytes under the same name.

    rows-000000000000-000000000256.parquet   256 input rows' worth, less those that could not be used
    _raydiff/dataset.json                    what the dataset was made from, written first: a second call must say the same
    _raydiff/lease.json                      which call works on it now: a second one must wait
    _raydiff/bad_rows.jsonl                  file, row and reason of each input row that was left out

Readers of Parquet folders leave out names with "_" in front.
"""

from __future__ import annotations

import json
import logging
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from raydiff import __version__, placement
from raydiff.config import ConfigError, Pool
from raydiff.data import pieces
from raydiff.distributed import cluster, lease
from raydiff.distributed.lease import Lease
from raydiff.distributed.progress import Progress, duration
from raydiff.distributed.storage import Folder
from raydiff.plan.clusters import cluster_nodes

HIDDEN = lease.DATASET
CONTENTS = pieces.CONTENTS
ABOUT, BAD_ROWS, LEASE = f"{HIDDEN}/dataset.json", f"{HIDDEN}/bad_rows.jsonl", f"{HIDDEN}/{lease.FILE}"
_RETRIES = 2  # of a ticket whose worker raised or died
_EVERY = 10.0  # seconds between lines where there is no terminal


class BatchError(ValueError):
    """A dataset that cannot be finished; what is finished stays, and the same call goes on from there."""


@dataclass(frozen=True)
class BadRow:
    """An input row that was left out."""

    file: str
    row: int  # in that file, from 0
    reason: str


@dataclass(frozen=True)
class Output:
    """The folder of a dataset, as its actors see it. `index` is where finished ranges show."""

    uri: str
    index: str = ""  # folder inside, "" is the dataset's own
    suffix: str = ".parquet"

    @cached_property
    def folder(self) -> Folder:
        return Folder(self.uri)

    def name(self, start: int, stop: int) -> str:
        return f"rows-{start:012d}-{stop:012d}{self.suffix}"

    def path(self, start: int, stop: int) -> str:
        return f"{self.index}/{self.name(start, stop)}".lstrip("/")

    def bad_path(self, start: int, stop: int) -> str:
        return f"{HIDDEN}/bad/rows-{start:012d}-{stop:012d}.jsonl"

    def has(self, start: int, stop: int) -> bool:
        return self.folder.size(self.path(start, stop)) is not None

    def write(self, start: int, stop: int, data: bytes, bad: Sequence[BadRow]) -> None:
        """Finish a range. Its bad rows go first: where the range's file is, they are."""
        if bad:
            self.folder.write(self.bad_path(start, stop), _lines(asdict(row) for row in bad))
        self.folder.write(self.path(start, stop), data)

    def bad(self, start: int, stop: int) -> list[BadRow]:
        """The bad rows of a finished range."""
        path = self.bad_path(start, stop)
        return [] if self.folder.size(path) is None else [BadRow(**json.loads(s)) for s in self.folder.read(path).splitlines()]


class Worker:
    """Makes the files of a ticket that are not there yet. Built once an actor."""

    output: Output

    def pieces(self, ticket: Mapping[str, Any]) -> Iterator[tuple[int, int, Any]]:
        """(start, stop, rows) of each output file of a ticket, in order."""
        raise NotImplementedError

    def make(self, start: int, rows: Any, ticket: Mapping[str, Any]) -> tuple[bytes, list[BadRow]]:
        """The file of one range, and the rows that it leaves out."""
        raise NotImplementedError

    def answer(self, ticket: Mapping[str, Any]) -> int:
        """Make them. Returns how many of the ticket's rows are left out."""
        left_out = 0
        for start, stop, rows in self.pieces(ticket):
            if self.output.has(start, stop):
                bad = self.output.bad(start, stop)
            else:
                data, bad = self.make(start, rows, ticket)
                self.output.write(start, stop, data, bad)
            left_out += len(bad)
        return left_out


class Actor:
    """A Worker as Ray Data sees it. What a worker raises comes back as a row: Ray Data would keep its type and message back."""

    def __init__(self, kind: type, *arguments: Any) -> None:
        self.build, self.worker = lambda: kind(*arguments), None

    def __call__(self, tickets: Mapping[str, Any]) -> dict[str, list[Any]]:
        ticket = {key: column[0] for key, column in tickets.items()}
        bad, error, trace = 0, "", ""
        try:
            self.worker = self.worker or self.build()  # what fails here would fail again
            bad = self._retried(ticket)
        except Exception as failure:
            error, trace = f"{type(failure).__name__}: {failure}", traceback.format_exc()
        return {"rows": [int(ticket["stop"] - ticket["start"])], "bad": [bad], "error": [error], "trace": [trace]}

    def _retried(self, ticket: Mapping[str, Any]) -> int:
        """Answer, with some patience for a store or a server that is away."""
        assert self.worker is not None
        for attempt in range(_RETRIES):
            try:
                return self.worker.answer(ticket)
            except Exception:
                time.sleep(2**attempt)
        return self.worker.answer(ticket)


@dataclass(frozen=True)
class Job:
    """A dataset to make."""

    what: str  # "generate" or "score"
    output: Output
    made_from: dict[str, Any]  # all that decides what the rows are
    tickets: list[dict[str, Any]]  # start, stop and what the worker needs, in order; ranges of files divide them
    rows_per_file: int  # input rows
    worker: type
    arguments: tuple[Any, ...]  # of the worker, before its device
    pool: Pool = field(default_factory=Pool)
    max_bad_rows: int = 100
    runtime_env: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return int(self.tickets[-1]["stop"])

    def ranges(self, ticket: Mapping[str, Any]) -> list[tuple[int, int]]:
        return split(ticket["start"], ticket["stop"], self.rows_per_file)


@dataclass(frozen=True)
class Summary:
    """A finished dataset."""

    folder: str
    rows: int  # of the input
    bad: int  # of these, left out
    files: int
    made: int  # files made by this call
    seconds: float  # of this call's work

    def __str__(self) -> str:
        there = f", {self.files - self.made} of them from an earlier call" if self.made < self.files else ""
        left = f"; {self.bad} rows left out, see {self.folder}/{BAD_ROWS}" if self.bad else ""
        return f"{self.folder}: {self.rows - self.bad} of {self.rows} rows in {self.files} files{there}{left}"


def split(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """Ranges of at most `size` rows."""
    return [(a, min(a + size, stop)) for a in range(start, stop, size)]


def check_own(output: Output) -> bool:
    """Whether the dataset was begun before. Raises ConfigError when its folder is a file or holds something else."""
    folder = output.folder
    if folder.size(ABOUT) is not None:
        return True
    if folder.is_file():
        raise ConfigError(f"--to {folder}: is a file; a dataset is a folder of files: give another name")
    if visible := [name for name in [*folder.files(), *folder.folders()] if not name.startswith(("_", "."))]:
        raise ConfigError(f"--to {folder}: holds {visible[0]!r} and no {ABOUT}; give a folder of the dataset's own")
    return False


def check_same(output: Output, made_from: Mapping[str, Any]) -> None:
    """Raise ConfigError, saying what differs, when the dataset was begun with other settings, or files of another content."""
    if not check_own(output):
        return
    if differ := pieces.differing(output.folder.read_json(ABOUT)["made_from"], made_from):
        raise ConfigError(
            f"--to {output.uri}: made from other settings: {'; '.join(differ)}. Give another folder, or these settings"
        )


@contextmanager
def claimed(output: Output, about: Mapping[str, Any]) -> Iterator[None]:
    """Inside, this call alone works on the dataset, whose own file says what it is `made_from`, before anything else is there.

    Raises ConfigError, naming the other, while another call works on it, and as `check_same` does.
    """
    check_same(output, about["made_from"])
    with Lease(output.folder, LEASE) as mine:
        mine.take()
        check_same(output, about["made_from"])  # another may have begun it since
        if output.folder.size(ABOUT) is None:
            output.folder.write_json(ABOUT, about)
        yield


def run(job: Job, begin: Callable[[], None] = lambda: None) -> Summary:
    """Make what is missing of a dataset on a Ray cluster: the one connected, that RAY_ADDRESS names, or a local one.

    `begin` writes what the workers need beside the dataset's own file. Raises ConfigError, before any actor starts, when the
    pool has no room, the folder was made from other settings, or another call works on it; BatchError when more rows than
    `max_bad_rows` are bad or a ticket fails again and again.
    """
    output, folder = job.output, job.output.folder
    check_same(output, job.made_from)
    folder.check_writable()
    claim = None
    if missing := _missing(job):
        with Progress(0) as progress:
            progress.waiting("starting Ray")
            claim = _room(job, len(missing))
    with claimed(output, {"what": job.what, "raydiff": __version__, "rows": job.rows, "made_from": job.made_from}):
        begin()
        for part in ("", HIDDEN, f"{HIDDEN}/bad"):
            folder.clear_drafts(part)
        return _made(job, claim)


def _missing(job: Job) -> list[int]:
    """Which tickets have a file that is not there."""
    there = set(job.output.folder.files(job.output.index))
    return [i for i, t in enumerate(job.tickets) if any(job.output.name(*r) not in there for r in job.ranges(t))]


def _made(job: Job, claim: placement.Claim | None) -> Summary:
    """Make what is missing of a dataset that is claimed. `claim`: of the pool, None when nothing was missing."""
    output, folder = job.output, job.output.folder
    there = set(folder.files(output.index))
    missing = _missing(job)
    ranges = [job.ranges(ticket) for ticket in job.tickets]
    every, tickets = [r for files in ranges for r in files], [job.tickets[i] for i in missing]
    start, seconds = time.monotonic(), 0.0
    with Progress(0) as progress:
        try:
            bad = len(_bad(output, [r for i in set(range(len(ranges))) - set(missing) for r in ranges[i]]))
            _within(bad, job)
            if missing:
                _follow(job, claim or _room(job, len(missing)), tickets, bad, progress)
                seconds = time.monotonic() - start
        except KeyboardInterrupt:
            progress.say(f"stopped; the same command goes on with {folder}")
            raise
        finally:
            found = _bad(output, every)
            if found:
                folder.write(BAD_ROWS, _lines(asdict(row) for row in found))
        made = sum(output.name(*r) not in there for r in every)
        summary = Summary(folder.uri, job.rows, len(found), len(every), made, seconds)
        rate = f"; {duration(seconds)}, {_rows(tickets) / seconds:.2f} rows/s" if missing else "; nothing was missing"
        progress.say(f"{summary}{rate}")
    return summary


def work(job: Job, tickets: list[dict[str, Any]], bad: int) -> None:
    """Send tickets through the pool, where the job's own worker knows where its results go. `bad` rows are known before.

    Raises as `run` does.
    """
    with Progress(0) as progress:
        progress.waiting("starting Ray")
        _follow(job, _room(job, len(tickets)), tickets, bad, progress)


def _room(job: Job, tickets: int) -> placement.Claim:
    """Connect to the cluster. Returns what the pool claims there; more actors than tickets would find no work."""
    cluster.start()
    pool = job.pool.model_copy(update={"replicas": min(job.pool.replicas, tickets)})

    def claim(nodes: list[placement.Node]) -> placement.Claim:
        return placement.claim(job.what, pool, nodes, options=True)

    cluster.check_fits(lambda nodes: placement.no_room([claim(nodes)], nodes, "the cluster"))
    return claim(cluster_nodes())


def _follow(job: Job, claim: placement.Claim, tickets: list[dict[str, Any]], bad: int, progress: Progress) -> None:
    """Send the tickets through the pool and show how it goes."""
    progress.waiting(f"loading weights into {claim.replicas} actors")
    done, total, first, said = 0, _rows(tickets), time.monotonic(), time.monotonic()
    for answer in _answers(job, claim, tickets):
        if answer["error"]:
            failure = _failed(job, answer["error"])
            failure.add_note(answer["trace"])
            raise failure
        done, bad = done + int(answer["rows"]), bad + int(answer["bad"])
        _within(bad, job)
        rate = done / (time.monotonic() - first)
        left = f"{bad} left out  " if bad else ""
        line = f"{job.what}  {done} of {total} rows  {left}{rate:.2f} rows/s  {duration((total - done) / rate)} left"
        progress.waiting(line)
        if not progress.live and time.monotonic() - said > _EVERY:
            said = time.monotonic()
            progress.say(line)


def _answers(job: Job, claim: placement.Claim, tickets: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What the pool says of each ticket, in the order in which they are done."""
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext
    from ray.exceptions import RayError

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it tells of our own errors before we do
    context = DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # a ticket may take hours
    context.issue_detectors_config.detectors = []  # they take a long ticket for a hanging one
    with DataContext.current(context), warnings.catch_warnings():
        # Ray 2.60 names no other way to bound retries, and without a bound a deadly ticket would be tried for ever.
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        data = ray.data.from_items(tickets, override_num_blocks=len(tickets)).map_batches(
            Actor,
            fn_constructor_args=(job.worker, *job.arguments, "cuda" if claim.gpus else "cpu"),
            batch_size=1,
            # One in flight: a ticket takes minutes, and would wait behind another while an actor is free.
            compute=ActorPoolStrategy(size=claim.replicas, max_tasks_in_flight_per_actor=1),
            num_cpus=claim.cpus,
            num_gpus=claim.gpus or None,
            label_selector=dict(claim.labels) or None,
            runtime_env=job.runtime_env or None,
            # Any number of lost actors, but a ticket that kills each of them ends it.
            max_restarts=-1,
            max_task_retries=_RETRIES,
        )
        try:
            for batch in data.iter_batches(batch_size=None, prefetch_batches=0):
                yield from ({k: batch[k][i] for k in batch} for i in range(len(batch["rows"])))
        except RayError as error:
            raise _failed(job, f"{type(error).__name__}: {error}") from error


def _failed(job: Job, why: str) -> BatchError:
    return BatchError(f"{job.what}: {why}\nWhat is finished stays in {job.output.uri}; the same command goes on from there")


def _within(bad: int, job: Job) -> None:
    if bad > job.max_bad_rows:
        raise BatchError(
            f"--max-bad-rows {job.max_bad_rows}: already {bad} rows cannot be used; {job.output.uri}/{BAD_ROWS} lists them with"
            " the reasons. Mend the input, or allow more: the same command then goes on from there"
        )


def _bad(output: Output, ranges: Iterable[tuple[int, int]]) -> list[BadRow]:
    """The bad rows of ranges, in order. One listing of the folder tells which have any."""
    listed = set(output.folder.files(f"{HIDDEN}/bad"))
    return [row for r in sorted(ranges) if output.bad_path(*r).rpartition("/")[2] in listed for row in output.bad(*r)]


def _rows(tickets: Iterable[Mapping[str, Any]]) -> int:
    return sum(ticket["stop"] - ticket["start"] for ticket in tickets)


def _lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
