"""The log-probability that an image classifier gives to a class: one that is named, or the one that the prompt speaks of.

Legend: B images, L classes.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor, nn

from raydiff.config import beside
from raydiff.core.reward_vjp import Reward
from raydiff.rewards._images import Preprocess, at_least_fp32, preprocess_of
from raydiff.rewards._pretrained import (
    CONFIG,
    PROCESSOR,
    WEIGHTS,
    Dtype,
    check_folder,
    check_weights,
    load_frozen,
    located,
    read_json,
    source,
)
from raydiff.rewards.base import RewardConfig

if TYPE_CHECKING:
    from raydiff.config import Run

EMBEDDED = {"embedded": "classifier", "embedded-style": "style_classifier"}
EFFICIENTNET = "efficientnet-lite0"

Names = dict[str, list[int]]
"""Lower-case name -> classes that bear it: ImageNet has two cranes."""


class Plugin(RewardConfig):
    """log p(class | image), at most 0; log(1/L) is a guess."""

    model: Annotated[str, beside(*EMBEDDED, EFFICIENTNET)] = "embedded"
    """"embedded" (what is shown), "embedded-style" (how it is drawn), "efficientnet-lite0" (ImageNet, from the extra
    `rewards`), or a transformers image classifier with safetensors weights: a folder or a hub id."""
    label: str | None = None
    """Name of the class, for "efficientnet-lite0" its number in ImageNet, "0" to "999"; None: the longest class name that
    occurs in the prompt as a word."""
    dtype: Dtype = "float32"
    """Precision of the weights; half precision is for GPUs. The score is fp32 all the same."""

    def check(self, run: Run) -> None:
        if self.model == EFFICIENTNET and not (self.label and self.label.isdecimal() and int(self.label) < 1000):
            raise ValueError(
                f"label = {self.label!r}: model = {EFFICIENTNET!r} ships no class names; set label to a class number of"
                ' ImageNet, "0" to "999"'
            )

    def files(self) -> dict[str, Path | str]:
        if self.model != EFFICIENTNET:
            return super().files() | {"model": located(self.model, **EMBEDDED)}
        from raydiff.rewards._efficientnet_lite import weights_file

        return super().files() | {"model": weights_file()}

    def preflight(self) -> None:
        if self.model == EFFICIENTNET:
            from raydiff.rewards._efficientnet_lite import weights_file

            weights_file()
            return
        folder = source(self.model, **EMBEDDED)
        check_folder(folder, CONFIG, WEIGHTS, PROCESSOR)
        from transformers import AutoModelForImageClassification

        check_weights(AutoModelForImageClassification, folder)
        if self.label is not None and Path(folder).is_dir():
            classes_named(self.label, names_of(read_json(Path(folder) / CONFIG[0])["id2label"]))

    def build(self, device: torch.device | str = "cpu") -> Reward:
        model, preprocess, names = load_efficientnet(self.dtype) if self.model == EFFICIENTNET else self._load()
        fixed = None if self.label is None else classes_named(self.label, names)
        return Classifier(model, preprocess, names, fixed).eval().to(device)

    def _load(self) -> tuple[Any, Preprocess, Names]:
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        folder = source(self.model, **EMBEDDED)
        check_folder(folder, CONFIG, WEIGHTS, PROCESSOR)
        model = load_frozen(AutoModelForImageClassification, folder, self.dtype)
        return model, preprocess_of(AutoImageProcessor.from_pretrained(folder)), names_of(model.config.id2label)


class Classifier(nn.Module):
    """The reward of this file. A class that several share a name with counts with all of them: log Σ p."""

    def __init__(self, model: Any, preprocess: Preprocess, names: Names, fixed: list[int] | None) -> None:
        super().__init__()
        self.model, self.preprocess, self.names, self.fixed = model, preprocess, names, fixed

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        output = self.model(self.preprocess(images).to(next(self.model.parameters()).dtype))
        log_probs = at_least_fp32(getattr(output, "logits", output)).log_softmax(-1)  # (B,L)
        counts = torch.zeros_like(log_probs, dtype=torch.bool)
        for row, prompt in zip(counts, prompts, strict=True):
            row[self.fixed or classes_in(prompt, self.names)] = True
        return log_probs.masked_fill(~counts, -torch.inf).logsumexp(-1)


def names_of(id2label: Mapping[Any, str]) -> Names:
    """Names of the classes. A label in ImageNet's style, "tench, Tinca tinca", is one name and each of its parts another."""
    names: Names = {}
    for number, label in id2label.items():
        label = label.lower().replace("_", " ")
        for name in {label, *(part.strip() for part in label.split(","))}:
            names.setdefault(name, []).append(int(number))
    return names


def classes_named(label: str, names: Names) -> list[int]:
    """The classes with this name. Raises ValueError that names some that exist."""
    key = label.lower().replace("_", " ")
    if key not in names:
        near = difflib.get_close_matches(key, names, n=3, cutoff=0.5) or sorted(names)[:8]
        raise ValueError(f"label = {label!r} is no class of the model; there are {', '.join(map(repr, near))}, ...")
    return names[key]


def classes_in(prompt: str, names: Names) -> list[int]:
    """The classes whose name stands in the prompt, as whole words; the longest name, of equals the first."""
    longest_first = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    found = re.findall(rf"(?<!\w)(?=({longest_first})(?!\w))", prompt.lower().replace("_", " "))
    if not found:
        raise ValueError(
            f"the prompt {prompt!r} names no class of the model ({', '.join(sorted(names)[:8])}, ...):"
            " set `label`, or train on prompts that name one"
        )
    return names[max(found, key=len)]


def load_efficientnet(dtype: Dtype) -> tuple[nn.Module, Preprocess, Names]:
    from raydiff.rewards import _efficientnet_lite

    model, preprocess = _efficientnet_lite.load()
    return model.to(getattr(torch, dtype)), preprocess, {str(i): [i] for i in range(1000)}
