"""Reward and preference fine-tuning of text-to-image diffusion models, on Ray.

run = raydiff.load("jobs/recipes/emoji_draft_lv.toml", ["train.updates=20"])
for metrics in raydiff.fit(run): ...      # one process
raydiff.train(run)                        # Ray Train with DeepSpeed
raydiff.sweep(sweep)                      # Ray Tune, on raydiff.search.load("jobs/sweeps/emoji_k.toml")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raydiff.config import ConfigError, Run, flat, load, override
    from raydiff.distributed.launch import train
    from raydiff.distributed.sweep import sweep
    from raydiff.local import fit

__all__ = ["ConfigError", "Run", "fit", "flat", "load", "override", "sweep", "train"]
__version__ = "0.1.0"

_HOME = {"fit": "raydiff.local", "sweep": "raydiff.distributed.sweep", "train": "raydiff.distributed.launch"}


def __getattr__(name: str) -> Any:
    """Import torch and Ray when they are asked for: reading a run file needs neither, and the core needs torch alone."""
    if name in __all__:
        return getattr(importlib.import_module(_HOME.get(name, "raydiff.config")), name)
    raise AttributeError(f"module 'raydiff' has no attribute {name!r}")
