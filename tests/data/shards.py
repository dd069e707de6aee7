"""Files of pairs that tests read: shards as Pick-a-Pic publishes them, and pairs of one colour against another."""

from __future__ import annotations

import io
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from raydiff.data import preferences

BLUE, RED = (30, 60, 230), (230, 60, 30)
SUBJECTS = ("a cat", "a dog", "an ant", "a bee", "a fox", "a pig")
# (label_0, label_1, has_label, are_different): what the published shards hold.
KINDS = [
    (1.0, 0.0, True, True),
    (0.0, 1.0, True, True),
    (0.5, 0.5, True, True),
    (None, None, False, True),
    (1.0, 0.0, True, False),
]


def picture(rgb: Sequence[int], seed: int, size: tuple[int, int] = (20, 24), kind: str = "JPEG") -> bytes:
    """A noisy picture of a colour as a file; `size` is (width, height)."""
    rng = np.random.default_rng(seed)
    pixels = np.clip(np.array(rgb) + rng.normal(0, 20, (size[1], size[0], 3)), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def pickapic(path: Path, rows: int, *, broken: Sequence[int] = (), first: int = 0, row_group: int = 5, **columns: Any) -> Path:
    """A shard with Pick-a-Pic v2's columns, whose rows cycle through KINDS; the blue side wins. `columns` replace some."""
    numbers = range(first, first + rows)
    kinds = [KINDS[n % len(KINDS)] for n in numbers]
    first_is_blue = [kind[0] == 1.0 for kind in kinds]
    jpgs = [
        [b"no jpeg" if i in broken and side == 0 else picture(BLUE if blue == (side == 0) else RED, 2 * n + side)
         for i, (n, blue) in enumerate(zip(numbers, first_is_blue, strict=True))]
        for side in (0, 1)
    ]  # fmt: skip
    there = {
        "are_different": [kind[3] for kind in kinds],
        "best_image_uid": [f"uid-{n}-{0 if blue else 1}" for n, blue in zip(numbers, first_is_blue, strict=True)],
        "caption": [SUBJECTS[n % len(SUBJECTS)] for n in numbers],
        "created_at": pa.array([datetime(2023, 1, 1) + timedelta(minutes=n) for n in numbers], pa.timestamp("ns")),
        "has_label": [kind[2] for kind in kinds],
        "image_0_uid": [f"uid-{n}-0" for n in numbers],
        "image_0_url": [f"https://example.org/{n}/0.png" for n in numbers],
        "image_1_uid": [f"uid-{n}-1" for n in numbers],
        "image_1_url": [f"https://example.org/{n}/1.png" for n in numbers],
        "jpg_0": jpgs[0],
        "jpg_1": jpgs[1],
        "label_0": [kind[0] for kind in kinds],
        "label_1": [kind[1] for kind in kinds],
        "model_0": ["stabilityai/stable-diffusion-2-1"] * rows,
        "model_1": ["dreamlike-art/dreamlike-photoreal-2.0"] * rows,
        "ranking_id": pa.array(list(numbers), pa.int32()),
        "user_id": pa.array([n % 3 for n in numbers], pa.int64()),
        "num_example_per_prompt": [1] * rows,
        "__index_level_0__": list(numbers),
    }
    table = pa.table({name: value for name, value in (there | columns).items() if value is not None})
    pq.write_table(table, path, row_group_size=row_group)
    return path


def pairs(path: Path, rows: int, *, size: tuple[int, int] = (16, 16), seed: int = 0, **columns: Any) -> Path:
    """A file of the schema: blue wins, on a side drawn at random. `columns` replace some; None leaves one out."""
    wins = np.random.default_rng(seed).integers(0, 2, rows)
    sides = [[picture(BLUE if win == (side == 0) else RED, 1000 * seed + 2 * i + side, size, "PNG") for i, win in enumerate(wins)]
             for side in (0, 1)]  # fmt: skip
    there = {"image_0": sides[0], "image_1": sides[1], "label": wins.astype(float)}
    there |= {"prompt": [SUBJECTS[i % len(SUBJECTS)] for i in range(rows)], **columns}
    if set(there) <= set(preferences.schema().names) and None not in [*columns.values()]:
        pq.write_table(preferences.table(there, rows), path, row_group_size=preferences.ROWS)
    else:
        pq.write_table(pa.table({name: value for name, value in there.items() if value is not None}), path)
    return path
