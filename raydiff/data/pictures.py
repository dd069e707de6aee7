"""One picture file as RGB: the only place of this package that decodes pictures that others made.

A picture is turned upright by its EXIF or XMP orientation; one that has none, or none that can be read, is upright. Grey values
of 16 bits are scaled to 8. Colours go from the embedded ICC profile to sRGB; without a profile, or with one that cannot be read
or is for another kind of colours, they are sRGB already. What is transparent is laid on white. Refused is what has no one
answer: more than one frame, numbers without an agreed white, too many pixels. docs/formats.md has the table.
"""

from __future__ import annotations

import io
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

VERSION = 2  # of the pixels that a file gives: caches of what was decoded are under it
MOST_PIXELS = 1 << 25  # of a picture, and of a batch of them: 34 million, as of 5792 × 5792, are 0.4 GB in fp32
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
NO_IMAGE = "its bytes are no image file of a format that is read: PNG, JPEG, WebP, AVIF, GIF, BMP, TIFF, PNM, JPEG 2000"
_GAMMA = 0.45455  # that a PNG names for sRGB's curve
_BITS, _WHITE_IS_ZERO, _SAMPLES = 258, 262, 339  # tags of TIFF: BitsPerSample, PhotometricInterpretation, SampleFormat

Cell = bytes | str | None  # an image file's bytes, or its path


class PictureError(ValueError):
    """A file that gives no picture: says why, as the end of a sentence about it."""


def decode(cell: Cell, folder: Path | None = None, within: Path | None = None) -> tuple[Any, str]:
    """(RGB PIL image, ""), or (None, why there is none).

    A path is taken from `folder`, and must lie below `within`, links followed; None allows any. Without `folder` a path is
    refused.
    """
    try:
        with _opened(cell, folder, within) as picture:
            return _rgb(picture), ""
    except PictureError as error:
        return None, str(error)
    except Exception as error:  # each of Pillow's readers raises its own on broken bytes
        return None, f"undecodable image: {error}"


def fault(cell: Cell, folder: Path | None = None, within: Path | None = None) -> str:
    """Why a file gives no picture, by its header alone; "" when it seems to give one."""
    return _header(cell, folder, within)[1]


def pixels(cell: Cell) -> int:
    """Width × height by the header; 0 for a file that gives no picture."""
    return _header(cell, None, None)[0]


def _header(cell: Cell, folder: Path | None, within: Path | None) -> tuple[int, str]:
    try:
        with _opened(cell, folder, within) as picture:
            return picture.width * picture.height, ""
    except PictureError as error:
        return 0, str(error)
    except Exception as error:
        return 0, f"undecodable image: {error}"


@contextmanager
def _opened(cell: Cell, folder: Path | None, within: Path | None) -> Iterator[Any]:
    """The picture, not decoded yet. Raises PictureError for what its header refuses."""
    from PIL import Image, UnidentifiedImageError

    if not cell:
        raise PictureError("no image")
    file = _regular(cell, folder, within) if isinstance(cell, str) else io.BytesIO(cell)
    try:
        with Image.open(file, formats=_formats()) as picture:
            if reason := _refused(picture):
                raise PictureError(f"undecodable image: {reason}")
            yield picture
    except UnidentifiedImageError:
        raise PictureError(f"undecodable image: {NO_IMAGE}") from None


@cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that Pillow has here."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _regular(path: str, folder: Path | None, within: Path | None) -> Path:
    """A regular file by its path: a pipe or device could keep a reader waiting for ever."""
    if folder is None:
        raise PictureError(f"{path!r} is a path, and here the bytes of an image file are read")
    file = (folder / path).resolve()
    if within is not None and not file.is_relative_to(within.resolve()):
        raise PictureError(f"{path!r} lies outside of the dataset's folder {str(within)!r}: pairs.outside = true allows it")
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise PictureError(f"{path!r} is no regular file")
    except (FileNotFoundError, NotADirectoryError):
        raise PictureError(f"there is no image file {path!r}") from None
    return file


def _refused(picture: Any) -> str:
    """Why a picture is not decoded; "" when it is."""
    if (count := picture.width * picture.height) > MOST_PIXELS:
        return f"{picture.width} × {picture.height} = {count:,} pixels are more than {MOST_PIXELS:,}; make it smaller"
    # The other pictures of an MPO, a JPEG with more behind it, are depth maps, gain maps or the other eye's view.
    if picture.format != "MPO" and getattr(picture, "is_animated", False):
        return f"a {picture.format} of {picture.n_frames} frames, and a picture is one"
    if picture.format == "PNG" and (reason := _refused_png(picture)):
        return reason
    if picture.format == "TIFF" and (reason := _refused_tiff(picture)):
        return reason
    if picture.mode == "F" or (picture.mode == "I" and picture.format not in ("PNG", "PPM")):
        return "its numbers are no shares of an agreed white; save it with 8 or 16 bits"
    if picture.mode == "LAB":
        return "its colours are LAB; save it as RGB"
    return ""


def _refused_png(picture: Any) -> str:
    info = picture.info
    gamma = info.get("gamma", _GAMMA)
    if not {"srgb", "icc_profile"} & set(info) and abs(gamma - _GAMMA) > 0.01:
        return f"a PNG with the brightness curve gAMA = {gamma:g}, and sRGB's is {_GAMMA}; save it as sRGB"
    if "transparency" in info and _raw_mode(picture).endswith("16B"):
        return "a PNG of 16 bits with a transparent colour, which Pillow does not tell from its neighbours; save it with alpha"
    return ""


def _refused_tiff(picture: Any) -> str:
    tags = picture.tag_v2
    if set(tags.get(_SAMPLES, (1,))) - {1, 4}:  # 1 is unsigned, 4 is undefined
        return "a TIFF of signed or floating-point numbers has no agreed white; save it with 8 or 16 bits"
    if picture.mode == "I;16" and (tags.get(_BITS) != (16,) or tags.get(_WHITE_IS_ZERO) == 0):
        return (
            f"a grey TIFF of {tags.get(_BITS, ('?',))[0]} bits that Pillow does not scale; save it with 8 or 16 bits, 0 black"
        )
    return ""


def _raw_mode(picture: Any) -> str:
    """How the file's pixels are stored, in Pillow's words."""
    arguments = picture.tile[0][3] if picture.tile else ""
    return str(arguments if isinstance(arguments, str) else arguments[0])


def _rgb(picture: Any) -> Any:
    from PIL import Image, ImageOps

    picture.load()
    picture = _eight_bits(ImageOps.exif_transpose(picture))
    if not picture.has_transparency_data:
        return _srgb(picture if picture.mode in ("L", "CMYK") else picture.convert("RGB"), picture)
    whole = picture.convert("RGBA")
    alpha = whole.getchannel("A")
    if alpha.getextrema()[1] == 0:
        raise PictureError("undecodable image: every pixel of it is transparent")
    colours = _srgb(picture.getchannel("L") if picture.mode == "LA" else whole.convert("RGB"), picture)
    return Image.composite(colours, Image.new("RGB", picture.size, "white"), alpha)


def _eight_bits(picture: Any) -> Any:
    """Grey of 16 bits as grey of 8; the readers scale other pictures of 16 bits themselves."""
    import numpy as np
    from PIL import Image

    if not picture.mode.startswith("I"):
        return picture
    grey = np.asarray(picture).astype(np.uint32)
    scaled = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    scaled.info = dict(picture.info)
    return scaled


def _srgb(colours: Any, picture: Any) -> Any:
    """Colours as RGB, by the ICC profile of the picture that they are of."""
    from PIL import ImageCms

    if profile := picture.info.get("icc_profile"):
        try:
            there = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            return ImageCms.profileToProfile(colours, there, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):  # no profile, or one of another kind of colours: every viewer goes by sRGB
            pass
    return colours.convert("RGB")
