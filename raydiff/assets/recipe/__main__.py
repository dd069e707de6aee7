"""Makes the embedded model: runs the stages in order, skips what is done and resumes what was interrupted."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from raydiff.assets import EMOJI
from raydiff.assets.recipe.aesthetic import train_aesthetic
from raydiff.assets.recipe.classifier import train_classifier, train_style_classifier
from raydiff.assets.recipe.clip import train_clip
from raydiff.assets.recipe.diffusion import train_diffusion
from raydiff.assets.recipe.evaluate import evaluate
from raydiff.assets.recipe.export import export
from raydiff.assets.recipe.render import install_packages, render
from raydiff.assets.recipe.tokenizer import build_tokenizer
from raydiff.assets.recipe.training import spawn
from raydiff.assets.recipe.vae import train_vae

Run = Callable[[Path], None]


@dataclass(frozen=True)
class Stage:
    run: Run
    output: str | None
    """What it leaves in the work folder when it is done; None runs it every time."""
    workers: int = 1
    """Processes of one thread that share the training; on fewer cores they take turns."""


STAGES = {
    "packages": Stage(lambda work: install_packages(work / "npm"), "npm/node_modules/emojibase-data"),
    "render": Stage(lambda work: render(work / "npm/node_modules", work / "art.npz"), "art.npz"),
    "tokenizer": Stage(build_tokenizer, "tokenizer"),
    "vae": Stage(train_vae, "vae", workers=2),
    "clip": Stage(train_clip, "clip"),
    "aesthetic": Stage(train_aesthetic, "aesthetic/model.safetensors"),
    "classifier": Stage(train_classifier, "classifier"),
    "style_classifier": Stage(train_style_classifier, "style_classifier"),
    "diffusion": Stage(train_diffusion, "text_encoder", workers=4),
    "export": Stage(partial(export, target=EMOJI), None),
    "evaluate": Stage(partial(evaluate, target=EMOJI), None),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m raydiff.assets.recipe", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/emoji"), help="where everything on the way is kept")
    parser.add_argument("--stage", choices=STAGES, nargs="+", default=list(STAGES), help="only these; default all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.stage:
        stage = STAGES[name]
        if stage.output and (options.work / stage.output).exists():
            print(f"{name}: done before, {options.work / stage.output} exists")
            continue
        print(f"{name}:", flush=True)
        spawn(stage.run, options.work, stage.workers)


if __name__ == "__main__":
    main()
