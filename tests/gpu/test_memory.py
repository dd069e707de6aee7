"""Peak memory of an update on Stable Diffusion 1.5's shapes is flat in K with checkpointing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

MEMORY = Path(__file__).parents[2] / "benchmarks" / "memory.py"


@pytest.mark.gpu
@pytest.mark.slow
def test_peak_memory_is_flat_in_k_on_stable_diffusion_shapes() -> None:
    command = [sys.executable, str(MEMORY), "--model", "sd15", "--device", "cuda", "--k", "1", "5", "20"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    peaks = [json.loads(line)["mib"] for line in lines if line.startswith("{")]
    assert max(peaks) / min(peaks) <= 1.25
