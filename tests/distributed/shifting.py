"""The tiny Stable Diffusion with one more file, which a generator finds replaced when it has loaded."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Literal

from raydiff.models import stable_diffusion


class Plugin(stable_diffusion.Plugin):
    kind: Literal["tests.distributed.shifting"] = "tests.distributed.shifting"  # type: ignore[assignment]
    extra: str
    """A file."""

    def files(self) -> dict[str, Path | str]:
        return super().files() | {"extra": Path(self.extra)}

    def build(self, *args: Any, **kwargs: Any) -> stable_diffusion.StableDiffusion:
        model = super().build(*args, **kwargs)
        if any(frame.function == "load" and "generate.py" in frame.filename for frame in inspect.stack()):
            Path(self.extra).write_text("replaced")
        return model
