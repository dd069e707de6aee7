"""Grids of evaluated pictures as PNG: what a person looks at to judge a run.

Legend: H W pixels.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

CELL = 128  # a picture is enlarged by whole factors to about this many pixels
_INK, _PAPER = (40, 40, 40), (255, 255, 255)


def to_bytes(images: Tensor) -> Tensor:
    """(B,3,H,W) in [0,1] -> (B,3,H,W) uint8 on the CPU, to the nearest level."""
    return (images * 255).round().byte().cpu()


def to_pil(pixels: Tensor) -> Any:
    """(3,H,W) uint8 -> PIL image."""
    from PIL import Image

    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def image(pixels: Tensor) -> Any:
    """(3,H,W) uint8 -> PIL image, enlarged by a whole factor to about CELL pixels: small models' pixels stay visible."""
    from PIL import Image

    picture = to_pil(pixels)
    factor = max(1, CELL // max(picture.size))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def grid(rows: Sequence[Sequence[Tensor]], captions: Sequence[Sequence[str]], labels: Sequence[str] = ()) -> Any:
    """PIL image of rows of (3,H,W) uint8 pictures, a caption under each; `labels` name the rows on the left."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(11)
    cells = [[image(pixels) for pixels in row] for row in rows]
    width, height = cells[0][0].size
    wrapped = [
        [[line for part in text.splitlines() for line in textwrap.wrap(part, max(8, width // 6))] for text in row]
        for row in captions
    ]
    text_height = 13 * max(len(lines) for row in wrapped for lines in row) + 6
    left = 60 if labels else 0
    sheet = Image.new("RGB", (left + len(cells[0]) * (width + 4) + 4, len(cells) * (height + text_height + 4)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for r, (row, texts) in enumerate(zip(cells, wrapped, strict=True)):
        top = r * (height + text_height + 4) + 4
        if labels:
            draw.text((6, top + height // 2), labels[r], _INK, font)
        for c, (cell, lines) in enumerate(zip(row, texts, strict=True)):
            x = left + 4 + c * (width + 4)
            sheet.paste(cell, (x, top))
            draw.multiline_text((x, top + height + 1), "\n".join(lines), _INK, font, spacing=1)
    return sheet


def sheet(pictures: Sequence[Any], columns: int = 8) -> Any:
    """Grid of `session.Picture`s with prompt and total reward under each."""
    rows = [list(pictures[i : i + columns]) for i in range(0, len(pictures), columns)]
    return grid(
        [[p.image for p in row] for row in rows], [[f"{p.prompt}  {p.rewards['total']:.3f}" for p in row] for row in rows]
    )


def before_after(before: Sequence[Any], after: Sequence[Any], columns: int = 8) -> Any:
    """Pairs of rows, the same prompts and seeds before and after training, with the total reward under each."""
    return versus(before, after, ("before", "after"), columns, lambda p: f"{p.prompt}  {p.rewards['total']:.3f}")


def versus(
    first: Sequence[Any], second: Sequence[Any], labels: tuple[str, str], columns: int = 8, caption: Callable[[Any], str] = str
) -> Any:
    """Pairs of rows of `session.Picture`s of the same prompts and seeds, with a caption under each."""
    rows, captions, left = [], [], []
    for i in range(0, len(first), columns):
        for label, pictures in zip(labels, (first, second), strict=True):
            part = pictures[i : i + columns]
            rows.append([p.image for p in part])
            captions.append([caption(p) for p in part])
            left.append(label)
    return grid(rows, captions, left)


def save(picture: Any, path: str | Path) -> Path:
    """Write a PNG, making its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return path
