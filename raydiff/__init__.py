"""Reward and preference fine-tuning of text-to-image diffusion models, on Ray.

run = raydiff.load("jobs/recipes/emoji_draft_lv.toml", ["train.updates=20"])
for metrics in raydiff.fit(run): ...      # one process
raydiff.train(run)                        # Ray Train with DeepSpeed
"""

from __future__ import annotations

from typing import Any

from raydiff.config import ConfigError, Run, flat, load, override

__all__ = ["ConfigError", "Run", "fit", "flat", "load", "override", "train"]
__version__ = "0.1.0"

_LAZY = {"fit": "raydiff.local", "train": "raydiff.distributed.launch"}


def __getattr__(name: str) -> Any:
    """Import torch and Ray when they are asked for: reading a run file needs neither."""
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'raydiff' has no attribute {name!r}")
