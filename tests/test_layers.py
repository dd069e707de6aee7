"""Each layer imports no more than the architecture says, seen from a fresh interpreter."""

import pkgutil
import subprocess
import sys

import pytest

import raydiff.core
import raydiff.data
import raydiff.methods
import raydiff.models
import raydiff.rewards

HEAVY = {"torch", "numpy", "diffusers", "transformers", "peft", "ray", "deepspeed", "mlflow", "pyarrow", "matplotlib"}
BESIDE_TORCH = HEAVY - {"torch", "numpy"}


def modules(package: object) -> list[str]:
    return [f"{package.__name__}.{m.name}" for m in pkgutil.iter_modules(package.__path__)]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("layer", "forbidden"),
    [
        (["raydiff", "raydiff.assets"], HEAVY | {"pydantic"}),
        (["raydiff.config", "raydiff.contents", "raydiff.search", "raydiff.bench.settings"], HEAVY),
        (["raydiff.cli", "raydiff.cli_pairs"], HEAVY),
        (modules(raydiff.core), BESIDE_TORCH | {"pydantic"}),
        ([*modules(raydiff.methods), *modules(raydiff.rewards), *modules(raydiff.models)], BESIDE_TORCH),
        (
            [
                *modules(raydiff.data),
                *(f"raydiff.{m}" for m in ("session", "local", "pictures", "watch", "generate", "evaluate")),
            ],
            BESIDE_TORCH,
        ),
    ],
    ids=["package", "config", "cli", "core", "plugins", "local"],
)
def test_layer_imports_only_its_own(layer: list[str], forbidden: set[str]) -> None:
    code = f"import sys, {', '.join(layer)}; print(*sorted({forbidden} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), f"{layer} imports {done.stdout}{done.stderr}"
