"""`fit` and the functions that workers share: geometry changes nothing, evaluation costs nothing, training does something."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import raydiff
from raydiff.config import Run, override
from raydiff.core.learner import Ema, TorchEngine, learning_rate_factor, swapped
from raydiff.data.prompts import read, read_both, tickets
from raydiff.local import fit
from raydiff.session import Session


def trained(run: Run) -> torch.Tensor:
    """The trained weights after the run, flattened, by the very loop of `fit`."""
    session = Session(run)
    optimizer, scheduler = session.optimizer()
    engine = TorchEngine(optimizer, scheduler, session.geometry.accumulation, run.optimizer.max_grad_norm)
    for step in range(run.train.updates):
        session.update(engine, step)
    return torch.cat([p.detach().flatten() for p in session.model.trained().values()])


@pytest.mark.parametrize("method", ["draft", "draft_k", "draft_lv", "refl"])
def test_fit_yields_metrics_and_moves_only_the_adapter(tiny_run: Callable[..., Run], method: str, tmp_path: Path) -> None:
    run = tiny_run(method, {"method.kl": 0.1, "sampler.steps": 4} | ({"method.last_steps": 3} if method == "refl" else {}))
    history = list(raydiff.fit(run, folder=tmp_path))
    assert [m["step"] for m in history] == [0, 1, 2, 3]
    assert ["held_out/total" in m for m in history] == [True, False, True, True]
    assert {"loss", "reward/total", "reward/blue", "kl", "grad_norm", "seconds", "images", "reward_queries"} <= history[
        1
    ].keys()
    assert [m["images"] for m in history[1:]] == [4, 8, 12]
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()


def test_micro_batches_do_not_change_the_update(tiny_run: Callable[..., Run]) -> None:
    run = tiny_run("draft_lv")
    whole, parts = trained(override(run, {"batch.micro": 4})), trained(override(run, {"batch.micro": 1}))
    assert float((whole - parts).norm() / whole.norm()) < 1e-4


def test_workers_see_disjoint_shares_of_the_same_batch(tiny_run: Callable[..., Run]) -> None:
    run = override(tiny_run(), {"batch.size": 8, "batch.micro": 2})
    one = [b.seeds for b in Session(run).batches(1)]
    two = [[b.seeds for b in Session(run, rank=r, workers=2).batches(1)] for r in (0, 1)]
    interleaved = [seeds for pair in zip(*two, strict=True) for seeds in pair]
    assert torch.equal(torch.cat(one), torch.cat(interleaved))


def test_the_same_run_gives_the_same_weights_and_another_seed_does_not(tiny_run: Callable[..., Run]) -> None:
    run = tiny_run("draft_lv", {"sampler.eta": 1.0})
    assert torch.equal(trained(run), trained(run))
    assert not torch.equal(trained(run), trained(override(run, {"seed": 1})))


def test_gradient_checkpointing_changes_nothing(tiny_run: Callable[..., Run]) -> None:
    run = tiny_run("draft_k", {"method": {"kind": "draft_k", "k": 3}})
    a, b = trained(run), trained(override(run, {"train.gradient_checkpointing": False}))
    assert float((a - b).norm() / a.norm()) < 1e-5


def test_evaluation_is_fixed_shared_out_and_not_counted(tiny_run: Callable[..., Run]) -> None:
    run = override(tiny_run(), {"evaluate.images": 5, "evaluate.rewards": {"mirror": {"kind": "symmetry"}}})
    session = Session(run)
    pictures = session.evaluate()
    again = [p for rank in (0, 1) for p in Session(run, rank=rank, workers=2).evaluate()]
    assert [p.index for p in pictures] == list(range(5))
    for p in again:
        assert torch.equal(p.image, pictures[p.index].image)
        assert p.rewards == pytest.approx(pictures[p.index].rewards, rel=1e-5)
    assert set(pictures[0].rewards) == {"total", "blue", "mirror"}
    assert pictures[0].rewards["total"] == pytest.approx(pictures[0].rewards["blue"])
    assert session.policy.calls.images == 0


def test_an_average_is_what_is_evaluated_and_exported(tiny_run: Callable[..., Run], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run = override(tiny_run(), {"optimizer.ema": 0.5})
    for folder, changes in (("ema", {}), ("raw", {"optimizer.ema": None})):
        list(fit(override(run, changes), folder=tmp_path / folder))
    averaged, raw = (load_file(tmp_path / f / "pytorch_lora_weights.safetensors") for f in ("ema", "raw"))
    ours = sum(float(v.norm()) for k, v in averaged.items() if "lora_B" in k or "lora.up" in k)
    assert 0 < ours < sum(float(v.norm()) for k, v in raw.items() if "lora_B" in k or "lora.up" in k)


def test_ema_and_swap_by_hand() -> None:
    p = torch.nn.Parameter(torch.tensor([1.0]))
    ema = Ema({"p": p}, 0.9)
    with torch.no_grad():
        p.fill_(2.0)
    ema.update({"p": p})
    assert ema.average["p"].item() == pytest.approx(1 + (1 - 2 / 11))
    with swapped({"p": p}, ema.average):
        assert p.item() == pytest.approx(1 + 9 / 11)
    assert p.item() == 2.0


def test_learning_rate_shapes() -> None:
    linear = [learning_rate_factor(s, warmup=3, steps=11, shape="linear") for s in range(12)]
    assert linear[:4] == [0.25, 0.5, 0.75, 1.0] and linear[7] == 0.5 and linear[11] == 0.0
    assert learning_rate_factor(7, warmup=3, steps=11, shape="cosine") == pytest.approx(0.5)
    assert learning_rate_factor(99, warmup=3, steps=11) == 1.0


def test_tickets_are_a_function_of_run_and_step(tiny_run: Callable[..., Run]) -> None:
    run, prompts = override(tiny_run(), {"batch.size": 5, "batch.micro": 5}), ("a", "b", "c", "d", "e")
    first, second = tickets(run, prompts, 0), tickets(run, prompts, 1)
    assert first == tickets(run, prompts, 0)
    assert sorted(p for p, _ in first) == sorted(p for p, _ in second) == list(prompts)  # shuffled passes
    assert len({s for _, s in first + second}) == 10
    assert tickets(override(run, {"seed": 1}), prompts, 0) != first


def test_prompts_from_files_and_their_faults(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "p.txt").write_text("a cat\n\n a dog \n")
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a cat", "a dog"]}), tmp_path / "p.parquet")
    assert (
        read(str(tmp_path / "p.txt"), "prompts.train")
        == read(str(tmp_path / "p.parquet"), "prompts.train")
        == ("a cat", "a dog")
    )
    assert len(read("embedded", "prompts.train")) > 69
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"prompts.train = .*empty.txt' holds no prompt"):
        read(str(tmp_path / "empty.txt"), "prompts.train")
    with pytest.raises(FileNotFoundError, match="prompts.held_out"):
        read(str(tmp_path / "none.txt"), "prompts.held_out")
    from raydiff.config import Prompts

    with pytest.raises(ValueError, match=r"'a dog' is in prompts.train too"):
        read_both(Prompts(train=("a dog", "a cat"), held_out=("a dog",)))


def test_a_loss_that_is_not_finite_never_reaches_the_weights(tiny_run: Callable[..., Run]) -> None:
    session = Session(tiny_run())
    optimizer, scheduler = session.optimizer()
    engine = TorchEngine(optimizer, scheduler, session.geometry.accumulation, 1.0)
    before = [p.detach().clone() for p in session.model.trained().values()]
    session.policy.score = lambda images, prompts: (images.mean((1, 2, 3)) / 0, {})
    with pytest.raises(ValueError, match="reward 'total' is inf for prompt"):
        session.update(engine, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, session.model.trained().values(), strict=True))
