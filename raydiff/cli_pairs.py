"""`raydiff pairs`: datasets of labelled pairs for methods with source = "dataset"."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from raydiff.config import Run
    from raydiff.data.latents import Latents

app = typer.Typer(help="Make datasets of labelled pairs, and encode them before training.", no_args_is_help=True)

To = Annotated[Path, typer.Option(metavar="FOLDER", help="Where the pairs go; the same command continues it.")]
MaxBadRows = Annotated[int, typer.Option(min=0, help="Rows that may be left out before it stops.")]
Margin = Annotated[float, typer.Option(min=0, help="Rewards that differ by no more are a tie; ties are dropped.")]
Split = Annotated[str | None, typer.Option(metavar="NAME", help='Split to use of a folder with several, or "all".')]
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A run file: TOML, or the run.json of an earlier run.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="PATH=VALUE...", help="Fields to set anew.")]
Device = Annotated[str | None, typer.Option(help="Default: cuda where there is one.")]


def _no_own_code(context: typer.Context, allowed: bool) -> bool:
    """Until the command has ended, whatever it reads."""
    if not allowed:
        from raydiff.config import no_own_code

        context.with_resource(no_own_code())
    return allowed


OwnCode = Annotated[
    bool,
    typer.Option(
        "--own-code/--no-own-code",
        callback=_no_own_code,
        help="Without: refuse what names code, as a kind or a runtime_env.",
    ),
]


class Ties(StrEnum):
    drop = "drop"
    keep = "keep"


class Which(StrEnum):
    best_worst = "best_worst"
    all = "all"


class Rule(StrEnum):
    total = "total"
    pareto = "pareto"


Pairs = Annotated[Which, typer.Option(help="A prompt's best picture against its worst, or every two.")]
Rules = Annotated[Rule, typer.Option(help="The larger number wins; or no reward smaller and one larger, else a tie.")]


@app.command()
def from_pickapic(
    shards: Annotated[list[Path], typer.Argument(metavar="SHARDS...", help="Pick-a-Pic's Parquet files, or folders of them.")],
    to: To = Path("pairs.parquet"),
    ties: Annotated[Ties, typer.Option(help="Ties are dropped, or kept with label 0.5; training leaves them out.")] = Ties.drop,
    split: Split = None,
    rows_per_file: Annotated[int, typer.Option(min=1, help="Rows of a shard that make a file.")] = 2048,
    max_bad_rows: MaxBadRows = 100,
) -> None:
    """Convert Pick-a-Pic's own shards, a few rows at a time."""
    from raydiff.data.pickapic import convert

    _tell_splits(shards, "SHARDS")
    options: dict[str, Any] = {"rows_per_file": rows_per_file, "max_bad_rows": max_bad_rows, "split": split}
    typer.echo(convert(shards, to, ties=ties.value, **options))


@app.command()
def from_scores(
    scored: Annotated[Path, typer.Argument(metavar="SCORED", help="Parquet of scored pictures, as `raydiff score` leaves it.")],
    to: To = Path("pairs.parquet"),
    reward: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Reward that labels; several with pareto.")] = None,
    pairs: Pairs = Which.best_worst,
    rule: Rules = Rule.total,
    min_margin: Margin = 0.0,
    split: Split = None,
    max_bad_rows: MaxBadRows = 100,
) -> None:
    """Pair pictures of the same prompt by their rewards."""
    from raydiff.data import feedback

    labelling = feedback.Labelling(pairs.value, rule.value, min_margin)
    _tell_splits([scored], "SCORED")
    typer.echo(feedback.from_scores(scored, to, reward or [], labelling, max_bad_rows=max_bad_rows, split=split))


@app.command()
def from_rewards(
    recipe: RecipeFile,
    overrides: Overrides = None,
    to: To = Path("pairs.parquet"),
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="FOLDER[:WEIGHT]", help="May be repeated: the weighted adapters are summed.")
    ] = None,
    n: Annotated[int, typer.Option("--n", "-n", min=2, help="Pictures of each prompt.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Seed of each prompt's first picture; the next ones count up.")] = 0,
    pairs: Pairs = Which.best_worst,
    rule: Rules = Rule.total,
    min_margin: Margin = 0.0,
    max_bad_rows: MaxBadRows = 100,
    device: Device = None,
    own_code: OwnCode = True,
) -> None:
    """AI feedback: draw the recipe's training prompts with its model, and label by its rewards.

    In this process. On a cluster: `raydiff generate --to x.parquet`, `raydiff score`, then `raydiff pairs from-scores`.
    """
    from raydiff.config import load

    run = load(recipe, overrides or ())

    from raydiff.data import feedback
    from raydiff.generate import Adapter

    labelling = feedback.Labelling(pairs.value, rule.value, min_margin)
    adapters = [Adapter.parse(text) for text in adapter or []]
    options: dict[str, Any] = {"adapters": adapters, "n": n, "seed": seed, "max_bad_rows": max_bad_rows}
    typer.echo(feedback.from_rewards(run, to, labelling, device=device or _device(), **options))


@app.command()
def to_label(
    recipe: RecipeFile,
    overrides: Overrides = None,
    to: To = Path("to_label.parquet"),
    device: Device = None,
    own_code: OwnCode = True,
) -> None:
    """Draw what D3PO with method.source = "labels" will train on, for people to fill in the column label: 1, 0.5 or 0."""
    from raydiff.config import load
    from raydiff.data import feedback

    typer.echo(feedback.to_label(load(recipe, overrides or ()), to, device=device or _device()))


@app.command()
def encode(
    recipe: RecipeFile,
    overrides: Overrides = None,
    device: Device = None,
    ray: Annotated[bool, typer.Option("--ray", help="On a Ray cluster, by the recipe's [pools.generate].")] = False,
    own_code: OwnCode = True,
) -> None:
    """Encode a recipe's pairs into latents ahead of training, which otherwise does so when it starts."""
    from raydiff.config import load
    from raydiff.preflight import faults

    run = load(recipe, overrides or ())
    if not run.method.labelled:
        raise ValueError('method.source is not "dataset": this run trains on no pairs')
    if found := faults(run):
        raise ValueError("\n".join(found))
    _tell_splits([str(run.pairs.path)], "pairs.path")
    if ray and device is not None:
        raise ValueError(f"--device {device}: on Ray, pools.generate.num_gpus says it; leave --device or --ray out")
    if ray:
        from raydiff.distributed.encode_batch import encode as on_pool

        latents = on_pool(run)
    else:
        latents = _encoded_here(run, device or _device())
    typer.echo(f"{latents.folder}: {len(latents)} pairs")


def _encoded_here(run: Run, device: str) -> Latents:
    from rich.console import Console
    from rich.progress import Progress

    from raydiff.data.latents import prepare

    model = run.model.build(device)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("encoding", total=None)
        return prepare(
            run.pairs, model, run.evaluate.batch, told=lambda done, pieces: progress.update(bar, completed=done, total=pieces)
        )


def _tell_splits(paths: Sequence[str | Path], name: str) -> None:
    """Say what is in a folder of splits, whichever is taken."""
    from raydiff.data.files import told
    from raydiff.data.preferences import rows_by_split

    if rows := rows_by_split(paths, name):
        typer.echo(f"{name} holds {told(rows)}", err=True)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
