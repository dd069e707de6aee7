"""The art: six sets of emoji from npm packages, rendered to RGBA.

S = SIZE. A picture is premultiplied RGBA, uint8, (S, S, 4), cropped to what it shows and centred in a square.
"""

import io
import json
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from raydiff.assets.recipe.words import NAMES, STYLES, styles_of

SIZE = 64
RENDER_SIZE = 192
Picture = np.ndarray  # (S, S, 4) uint8

PACKAGES = {
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/fluent-emoji": "1.2.7",
    "@lobehub/fluent-emoji-3d": "1.1.0",
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/noto-v1": "1.2.5",
    "@iconify-json/fxemoji": "1.2.2",
    "emojibase-data": "17.0.0",
}
ICON_SETS = {
    "flat": "fluent-emoji-flat",
    "gradient": "fluent-emoji",
    "noto": "noto",
    "blob": "noto-v1",
    "firefox": "fxemoji",
}
# Where our name is not the label that Unicode gives.
LABELS = {"sheep": ("ewe", "ram"), "squirrel": ("chipmunk",), "bee": ("honeybee",)}
# The Firefox set has names of its own: its "cat" is a cat's face.
FIREFOX_NAMES = {
    **{f"{name} face": name for name in ("cat", "dog", "mouse", "pig", "tiger")},
    **{name: f"{name}side" for name in ("cat", "dog", "mouse", "pig", "tiger")},
    "rabbit": "bunnyside",
    "rabbit face": "bunny",
    "ewe": "sheep",
    "wolf": "wolfface",
    "pizza": "sliceofpizza",
    "camel": "dromedarycamel",
}


def install_packages(folder: Path) -> None:
    """Installs the pinned packages into `folder`/node_modules."""
    folder.mkdir(parents=True, exist_ok=True)
    pinned = [f"{name}@{version}" for name, version in PACKAGES.items()]
    subprocess.run(["npm", "install", "--no-save", "--ignore-scripts", *pinned], cwd=folder, check=True)


def render(modules: Path, target: Path) -> None:
    """Writes `target` (.npz): pictures (N, S, S, 4), and for each its name and style (indices) and whether a face."""
    pictures, rows = [], []
    hexcodes = {entry["label"]: entry["hexcode"] for entry in read_json(modules / "emojibase-data/en/data.json")}
    for i, name in enumerate(NAMES):
        for label in LABELS.get(name, (name, f"{name} face")):
            for j, style in enumerate(STYLES):
                if label in hexcodes and (picture := picture_of(label, hexcodes[label], style, modules)) is not None:
                    pictures.append(picture)
                    rows.append((i, j, label.endswith(" face")))
    names, styles, faces = np.array(rows).T
    drawn = {(NAMES[name], STYLES[style]) for name, style, _ in rows}
    assert drawn == {(name, style) for name in NAMES for style in styles_of(name)}, "a pinned package has changed"
    np.savez_compressed(target, pictures=np.stack(pictures), names=names, styles=styles, faces=faces.astype(bool))


def picture_of(label: str, hexcode: str, style: str, modules: Path) -> Picture | None:
    """One emoji in one style, or None where the set has no such emoji."""
    if style == "3d":
        folder = modules / "@lobehub/fluent-emoji-3d/assets"
        files = [folder / f"{hexcode.lower()}{suffix}.webp" for suffix in ("", "-fe0f")]
        return next((square(Image.open(file)) for file in files if file.exists()), None)
    icon = FIREFOX_NAMES.get(label, label.replace(" ", "")) if style == "firefox" else label.replace(" ", "-")
    svg = svg_of(modules / "@iconify-json" / ICON_SETS[style] / "icons.json", icon)
    return None if svg is None else square(rasterise(svg))


def svg_of(icons_file: Path, icon: str) -> str | None:
    """An icon of a set in the IconifyJSON format, aliases followed."""
    icon_set = read_json(icons_file)
    entry = icon_set["icons"].get(icon_set.get("aliases", {}).get(icon, {}).get("parent", icon))
    if entry is None:
        return None
    left, top = entry.get("left", 0), entry.get("top", 0)
    width, height = (entry.get(side, icon_set.get(side, 16)) for side in ("width", "height"))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{RENDER_SIZE}" height="{RENDER_SIZE}">{entry["body"]}</svg>'
    )


def rasterise(svg: str) -> Image.Image:
    import resvg_py  # only this stage needs it

    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg))))


def square(image: Image.Image) -> Picture:
    """Crops to the opaque part, pads to a square and scales to S; premultiplied, so that no fringe bleeds in."""
    rgba = np.asarray(image.convert("RGBA")).astype(np.float32) / 255
    rgba[..., :3] *= rgba[..., 3:]
    rows, columns = np.where(rgba[..., 3] > 0.05)
    rgba = rgba[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    height, width = rgba.shape[:2]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    padded = np.zeros((side, side, 4), np.float32)
    padded[top : top + height, left : left + width] = rgba
    channels = [Image.fromarray(padded[..., c]).resize((SIZE, SIZE), Image.Resampling.BOX) for c in range(4)]
    return (np.stack([np.asarray(channel) for channel in channels], axis=-1).clip(0, 1) * 255).round().astype(np.uint8)


@cache
def read_json(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))
