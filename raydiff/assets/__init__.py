"""The embedded model: a small text-to-image pipeline, its CLIP, its scorers and its prompts, all inside the package.

Standard library only, so that a config can name an asset without importing torch. `recipe` holds what made them.
"""

from pathlib import Path
from typing import Literal

EMOJI = Path(__file__).parent / "emoji"
COMPONENTS = ("pipeline", "clip", "aesthetic", "classifier", "style_classifier", "prompts", "names.json")


def path(name: str) -> Path:
    """Where a component of the embedded model lies, e.g. `path("clip")` for a folder that `from_pretrained` reads."""
    if name not in COMPONENTS:
        raise ValueError(f"no embedded component {name!r}; there are {', '.join(COMPONENTS)}")
    return EMOJI / name


def prompts(split: Literal["train", "held_out"]) -> list[str]:
    """The prompts of a split; the model never saw the pairs (name, colour) and (name, style) of "held_out" together."""
    if split not in ("train", "held_out"):
        raise ValueError(f"no prompts {split!r}; there are 'train' and 'held_out'")
    return (path("prompts") / f"{split}.txt").read_text(encoding="utf-8").splitlines()
