"""The command line. Heavy imports stand inside the commands, so that help and a typo in a recipe answer at once."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raydiff import cli_pairs

if TYPE_CHECKING:
    from raydiff.config import Run, Sampler
    from raydiff.models.base import ModelConfig

app = typer.Typer(
    help="Reward and preference fine-tuning of text-to-image diffusion models, on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_pairs.app, name="pairs")

Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="A run file: TOML, or the run.json of an earlier run.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="PATH=VALUE...", help="Fields to set anew, e.g. method.k=2 train.updates=20.")
]
_EXTRA = ("ray", "deepspeed", "mlflow", "pyarrow", "matplotlib")  # of the extra "jobs"


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    resume: Annotated[str | None, typer.Option(metavar="NAME", help="Go on with a run that was stopped.")] = None,
    local: Annotated[bool, typer.Option("--local", help="In this process, without Ray.")] = False,
) -> None:
    """Fine-tune a model: on the Ray cluster that RAY_ADDRESS names, or on one that is started here."""
    from raydiff.config import load

    run = load(recipe, overrides or ())
    if local and resume:
        raise ValueError("--resume needs checkpoints, and --local makes none: leave one of them out")
    if local:
        _preflight(run)
        _train_here(run)
    else:
        import raydiff.distributed.launch

        raydiff.distributed.launch.train(run, resume=resume)


@app.command()
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="More prompts: .txt, one a line, or .parquet.")] = None,
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the pictures go.")] = Path("pictures"),
    model: Annotated[str | None, typer.Option(help='Folder, hub id or "embedded", the default.')] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Take model and sampler from a run file; options here come first.")
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="FOLDER[:WEIGHT]", help="May be repeated: the weighted adapters are summed.")
    ] = None,
    lora_scale: Annotated[float, typer.Option(help="Factor on every adapter's weight.")] = 1.0,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="Pictures per prompt.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of each prompt's first picture; the next ones count up.")] = 0,
    seeds: Annotated[str | None, typer.Option(help="The seeds themselves, e.g. 1,5,8-11, in place of --n and --seed.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 turns it off.")] = None,
    spacing: Annotated[str | None, typer.Option(help="leading, trailing, linspace; none: the model's own.")] = None,
    final_alpha: Annotated[str | None, typer.Option(help="alpha-bar at the clean end; none: the model's own.")] = None,
    eta: Annotated[float | None, typer.Option(help="0 = DDIM, 1 = DDPM's noise.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures sampled at once.")] = 8,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="Default: cuda where there is one.")] = None,
) -> None:
    """Sample pictures of a model, with any mixture of adapters: each as PNG, a grid of all, and images.json."""
    texts = list(prompts or [])
    if prompts_file is not None:
        from raydiff.data.prompts import read

        texts += read(str(prompts_file), "--prompts-file")
    if not texts:
        raise ValueError('no prompt given: raydiff generate "a red cat" "a fish", or --prompts-file FILE')
    numbers = _numbers(seeds) if seeds is not None else list(range(seed, seed + n))
    given = {"steps": steps, "guidance": guidance, "spacing": spacing, "final_alpha": final_alpha, "eta": eta}
    config, sampler = _model_and_sampler(recipe, {"path": model, "dtype": dtype}, given)
    _writable(to)

    from raydiff import generate as drawing

    adapters = [drawing.Adapter.parse(text) for text in adapter or []]
    adapters = [drawing.Adapter(a.folder, a.weight * lora_scale) for a in adapters]
    drawing.check(adapters)
    pipe = drawing.pipeline(config, adapters, device or _device())
    drawn = drawing.samples(pipe, texts, numbers, sampler, batch)
    grid = drawing.write(
        _progress(drawn, len(texts) * len(numbers), "pictures"),
        to,
        model=getattr(config, "path", config.kind),
        sampler=sampler,
        adapters=adapters,
    )
    typer.echo(f"{len(texts) * len(numbers)} pictures, images.json and {grid}")


@app.command()
def plan(recipe: Recipe, overrides: Overrides = None) -> None:
    """What a run will do and need: geometry, cost, memory, files, cluster. Exit code 2 when it cannot work."""
    from raydiff.config import load

    run = load(recipe, overrides or ())

    from rich.console import Console

    from raydiff import plan as planning
    from raydiff.plan.render import render

    result = planning.plan(run, planning.machine())
    Console(highlight=False).print(render(result))
    if result.problems:
        raise typer.Exit(2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. A fault of the user's is one plain message and exit code 2; RAYDIFF_DEBUG=1 shows where it came from."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="raydiff")
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        if os.environ.get("RAYDIFF_DEBUG") == "1" or (isinstance(error, ModuleNotFoundError) and error.name not in _EXTRA):
            raise
        print(f"raydiff: {_message(error)}", file=sys.stderr)
        sys.exit(2)


def _message(error: Exception) -> str:
    from pydantic import ValidationError

    from raydiff.config import ConfigError

    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, ValidationError):
        return "\n".join(
            f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')} (got {e['input']!r})"
            for e in error.errors()
        )
    if isinstance(error, ModuleNotFoundError):
        return f'{error}; what a run on Ray needs comes with pip install "raydiff[jobs]"'
    return str(error) if _own(error) else f"{error}\nRAYDIFF_DEBUG=1 shows where this came from."


def _own(error: Exception) -> bool:
    """Whether raydiff itself raised it: then the message is written for users."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and Path(__file__).parent in Path(trace.tb_frame.f_code.co_filename).parents


def _preflight(run: Run) -> None:
    """Refuse missing files and prompts before anything heavy starts, all of them at once."""
    from raydiff.preflight import faults

    if found := faults(run):
        raise ValueError("\n".join(found))


def _train_here(run: Run) -> None:
    """`raydiff.fit` with a progress line, then run.json, metrics.jsonl, the adapter and the before/after grid."""
    import json

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from raydiff import local

    if "://" in run.storage:
        raise ValueError(f"storage = {run.storage!r}: a run with --local writes to a folder of this machine")
    folder = Path(run.storage) / f"{run.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    _writable(folder)
    (folder / "run.json").write_text(run.model_dump_json(indent=1))
    device = "cpu" if run.pools.train.num_gpus == 0 else _device()
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, transient=True) as progress, (folder / "metrics.jsonl").open("w") as log:
        bar = progress.add_task(run.name, total=run.train.updates)
        for metrics in local.fit(run, device=device, folder=folder / "adapter"):
            log.write(json.dumps(metrics) + "\n")
            log.flush()
            held_out = {k: v for k, v in metrics.items() if k.startswith("held_out/")}
            first, last = first or held_out, held_out or last
            reward = metrics.get("reward/total", metrics.get("held_out/total", 0.0))
            progress.update(bar, completed=metrics["step"], description=f"{run.name}  reward {reward:+.4f}")
    for name, value in last.items():
        typer.echo(f"{name}: {first[name]:.4f} -> {value:.4f}")
    typer.echo(f"adapter: {folder / 'adapter'}")
    if run.evaluate.grid:
        typer.echo(f"before and after: {_before_after(run, folder, device)}")


def _before_after(run: Run, folder: Path, device: str) -> Path:
    """The grid of the evaluation's first pictures without and with the trained weights."""
    from raydiff import pictures
    from raydiff.config import override
    from raydiff.session import Session

    session = Session(override(run, {"evaluate.images": min(run.evaluate.images, run.evaluate.grid)}), device)
    before = session.evaluate()
    session.model.load(folder / "adapter")
    return pictures.save(pictures.before_after(before, session.evaluate()), folder / "before_after.png")


def _model_and_sampler(recipe: Path | None, model: dict[str, Any], sampler: dict[str, Any]) -> tuple[ModelConfig, Sampler]:
    """The run file's model and sampler, or the defaults, with the options that were given; "none" is None."""
    from raydiff.config import Sampler, load
    from raydiff.models.stable_diffusion import Plugin

    run = load(recipe) if recipe is not None else None
    new_model = {k: v for k, v in model.items() if v is not None}
    new_sampler = {k: None if v == "none" else v for k, v in sampler.items() if v is not None}
    base: ModelConfig = run.model if run else Plugin()
    base_sampler = run.sampler if run else Sampler()
    return (
        type(base).model_validate(base.model_dump() | new_model),
        Sampler.model_validate(base_sampler.model_dump() | new_sampler),
    )


def _numbers(text: str) -> list[int]:
    """ "1,5,8-11" -> [1, 5, 8, 9, 10, 11]."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise ValueError(f"--seeds {text!r}: {part!r} is not a number or a rising range; write 1,5,8-11")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def _writable(folder: Path) -> None:
    """Make the folder, or say why not, before minutes of work go into what it is to hold."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".raydiff-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to {str(folder)!r}: {error.strerror}; give another folder") from None


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _progress(items: Any, total: int, what: str) -> Any:
    from rich.progress import track

    return track(items, total=total, description=what, transient=True)


if __name__ == "__main__":
    main()
