"""Pairs that rewards label: a call that goes on has the files of the call that began them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from raydiff import assets
from raydiff.config import ConfigError, Run, override
from raydiff.data import feedback
from raydiff.data.pieces import PairsError
from raydiff.generate import Adapter
from tests.test_contents import scaled


def own_reward(folder: Path, name: str) -> Path:
    """A package with a reward that reads a file beside it; its text may be edited."""
    file = folder / name / "judge.py"
    file.parent.mkdir()
    file.write_text(
        "from pathlib import Path\nfrom raydiff.rewards.base import RewardConfig\n\n"
        "class Plugin(RewardConfig):\n    spoils: bool = False\n\n"
        "    def files(self):\n        return super().files() | {'table': Path(__file__).with_name('table.txt')}\n\n"
        "    def build(self, device='cpu'):\n"
        "        if self.spoils:\n            self.files()['table'].write_text('other')\n"
        "        return lambda images, prompts: images.mean((1, 2, 3))\n"
    )
    file.with_name("table.txt").write_text("one")
    return file


def test_pairs_that_were_begun_with_another_reward_or_adapter_are_not_gone_on_with(
    tiny_run: Callable[..., Run], tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of a reward, a module of one's own, a file that it names, and a whole unet, each in the place of another."""
    monkeypatch.syspath_prepend(tmp_path)
    module, head = own_reward(tmp_path, "own_of_pairs"), tmp_path / "head.safetensors"
    shutil.copy(assets.path("aesthetic") / "model.safetensors", head)
    shutil.copytree(tiny_pipeline / "unet", tmp_path / "tuned/unet")
    rewards = {"look": {"kind": "aesthetic", "head": str(head)}, "own": {"kind": "own_of_pairs.judge"}}
    run = tiny_run("diffusion_dpo", {"rewards": rewards, "prompts.train": ("a cat", "a dog")})
    adapters = [Adapter(str(tmp_path / "tuned"))]

    def begin(run: Run = run) -> feedback.Summary:
        return feedback.from_rewards(run, tmp_path / "pairs", n=2, prompts_per_file=1, adapters=adapters)

    (unet,) = (tmp_path / "tuned/unet").glob("*.safetensors")
    table = module.with_name("table.txt")
    assert begin().made == 2 and begin().made == 0
    for file, field in (
        (head, r"contents\.rewards\.look\.head"),
        (module, r"contents\.rewards\.own\.kind"),
        (table, r"contents\.rewards\.own\.table"),
        (unet, "adapters"),
    ):
        kept = file.read_bytes()
        scaled(file) if file.suffix == ".safetensors" else file.write_bytes(kept + b"\n")
        with pytest.raises(PairsError, match=f"made from other settings: {field} = "):
            begin()
        file.write_bytes(kept)
        assert begin().made == 0
    shutil.rmtree(tmp_path / "pairs")
    with pytest.raises(ConfigError, match=r"files hold something else .*\n  rewards\.own\.table"):
        begin(override(run, {"rewards.own.spoils": True}))
