"""Win rates: against counts by hand, intervals by simulation, and what the command leaves and refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raydiff import cli, generate, pictures
from raydiff.config import Run, override
from raydiff.distributed import tracking
from raydiff.distributed.storage import Folder
from raydiff.evaluate import Compared, caption, compare, evaluate, in_run, to_draw, wins
from raydiff.generate import Adapter
from raydiff.local import fit
from raydiff.session import Picture
from tests.tiny import make_adapter, make_pipeline

MakeRun = Callable[..., Run]
PROMPTS = ["a pig", "a cow", "a hen", "an elk", "a yak"]


@pytest.fixture
def run(tiny_run: MakeRun) -> Run:
    green = {"green": {"kind": "colour", "rgb": [0.2, 0.9, 0.2]}}
    return tiny_run(changes={"prompts.held_out": PROMPTS, "evaluate.rewards": green, "evaluate.batch": 4})


@pytest.fixture(scope="module")
def better(tiny_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that was trained to be blue."""
    folder = tmp_path_factory.mktemp("better")
    changes = {"train.updates": 14, "optimizer.lr": 0.02, "evaluate.every": 14, "method.k": 4}
    history = list(fit(tiny_run(changes=changes), folder=folder / "adapter"))
    assert history[-1]["held_out/blue"] > history[0]["held_out/blue"] + 0.015
    return folder / "adapter"


def test_base_against_itself_is_a_tie(run: Run, tiny_pipeline: Path, tmp_path: Path) -> None:
    adapter = Adapter(str(make_adapter(tiny_pipeline, tmp_path)))
    for ours, theirs in ((Adapter(adapter.folder, 0.0), None), (adapter, adapter)):  # weight 0 is the base, bit for bit
        report = evaluate(run, ours, theirs, images=10, per_prompt=2)
        assert set(report.measures) == {"reward/total", "reward/blue", "reward/green", "alignment", "diversity"}
        for name, m in report.measures.items():
            assert (m.difference.value, m.difference.low, m.difference.high) == (0, 0, 0), name
            assert m.adapter == m.against
            if name != "diversity":
                assert m.win_rate is not None
                assert m.win_rate.low <= m.win_rate.value == 0.5 <= m.win_rate.high


def test_a_better_adapter_wins_as_often_as_a_hand_count_says(run: Run, better: Path) -> None:
    report = evaluate(run, Adapter(str(better)), images=20, per_prompt=4)
    assert [p.prompt for p in report.ours[:6]] == [*PROMPTS, "a pig"]
    assert len({p.seed for p in report.ours}) == 20

    def blue(adapters: list[Adapter], picture: Picture) -> float:
        """By numpy from a single picture: the frame is 2 of 16 pixels wide."""
        model = generate.load(run.model, adapters)
        (sample,) = generate.samples(model, [picture.prompt], [picture.seed], run.sampler)
        pixels = np.asarray(sample.image, np.float64) / 255
        frame = np.ones((16, 16), bool)
        frame[2:-2, 2:-2] = False
        return -float(((pixels[frame] - (0.1, 0.3, 0.9)) ** 2).mean())

    scores = [(blue([Adapter(str(better))], p), blue([], p)) for p in report.ours]
    m = report.measures["reward/blue"]
    assert m.win_rate is not None
    assert m.win_rate.value == pytest.approx(np.mean([a > b for a, b in scores]))
    assert m.win_rate.value > 0.5
    assert m.adapter.value == pytest.approx(np.mean([a for a, _ in scores]), abs=2e-3)  # another batch may move a level
    assert m.difference.value == pytest.approx(m.adapter.value - m.against.value)
    assert m.difference.low > 0
    swapped = evaluate(run, Adapter(str(better), 0.0), Adapter(str(better)), images=20, per_prompt=4).measures["reward/blue"]
    assert swapped.win_rate is not None
    assert swapped.win_rate.value == pytest.approx(1 - m.win_rate.value)
    assert swapped.difference.value == pytest.approx(-m.difference.value)


def test_wins_count_ties_half() -> None:
    ours, theirs = np.array([[1.0, 2.0], [3.0, 3.0], [0.0, 0.0]]), np.array([[0.0, 3.0], [3.0, 2.0], [1.0, 1.0]])
    assert wins(ours, theirs).tolist() == [0.5, 0.75, 0.0]
    won = Compared.of(ours, theirs).win_rate
    assert won is not None
    assert won.value == pytest.approx(1.25 / 3)


def test_difference_is_paired_over_prompts() -> None:
    """Prompts differ far more than the sides: the difference's interval must not see that."""
    rng = np.random.default_rng(0)
    prompts = rng.normal(0, 10, 50)
    m = Compared.of(prompts + 1 + rng.normal(0, 0.1, 50), prompts)
    assert m.adapter.high - m.adapter.low > 2
    assert m.difference.high - m.difference.low < 0.1
    assert m.difference.low < 1 < m.difference.high


def test_pictures_of_one_prompt_count_together() -> None:
    """Forty copies of ten prompts' pictures tell no more than one of each."""
    values = np.random.default_rng(1).normal(size=(10, 1))
    one, many = (Compared.of(np.tile(values, k), np.zeros((10, k))).adapter for k in (1, 40))
    assert many.high - many.low == pytest.approx(one.high - one.low)


@pytest.mark.parametrize("prompts", [2, 4, 8, 16, 32])
def test_intervals_cover_as_often_as_they_say(prompts: int) -> None:
    """Four pictures a prompt, of a reward that varies by prompt and picture; a true win rate that differs by prompt, 0.6 on
    average, with a difference of 0.6·0.5 - 0.4·0.75 = 0: 500 evaluations."""
    rng, covered = np.random.default_rng(7), np.zeros(3)
    for _ in range(500):
        theirs = rng.normal(0, 3, (prompts, 1)) + rng.normal(0, 1, (prompts, 4))
        wins_by = rng.beta(3, 2, (prompts, 1)) > rng.random((prompts, 4))
        m = Compared.of(theirs + np.where(wins_by, 0.5, -0.75) * rng.uniform(0.5, 1.5, (prompts, 4)), theirs)
        assert m.win_rate is not None
        for i, (interval, true) in enumerate(((m.against, 0), (m.difference, 0), (m.win_rate, 0.6))):
            covered[i] += interval.low <= true <= interval.high
    print(f"{prompts} prompts: mean, difference, win rate covered {covered / 5} %")
    assert (covered / 500 > 0.93).all()
    assert (covered[:2] / 500 < 0.985).all()


def test_diversity_is_of_pictures_of_one_prompt() -> None:
    """Two prompts whose pictures are alike, each: 0, however far the prompts are apart. A third's are orthogonal."""
    e = torch.eye(4)
    sides = [[e[0], e[1], e[2], e[0], e[1], e[2]], [e[0], e[1], e[2], e[0], e[1], e[3]]]
    ours, theirs = (
        [Picture(i, f"{i % 3}", i, {"alignment": 1.0}, torch.zeros(3, 1, 1), embedding=v) for i, v in enumerate(side)]
        for side in sides
    )
    m = compare(ours, theirs, 3)["diversity"]
    assert m.adapter.value == pytest.approx(0, abs=1e-9)
    assert m.against.value == pytest.approx(1 / 3)
    assert m.win_rate is None
    assert "diversity" not in compare(ours[:3], theirs[:3], 3)  # one picture of each


def test_what_is_drawn(run: Run) -> None:
    pairs, count, each = to_draw(run, PROMPTS, 21, 2)
    assert (count, each, len(pairs)) == (5, 4, 20)  # the prompts run out: more of each
    assert to_draw(run, PROMPTS, 7, 2)[1:] == (3, 2)
    assert len(set(pairs)) == len({seed for _, seed in pairs}) == 20
    seen_in_training = {p.seed for p in _evaluated(run)}
    assert not seen_in_training & {seed for _, seed in pairs}
    with pytest.raises(
        ValueError, match=r"1 prompts make no interval: 5 held-out prompts, 7 images, 4 of each.*--prompts-file"
    ):
        to_draw(run, PROMPTS, 7, 4)


def _evaluated(run: Run) -> list[Picture]:
    from raydiff.session import Session

    return Session(override(run, {"evaluate.clip": None, "evaluate.drift_images": 0})).evaluate()


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, run: Run, tmp_path: Path) -> Call:
    """call("--adapter", folder, ...) -> (exit code, stdout, stderr) of `raydiff evaluate` on the run's file."""
    monkeypatch.delenv("RAYDIFF_DEBUG", raising=False)
    recipe = tmp_path / "run.json"
    recipe.write_text(override(run, {"storage": str(tmp_path / "runs"), "evaluate.grid": 6}).model_dump_json())

    def call(*arguments: object) -> tuple[int, str, str]:
        code = 0
        try:
            cli.main(["evaluate", str(recipe), "--device", "cpu", "--to", str(tmp_path / "out"), *map(str, arguments)])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return (code, *capsys.readouterr())

    return call


def test_what_the_command_leaves(call: Call, run: Run, better: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a pig\na newt\n")
    code, out, err = call(
        "--adapter", f"{better}:0.5", "--prompts-file", tmp_path / "prompts.txt", "--images", 6, "--per-prompt", 3,
        "--reward", "mirror=symmetry", "--no-mlflow",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [(p["prompt"]) for p in result["pictures"]] == ["a pig", "a newt"] * 3
    assert result["made_from"]["adapter"]["adapters"][0]["weight"] == 0.5
    assert result["made_from"]["against"]["adapters"] == []
    assert result["confidence"] == 0.95
    assert result["warnings"][0].startswith("2 prompts are few: below 16")
    assert f"warning: {result['warnings'][0]}" in out
    for name in ("reward/total", "reward/blue", "reward/green", "reward/mirror", "alignment"):
        ours, theirs = ([p[side][name] for p in result["pictures"]] for side in ("adapter", "against"))
        m = result["measures"][name]
        assert m["adapter"]["value"] == pytest.approx(np.mean(ours))
        assert m["difference"]["value"] == pytest.approx(np.mean(ours) - np.mean(theirs))
        won = [1 if a > b else 0.5 if a == b else 0 for a, b in zip(ours, theirs, strict=True)]
        assert m["win_rate"]["value"] == pytest.approx(np.mean(won))
        assert f"{name} " in out
    assert f"wins {result['measures']['reward/mirror']['win_rate']['value']:.4f}" in out

    # The grid, drawn again from the JSON's numbers and from pictures of `generate`.
    def row(side: str, adapters: list[Adapter]) -> list[Picture]:
        pairs = [(p["prompt"], p["seed"]) for p in result["pictures"]]
        drawn = list(generate.of_pairs(generate.load(run.model, adapters), pairs, run.sampler, batch=4))
        return [
            Picture(i, s.prompt, s.seed, result["pictures"][i][side], generate.pixels(s.image)) for i, s in enumerate(drawn)
        ]

    sides = row("against", []), row("adapter", [Adapter(str(better), 0.5)])
    expected = pictures.versus(*sides, ("base", "adapter"), caption=caption)
    assert (np.asarray(Image.open(tmp_path / "out" / "grid.png")) == np.asarray(expected)).all()
    first = result["pictures"][0]["adapter"]
    assert caption(sides[1][0]).startswith(f"a pig\ntotal {first['reward/total']:.3f}\nblue {first['reward/blue']:.3f}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--adapter is missing"),
        (["--adapter", "{tmp}/nothing"], "there is no pytorch_lora_weights.safetensors"),
        (["--adapter", "{better}:half"], "weight 'half' is not a number"),
        (["--adapter", "{better}", "--against", "{tmp}/nothing"], "there is no pytorch_lora_weights.safetensors"),
        (["--adapter", "{better}", "--prompts-file", "{tmp}/none.txt"], "none.txt' is not a file"),
        (["--adapter", "{better}", "--prompts-file", "{tmp}/empty.txt"], "empty.txt' holds no prompt"),
        (["--adapter", "{better}", "--prompts-file", "{tmp}/trained.txt"], "'a cat' is in prompts.train too"),
        (["--adapter", "{better}", "--images", "4"], "1 prompts make no interval"),
        (["--adapter", "{better}", "--reward", "blue"], "--reward 'blue' is not NAME=KIND"),
        (["--adapter", "{better}", "--reward", "a=clop"], "kind = 'clop' does not exist; did you mean 'clip'?"),
        (["--adapter", "{better}", "--reward", "blue=colour"], "['blue'] is trained on too"),
        (["--adapter", "{better}", "evaluate.clip={tmp}"], "evaluate.clip: "),
    ],
)
def test_a_users_fault_is_one_plain_message(
    call: Call, better: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "trained.txt").write_text("a newt\na cat\n")
    code, _, err = call(*(a.format(tmp=tmp_path, better=better) for a in arguments))
    assert code == 2
    assert err.startswith("raydiff: ")
    assert message in err
    assert "Traceback" not in err


def test_an_adapter_of_another_base_is_refused(call: Call, tmp_path: Path) -> None:
    foreign = make_adapter(make_pipeline(tmp_path / "wider", width=20), tmp_path / "foreign")
    code, _, err = call("--adapter", foreign, "--images", 4, "--per-prompt", 2)
    assert code == 2
    assert "is for another base model" in err


def test_a_runs_folder_stands_for_its_adapter(tmp_path: Path) -> None:
    assert in_run(Adapter(str(tmp_path), 0.5)) == Adapter(str(tmp_path), 0.5)
    (tmp_path / "run.json").touch()
    assert in_run(Adapter(str(tmp_path), 0.5)) == Adapter(str(tmp_path / "adapter"), 0.5)


def test_mlflow_has_a_run_of_its_own_below_the_training_run(run: Run, tmp_path: Path) -> None:
    run = override(run, {"storage": str(tmp_path)})
    (tmp_path / "tiny-1").mkdir()
    (tmp_path / "tiny-1" / "run.json").write_text(run.model_dump_json())
    training = tracking.start(run, tracking.prepare(run), "tiny-1", Folder(tmp_path / "tiny-1"))
    file = tmp_path / "evaluation.json"
    file.write_text("{}")
    own = tracking.record(run, "evaluate tiny-1", {"reward/blue/win_rate": 0.75}, [file], "tiny-1")
    logged = own.client().get_run(own.run_id)
    assert logged.data.tags["mlflow.parentRunId"] == training.run_id != own.run_id
    assert logged.data.metrics == {"reward/blue/win_rate": 0.75}
    assert logged.info.status == "FINISHED"
    assert [f.path for f in own.client().list_artifacts(own.run_id)] == ["evaluation.json"]
    stray = tracking.record(run, "evaluate other", {}, [], "other")
    assert "mlflow.parentRunId" not in stray.client().get_run(stray.run_id).data.tags
