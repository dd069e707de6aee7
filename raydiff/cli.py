"""The command line. Heavy imports stand inside the commands, so that help and a typo in a recipe answer at once."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raydiff import cli_pairs, credentials
from raydiff.cli_pairs import OwnCode

if TYPE_CHECKING:
    from raydiff.bench.settings import Settings
    from raydiff.config import Pool, Run, Sampler
    from raydiff.contents import Contents
    from raydiff.generate import Adapter
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
Replicas = Annotated[int | None, typer.Option(help="Actors of the pool, on Ray.", rich_help_panel="On Ray")]
NumGpus = Annotated[
    float | None, typer.Option(help="GPUs of each, or a fraction; default: 1 where there are any.", rich_help_panel="On Ray")
]
NumCpus = Annotated[float | None, typer.Option(help="CPUs of each.", rich_help_panel="On Ray")]
Label = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="Node label that it goes to; may be repeated.", rich_help_panel="On Ray"),
]
RowsPerFile = Annotated[int | None, typer.Option(min=1, help="Default: 256.", rich_help_panel="On Ray")]
MaxBadRows = Annotated[
    int | None, typer.Option(min=0, help="Rows that may be left out before it stops; default: 100.", rich_help_panel="On Ray")
]
Split = Annotated[str | None, typer.Option(metavar="NAME", help='Split to use of a folder with several, or "all".')]
_EXTRA = ("ray", "deepspeed", "mlflow", "pyarrow", "matplotlib")  # of the extra "jobs"


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    resume: Annotated[str | None, typer.Option(metavar="NAME", help="Go on with a run that was stopped.")] = None,
    local: Annotated[bool, typer.Option("--local", help="In this process, without Ray.")] = False,
    own_code: OwnCode = True,
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
def submit(
    recipe: Recipe,
    overrides: Overrides = None,
    resume: Annotated[str | None, typer.Option(metavar="NAME", help="Go on with a run that was stopped.")] = None,
    address: Annotated[str | None, typer.Option(help="The job server's; default: RAY_API_SERVER_ADDRESS.")] = None,
    working_dir: Annotated[Path, typer.Option(help="The folder that is uploaded.")] = Path(),
    upload: Annotated[bool, typer.Option(help="Without: run what the nodes have.")] = True,
    grows: Annotated[bool, typer.Option("--grows", help="The cluster adds nodes: take a run that has no room yet.")] = False,
    follow: Annotated[bool, typer.Option(help="Show the log until the job ends.")] = True,
    own_code: OwnCode = True,
) -> None:
    """Check a run against a cluster, submit it there as a job, and follow it."""
    from raydiff import submit as jobs

    where = working_dir if upload else None
    code = jobs.submit(
        recipe,
        overrides or (),
        resume=resume,
        address=address,
        working_dir=where,
        grows=grows,
        follow=follow,
        own_code=own_code,
    )
    raise typer.Exit(code)


@app.command()
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...")] = None,
    prompts_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="More prompts: .txt, one a line, or .parquet, or a folder of these.")
    ] = None,
    split: Split = None,
    to: Annotated[
        str, typer.Option(metavar="FOLDER", help="Where the pictures go; FOLDER.parquet makes a dataset, on Ray.")
    ] = "pictures",
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
    ray: Annotated[bool, typer.Option("--ray", help="Draw on a Ray cluster; a .parquet always is.")] = False,
    replicas: Replicas = None,
    num_gpus: NumGpus = None,
    num_cpus: NumCpus = None,
    label: Label = None,
    rows_per_file: RowsPerFile = None,
    max_bad_rows: MaxBadRows = None,
    own_code: OwnCode = True,
) -> None:
    """Sample pictures of a model, with any mixture of adapters: each as PNG, a grid of all, and images.json.

    On Ray: any number of prompts on a pool of actors. The same command goes on with what was interrupted.
    """
    texts = list(prompts or [])
    if not texts and prompts_file is None:
        raise ValueError('no prompt given: raydiff generate "a red cat" "a fish", or --prompts-file FILE')
    if split is not None and prompts_file is None:
        raise ValueError(f"--split {split}: there is no --prompts-file to take it from")
    _tell_splits(prompts_file, "--prompts-file")
    numbers = _numbers(seeds) if seeds is not None else list(range(seed, seed + n))
    given = {"steps": steps, "guidance": guidance, "spacing": spacing, "final_alpha": final_alpha, "eta": eta}
    on_ray = {"rows_per_file": rows_per_file, "max_bad_rows": max_bad_rows}
    pool = {"replicas": replicas, "num_gpus": num_gpus, "num_cpus": num_cpus, "label": label}
    here = not ray and not to.rstrip("/").endswith(".parquet")
    _no_options(pool | on_ray if here else {"device": device}, "--ray" if here else "--num-gpus in place of it")
    if here:
        if prompts_file is not None:
            from raydiff.data.prompts import read

            texts += read(prompts_file, "--prompts-file", split, "--split")
        config, sampler = _model_and_sampler(recipe, {"path": model, "dtype": dtype}, given)
        _draw(texts, numbers, to, config, sampler, _adapters(adapter, lora_scale), batch, device)
        return
    from raydiff.distributed.generate_batch import generate as draw

    config, sampler = _model_and_sampler(recipe, {"path": model, "dtype": dtype}, given)
    draw(
        to,
        model=config,
        sampler=sampler,
        prompts=texts,
        prompts_file=prompts_file,
        adapters=_adapters(adapter, lora_scale),
        seeds=numbers,
        batch_size=batch,
        pool=_pool(pool),
        split=split,
        **_given(on_ray),
    )


@app.command()
def score(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="Parquet file or folder of pictures, or a URI of one.")],
    overrides: Overrides = None,
    to: Annotated[str, typer.Option(metavar="FOLDER", help="Where the scored dataset goes.")] = "scored.parquet",
    recipe: Annotated[Path | None, typer.Option(help="A run file: its rewards, those held out, and their total.")] = None,
    reward: Annotated[
        list[str] | None, typer.Option(metavar="NAME=KIND", help="May be repeated; rewards.NAME.FIELD=VALUE sets its fields.")
    ] = None,
    image_column: Annotated[str, typer.Option(help="Column of image files.")] = "image",
    prompt_column: Annotated[str, typer.Option(help="Column of prompts; none: there is none.")] = "prompt",
    split: Split = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures scored at once.")] = 16,
    replicas: Replicas = None,
    num_gpus: NumGpus = None,
    num_cpus: NumCpus = None,
    label: Label = None,
    rows_per_file: RowsPerFile = None,
    max_bad_rows: MaxBadRows = None,
    own_code: OwnCode = True,
) -> None:
    """Add a column for each reward to a dataset of pictures, on Ray. The same command goes on with what was interrupted."""
    from raydiff.data.images import Columns
    from raydiff.distributed.score_batch import score as rate

    _tell_splits(dataset, "DATASET")
    rate(
        dataset,
        to,
        _rewards(recipe, reward or [], overrides or []),
        columns=Columns(image_column, None if prompt_column == "none" else prompt_column),
        batch_size=batch,
        pool=_pool({"replicas": replicas, "num_gpus": num_gpus, "num_cpus": num_cpus, "label": label}),
        split=split,
        **_given({"rows_per_file": rows_per_file, "max_bad_rows": max_bad_rows}),
    )


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP", help="A sweep file: a recipe, and what to vary.")],
    overrides: Overrides = None,
    resume: Annotated[
        str | None, typer.Option(metavar="NAME", help="Run again what failed in a sweep, from checkpoints.")
    ] = None,
    own_code: OwnCode = True,
) -> None:
    """Run a recipe with many settings, by Ray Tune. Exit code 1 when a trial failed."""
    from raydiff.search import load

    config = load(file, overrides or ())

    import raydiff.distributed.sweep

    if raydiff.distributed.sweep.sweep(config, resume=resume).failed:
        raise typer.Exit(1)


@app.command()
def bench(
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="Where records and report go.")] = Path("bench"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A rehearsal of minutes, from which nothing can be concluded.")
    ] = False,
    settings: Annotated[Path | None, typer.Option(metavar="FILE", help="What is compared; default: raydiff's own.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Runs at once, of one thread each.")] = 2,
    tune: Annotated[bool, typer.Option("--tune", help="Train each method's candidate settings instead.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Only the tables and figures of the records in FOLDER.")] = False,
    mlflow: Annotated[bool, typer.Option(help="Log the report to MLflow, in FOLDER/mlflow.db.")] = True,
    own_code: OwnCode = True,
) -> None:
    """Compare the methods' sample efficiency on the embedded model. The same command goes on with what was interrupted."""
    from raydiff.bench.settings import FILE, load
    from raydiff.distributed.lease import claimed

    compared = load(settings or FILE)
    with claimed(to):
        _compare(compared, to, quick, processes, tune, report, mlflow)


def _compare(compared: Settings, to: Path, quick: bool, processes: int, tune: bool, report: bool, mlflow: bool) -> None:
    if tune:
        from raydiff.bench.tune import tune as try_all

        for trial in try_all(compared, to, list(compared.methods), processes, typer.echo):
            reached = "not reached" if trial.queries is None else f"{trial.queries:.0f} queries"
            typer.echo(
                f"{trial.method:14} {reached:>12}, {trial.last:.3f} at the end{' *' if trial.chosen else ''}  {trial.settings}"
            )
        return
    if quick:
        compared = compared.rehearsal()
    from raydiff.bench import compare
    from raydiff.bench import report as reporting

    files = reporting.write(compared, to) if report else compare.compare(compared, to, processes, typer.echo)
    typer.echo("\n".join(map(str, files)))
    if mlflow:
        from raydiff.distributed.tracking import of_comparison

        tracker = of_comparison(to, files)
        typer.echo(f"MLflow: {tracker.uri}, run {tracker.run_id}")


@app.command()
def evaluate(
    recipe: Recipe,
    overrides: Overrides = None,
    adapter: Annotated[str, typer.Option(metavar="DIR[:WEIGHT]", help="An exported adapter, or a run's folder.")] = "",
    against: Annotated[str, typer.Option(metavar="base|DIR[:WEIGHT]", help="What it has to beat.")] = "base",
    prompts_file: Annotated[Path | None, typer.Option(help="In place of the held-out prompts: .txt or .parquet.")] = None,
    images: Annotated[int, typer.Option(min=1, help="Pictures of each side.")] = 64,
    per_prompt: Annotated[int, typer.Option(min=1, help="Of these, pictures of one prompt.")] = 4,
    reward: Annotated[
        list[str] | None, typer.Option(metavar="NAME=KIND", help="One more reward to judge by; may be repeated.")
    ] = None,
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="Where evaluation.json and grid.png go.")] = Path("evaluation"),
    mlflow: Annotated[bool | None, typer.Option(help="Log to MLflow too; default: where it is installed.")] = None,
    device: Annotated[str | None, typer.Option(help="Default: cuda where there is one.")] = None,
    own_code: OwnCode = True,
) -> None:
    """Win rates of an adapter on held-out prompts against the base model or another adapter, for each reward of a recipe."""
    from raydiff.config import load

    if not adapter:
        raise ValueError("--adapter is missing: give the folder of an exported adapter, or of a run")
    extra = [f"prompts.held_out={json.dumps(str(prompts_file))}"] if prompts_file else []
    judged = [f"evaluate.rewards.{name}.kind={json.dumps(kind)}" for name, kind in _kinds(reward or []).items()]
    run = load(recipe, [*(overrides or ()), *extra, *judged])
    _preflight(run)
    _writable(to)
    if mlflow and not importlib.util.find_spec("mlflow"):
        raise ValueError('--mlflow: it is not installed; pip install "raydiff[jobs]", or --no-mlflow')

    from raydiff import evaluate as judging
    from raydiff.distributed.lease import claimed
    from raydiff.generate import Adapter

    sides = Adapter.parse(adapter), None if against == "base" else Adapter.parse(against)
    with claimed(to):
        report = judging.evaluate(run, *sides, images=images, per_prompt=per_prompt, device=_device(device), progress=_progress)
        files = report.write(to, run.evaluate.grid)
    typer.echo("\n".join([*report.lines(), *map(str, files)]))
    if mlflow or (mlflow is None and importlib.util.find_spec("mlflow")):
        from raydiff.distributed import tracking

        # A run of its own: a training's record stays as it was, and one adapter is judged more than once.
        folder = Path(report.about["adapter"]).resolve().parent
        tracker = tracking.record(run, f"evaluate {folder.name}", report.metrics(), files, folder.name)
        typer.echo(f"MLflow: {tracker.uri}, run {tracker.run_id}")


@app.command()
def log(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Of a run that has ended, e.g. runs/NAME.")],
    own_code: OwnCode = True,
) -> None:
    """Send MLflow what it missed of a run while it did not answer."""
    from raydiff.distributed import missed

    tracker = missed.send(folder)
    typer.echo(f"MLflow: {tracker.uri}, run {tracker.run_id}")


@app.command()
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    address: Annotated[str | None, typer.Option(metavar="URL", help="Look at the cluster of this job server.")] = None,
    cluster: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Look at the cluster that a file of KubeRay or `ray up` describes.")
    ] = None,
    own_code: OwnCode = True,
) -> None:
    """What a run will do and need: geometry, cost, memory, files, cluster. Exit code 2 when it cannot work.

    On this machine, or on the cluster that RAY_ADDRESS, --address or --cluster names.
    """
    if address and cluster:
        raise ValueError("--address and --cluster name two clusters: leave one of them out")
    from raydiff.config import load

    run = load(recipe, overrides or ())

    from rich.console import Console

    from raydiff import plan as planning
    from raydiff.plan import clusters
    from raydiff.plan.render import render

    machine = clusters.at(address) if address else clusters.of_file(cluster) if cluster else clusters.here()
    result = planning.plan(run, machine)
    Console(highlight=False).print(render(result))
    if result.problems:
        raise typer.Exit(2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. A fault of the user's is one plain message and exit code 2; RAYDIFF_DEBUG=1 shows where it came from."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        credentials.refuse_arguments(given)
        app(args=given, prog_name="raydiff")
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
    """`raydiff.fit` with a progress line; run.json, contents.json, metrics.jsonl, the adapter and the before/after grid."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from raydiff import drafts, local, watch
    from raydiff.config import fresh_name
    from raydiff.contents import FILE, Contents
    from raydiff.core.guard import METRICS

    if "://" in run.storage:
        raise ValueError(f"storage = {run.storage!r}: a run with --local writes to a folder of this machine")
    gpus = run.pools.train.num_gpus
    device = "cpu" if gpus == 0 else _device(None) if gpus is None else _device("cuda", f"pools.train.num_gpus = {gpus:g}:")
    folder = Path(run.storage) / fresh_name(run.name)
    _writable(folder)
    held = Contents.of(run)
    for name, text in {FILE: held.dump(), "run.json": run.model_dump_json(indent=1)}.items():
        with drafts.replacing(folder / name) as draft:
            draft.write_text(text)
    rows: list[dict[str, float]] = []
    reward = 0.0
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, transient=True) as progress, (folder / "metrics.jsonl").open("w") as log:
        bar = progress.add_task(run.name, total=run.train.updates)
        for metrics in local.fit(run, device=device, folder=folder / "adapter"):
            log.write(json.dumps(metrics) + "\n")
            log.flush()
            rows.append(metrics)
            reward = metrics.get("reward/total", metrics.get("held_out/total", reward))
            progress.update(bar, completed=metrics["step"], description=f"{run.name}  reward {reward:+.4f}")
    for name, value in rows[-1].items():
        if name.startswith("held_out/") or name in METRICS:
            typer.echo(f"{name}: {rows[0][name]:.4f} -> {value:.4f}")
    if reason := watch.stopped(run, rows):
        typer.echo(f"stopped by {reason}")
    typer.echo(f"adapter: {folder / 'adapter'}")
    if best := watch.best(run, rows):
        typer.echo(f"best adapter: {local.best_folder(folder / 'adapter')}: {best}")
    if run.evaluate.grid:
        typer.echo(f"before and after: {_before_after(run, folder, device, held)}")


def _before_after(run: Run, folder: Path, device: str, held: Contents) -> Path:
    """The grid of the evaluation's first pictures without and with the trained weights."""
    from raydiff import pictures
    from raydiff.config import override
    from raydiff.session import Session

    session = Session(override(run, {"evaluate.images": min(run.evaluate.images, run.evaluate.grid)}), device)
    held.check_session(session)  # the run's files are read again
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


def _draw(
    prompts: list[str],
    seeds: list[int],
    to: str,
    model: ModelConfig,
    sampler: Sampler,
    adapters: list[Adapter],
    batch: int,
    device: str | None,
) -> None:
    """Pictures in this process."""
    from raydiff.distributed.lease import claimed

    _writable(Path(to))
    with claimed(Path(to)):
        from raydiff import generate as drawing

        drawing.check(model, adapters)
        loaded, made_from = drawing.loaded(model, sampler, adapters, _device(device))
        drawn = drawing.samples(loaded, prompts, seeds, sampler, batch)
        pictures = len(prompts) * len(seeds)
        progress = _progress(drawn, pictures, "pictures")
        grid = drawing.write(progress, to, model=model, sampler=sampler, adapters=adapters, made_from=made_from)
    typer.echo(f"{pictures} pictures, images.json and {grid}")


def _adapters(texts: list[str] | None, scale: float) -> list[Adapter]:
    from raydiff.generate import Adapter

    return [Adapter(a.folder, a.weight * scale) for a in map(Adapter.parse, texts or [])]


def _rewards(recipe: Path | None, named: list[str], overrides: list[str]) -> Run | dict[str, Any]:
    """A run, for all of its rewards, or those of `--reward NAME=KIND` with `rewards.NAME.FIELD=VALUE`."""
    from raydiff.config import load, rewards

    if (recipe is None) == (not named):
        raise ValueError("give the rewards either by --recipe RUN.toml or by --reward NAME=KIND")
    if recipe is not None:
        return load(recipe, overrides)
    return rewards(_kinds(named), overrides)


def _kinds(named: list[str]) -> dict[str, str]:
    from raydiff.config import check_names

    for text in named:
        if not all(text.partition("=")):
            raise ValueError(f"--reward {text!r} is not NAME=KIND, e.g. --reward alignment=clip")
    kinds = dict(text.split("=", 1) for text in named)
    check_names(kinds)
    return kinds


def _pool(options: dict[str, Any]) -> Pool:
    from raydiff.config import Pool

    labels = options.pop("label") or []
    for text in labels:
        if not all(text.partition("=")):
            raise ValueError(f"--label {text!r} is not KEY=VALUE, e.g. --label raydiff-pool=generate")
    return Pool.model_validate(_given(options) | {"labels": dict(text.split("=", 1) for text in labels)})


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _no_options(options: dict[str, Any], wanted: str) -> None:
    """Refuse options that would do nothing."""
    if given := _given(options):
        raise ValueError(f"--{next(iter(given)).replace('_', '-')} does nothing here: it takes {wanted}")


def _tell_splits(uri: str | None, name: str) -> None:
    """Say what is in a folder of splits, whichever is taken; what is wrong with it is told by who reads it."""
    from raydiff.data.files import rows_by_split, told

    try:
        rows = rows_by_split(uri, name) if uri and not uri.endswith(".txt") else {}
    except (ValueError, OSError):
        return
    if rows:
        typer.echo(f"{name} holds {told(rows)}", err=True)


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


def _device(name: str | None, field: str = "--device") -> str:
    """A device that works here; by default a GPU where there is one."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:  # torch raises either without a GPU, a driver or such a device
        raise ValueError(f"{field} {name}: {str(error).splitlines()[0]}; leave it out to run on what is here") from None
    return name


def _progress(items: Any, total: int, what: str) -> Any:
    from rich.progress import track

    return track(items, total=total, description=what, transient=True)


if __name__ == "__main__":
    main()
