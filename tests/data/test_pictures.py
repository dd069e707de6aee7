"""What each kind of picture file becomes: right pixels, by how the file was made, or one sentence."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from raydiff.data import pictures
from raydiff.data.pictures import decode, fault

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
# Four flat quarters: where each stands says how the picture was turned.
QUARTERS = np.repeat(np.repeat(np.array([[RED, GREEN], [BLUE, WHITE]], np.uint8), 16, 0), 24, 1)  # (32,48,3)
GREY16 = np.linspace(0, 65535, 48 * 32).round().astype(np.uint16).reshape(32, 48)
# The transpose that undoes each orientation of EXIF: TIFF 6.0, tag 274.
UPRIGHT: dict[int, Callable[[Any], Any]] = {
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}  # fmt: skip


def saved(picture: Any, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    picture.save(file, kind, **options)
    return file.getvalue()


def png(pixels: np.ndarray, colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG by hand: (H,W) or (H,W,C) of uint8 or big-endian 16 bits, and chunks before its pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = pixels.shape[:2]
    pixels = pixels.astype(">u2") if pixels.dtype.itemsize == 2 else pixels
    head = struct.pack(">IIBBBBB", width, height, 8 * pixels.dtype.itemsize, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def right(file: bytes | str, **options: Any) -> np.ndarray:
    """(H,W,3) of a file that is read."""
    picture, reason = decode(file, **options)
    assert reason == "" and picture.mode == "RGB"
    if isinstance(file, bytes):
        assert fault(file) == "" and pictures.pixels(file) == picture.width * picture.height
    return np.asarray(picture, int)


def near(found: np.ndarray, expected: Any, most: float = 0) -> None:
    assert found.shape == np.broadcast_shapes(found.shape, np.shape(expected))
    assert np.abs(found - np.asarray(expected, int)).max() <= most


@pytest.mark.parametrize("turned", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_a_picture_is_turned_upright(kind: str, turned: int) -> None:
    exif = Image.Exif()
    exif[274] = turned
    options = {"quality": 95} if kind in ("JPEG", "AVIF") else {"lossless": True} if kind == "WEBP" else {}
    upright = UPRIGHT[turned](QUARTERS.astype(int))
    found = right(saved(QUARTERS, kind, exif=exif, **options))
    assert found.shape == upright.shape
    assert np.median(np.abs(found - upright)) <= 4


def test_an_orientation_in_xmp_counts_too() -> None:
    xmp = (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description \
xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="3"/></rdf:RDF></x:xmpmeta>'
    )
    near(right(saved(QUARTERS, "JPEG", xmp=xmp, quality=95))[4:12, 4:20], WHITE, 8)


@pytest.mark.parametrize(
    "exif",
    [
        b"no EXIF at all",
        b"II*\0\xff\xff\xff\xff",  # its directory lies nowhere
        b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x09\0\0",  # orientation 9
        b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x016\0\0\0\0\0\0\0",  # orientation as text
        b"",
    ],
)
def test_a_picture_with_broken_exif_is_upright(exif: bytes) -> None:
    plain = saved(QUARTERS, "JPEG", quality=95)
    block = b"\xff\xe1" + struct.pack(">H", len(exif) + 8) + b"Exif\0\0" + exif
    near(right(plain[:2] + block + plain[2:]), right(plain))


@pytest.mark.parametrize(
    "file",
    [
        saved(GREY16, "PNG"),
        saved(GREY16, "TIFF"),
        b"P5 48 32 65535\n" + GREY16.astype(">u2").tobytes(),
        png(np.stack([GREY16] * 3, -1), 2),
        b"P6 48 32 65535\n" + np.stack([GREY16] * 3, -1).astype(">u2").tobytes(),
        png(np.stack([GREY16, np.full_like(GREY16, 65535)], -1), 4),
        saved(GREY16, "JPEG2000", irreversible=False),
    ],
    ids=["grey PNG", "grey TIFF", "PGM", "RGB PNG", "PPM", "PNG with alpha", "JPEG 2000"],
)
def test_sixteen_bits_are_scaled_to_eight(file: bytes) -> None:
    near(right(file), np.stack([GREY16 / 257] * 3, -1).round(), 1)


def test_twelve_bits_of_a_pgm_are_scaled_by_its_own_white() -> None:
    file = b"P5 48 32 4095\n" + (GREY16 >> 4).astype(">u2").tobytes()
    near(right(file), np.stack([GREY16 / 257] * 3, -1).round(), 1)


def tiff(pixels: np.ndarray, bits: int, white_is_zero: bool = False, signed: bool = False) -> bytes:
    """A grey TIFF by hand, of one strip."""
    tags = [(256, 48), (257, 32), (258, bits), (259, 1), (262, 0 if white_is_zero else 1), (273, 146), (277, 1), (278, 32),
            (279, pixels.nbytes), (339, 2 if signed else 1)]  # fmt: skip
    directory = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + directory + b"\0\0\0\0"
    return head.ljust(146, b"\0") + pixels.tobytes()


def test_the_tiffs_by_hand_are_tiffs() -> None:
    near(right(tiff(GREY16.astype("<u2"), 16)), np.stack([GREY16 / 257] * 3, -1).round(), 1)
    eight = (GREY16 >> 8).astype(np.uint8)
    near(right(tiff(eight, 8, white_is_zero=True)), 255 - np.stack([eight] * 3, -1).astype(int))


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (saved(GREY16.astype(np.float32) / 65535, "TIFF"), "a TIFF of signed or floating-point numbers has no agreed white"),
        (saved(GREY16.astype(np.int32), "TIFF"), "a TIFF of signed or floating-point numbers has no agreed white"),
        (tiff(np.zeros((32, 48), np.int8), 8, signed=True), "a TIFF of signed or floating-point numbers"),
        (tiff(GREY16.astype("<u2"), 16, white_is_zero=True), "a grey TIFF of 16 bits that Pillow does not scale"),
        (tiff(np.zeros((32, 72), np.uint8), 12), "a grey TIFF of 12 bits that Pillow does not scale"),
        (b"Pf\n48 32\n-1.0\n" + GREY16.astype("<f4").tobytes(), "its numbers are no shares of an agreed white"),
        (saved(Image.merge("LAB", [Image.new("L", (8, 8))] * 3), "TIFF"), "its colours are LAB; save it as RGB"),
        (png(GREY16, 0, (b"tRNS", struct.pack(">H", 0))), "a PNG of 16 bits with a transparent colour"),
        (png(QUARTERS, 2, (b"gAMA", struct.pack(">I", 100_000))), r"a PNG with the brightness curve gAMA = 1, and sRGB's is"),
        (png(QUARTERS, 2, (b"gAMA", struct.pack(">I", 55_556))), r"a PNG with the brightness curve gAMA = 0.55556"),
    ],
)
def test_numbers_without_an_agreed_white_are_refused(file: bytes, reason: str) -> None:
    for said in (decode(file)[1], fault(file)):
        assert said.startswith(f"undecodable image: {reason}")
    assert decode(file)[0] is None and pictures.pixels(file) == 0


@pytest.mark.parametrize("chunk", [(b"gAMA", struct.pack(">I", 45_455)), (b"gAMA", struct.pack(">I", 45_000))])
def test_a_png_with_the_usual_gamma_is_as_it_is(chunk: tuple[bytes, bytes]) -> None:
    near(right(png(QUARTERS, 2, chunk)), QUARTERS)


def veiled() -> np.ndarray:
    """(32,48,4): red whose left half is transparent, over a hidden blue, and whose right quarter is half transparent."""
    pixels = np.zeros((32, 48, 4), np.uint8)
    pixels[..., 0], pixels[..., 3] = 255, 255
    pixels[:, :24] = (0, 0, 255, 0)
    pixels[:, 36:, 3] = 128
    return pixels


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "AVIF"])
def test_what_is_transparent_is_laid_on_white(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "AVIF" else {}
    found = right(saved(veiled(), kind, **options))
    most = 10 if kind == "AVIF" else 0
    near(found[:, 2:22], WHITE, most)
    near(found[:, 26:34], RED, most)
    near(found[:, 38:], (255, 127, 127), max(most, 1))


def palette(kind: str) -> bytes:
    picture = Image.new("P", (48, 32), 1)
    picture.putpalette([0, 0, 255, 255, 0, 0])
    picture.paste(0, (0, 0, 24, 32))
    return saved(picture, kind, transparency=0)


@pytest.mark.parametrize(
    ("file", "shown"),
    [
        (palette("PNG"), RED),
        (palette("GIF"), RED),
        (png(np.where(np.arange(48)[None, :, None] < 24, BLUE, RED).astype(np.uint8).repeat(32, 0), 2,
             (b"tRNS", struct.pack(">HHH", *BLUE))), RED),
        (png(np.stack([np.full((32, 48), 77), np.where(np.arange(48) < 24, 0, 255) + np.zeros((32, 1))], -1).astype(np.uint8), 4),
         (77, 77, 77)),
        (png(np.where(np.arange(48) < 24, 9, 77).astype(np.uint8)[None].repeat(32, 0), 0, (b"tRNS", struct.pack(">H", 9))),
         (77, 77, 77)),
    ],
    ids=["palette PNG", "palette GIF", "RGB with a transparent colour", "grey and alpha", "grey with a transparent grey"],
)  # fmt: skip
def test_every_way_to_be_transparent_shows_white(file: bytes, shown: tuple[int, int, int]) -> None:
    found = right(file)
    near(found[:, :24], WHITE)
    near(found[:, 24:], shown)


def test_a_wholly_transparent_picture_is_none() -> None:
    hidden = np.dstack([QUARTERS, np.zeros((32, 48), np.uint8)])
    for kind in ("PNG", "WEBP"):
        assert decode(saved(hidden, kind)) == (None, "undecodable image: every pixel of it is transparent")


def test_one_bit_grey_and_cmyk_are_their_colours() -> None:
    bits = np.arange(48 * 32).reshape(32, 48) % 3 == 0
    for kind in ("PNG", "TIFF", "BMP", "GIF"):
        near(right(saved(Image.fromarray(bits), kind)), np.stack([bits * 255] * 3, -1))
    for kind in ("JPEG", "TIFF"):  # Adobe's JPEGs hold the complement, and TIFFs the ink
        found = right(saved(Image.fromarray(QUARTERS).convert("CMYK"), kind))
        for place, colour in (((8, 8), RED), ((8, 40), GREEN), ((24, 8), BLUE), ((24, 40), WHITE)):
            near(found[place], colour, 6)


def profile(space: str) -> bytes:
    """sRGB's ICC profile, or one whose red and green primaries are swapped, so that what is done with it shows."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return data if space == "sRGB" else data.replace(b"rXYZ", b"tmpX").replace(b"gXYZ", b"rXYZ").replace(b"tmpX", b"gXYZ")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_colours_go_from_the_pictures_profile_to_srgb(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind in ("JPEG", "AVIF") else {}
    found = right(saved(QUARTERS, kind, icc_profile=profile("swapped"), **options))
    for place, colour in (((8, 8), GREEN), ((8, 40), RED), ((24, 8), BLUE), ((24, 40), WHITE)):
        near(found[place], colour, 12 if options else 2)
    near(right(saved(QUARTERS, "PNG", icc_profile=profile("sRGB"))), QUARTERS)


def test_a_profile_is_used_under_transparency() -> None:
    found = right(saved(veiled(), "PNG", icc_profile=profile("swapped")))
    near(found[:, :24], WHITE)
    near(found[:, 24:36], GREEN, 2)


@pytest.mark.parametrize("broken", [b"no profile", profile("sRGB")[:200]], ids=["no profile", "cut"])
def test_a_profile_that_cannot_be_read_or_is_for_other_colours_is_none(broken: bytes) -> None:
    near(right(saved(QUARTERS, "PNG", icc_profile=broken)), QUARTERS)
    grey = Image.fromarray(QUARTERS).convert("L")
    near(right(saved(grey, "PNG", icc_profile=profile("swapped"))), np.asarray(grey)[..., None])


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "AVIF", "TIFF"])
def test_more_frames_than_one_are_refused(kind: str) -> None:
    frames = [Image.fromarray(np.roll(QUARTERS, n * 7, 1)) for n in range(3)]
    several = saved(frames[0], kind, save_all=True, append_images=frames[1:])
    for said in (decode(several)[1], fault(several)):
        assert said == f"undecodable image: a {kind} of 3 frames, and a picture is one"
    assert right(saved(frames[0], kind, save_all=True)).shape == (32, 48, 3)


def test_the_first_picture_of_an_mpo_is_the_picture() -> None:
    """As telephones write: a JPEG with a depth map or a gain map behind it."""
    file = saved(QUARTERS, "MPO", save_all=True, append_images=[Image.new("RGB", (48, 32))], quality=95)
    near(right(file)[4:12, 4:20], RED, 8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"])
def test_every_format_is_read_whole_and_refused_when_cut(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    file = saved(noise, kind)
    assert right(file).shape == (32, 48, 3)
    if kind in ("PNG", "BMP", "TIFF", "PPM", "JPEG2000"):
        near(right(file), noise)
    for share in (0.2, 0.6, 0.95):
        picture, reason = decode(file[: int(share * len(file))])
        assert picture is None and reason.startswith("undecodable image: ")


@pytest.mark.parametrize(
    "file",
    [
        b"not a picture",
        b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64),
        b"\xff\x0a" + bytes(32),  # JPEG XL
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",  # Pillow would start Ghostscript
        saved(QUARTERS, "ICO"),
        saved(QUARTERS, "PDF"),
        saved(QUARTERS, "TGA"),
    ],
    ids=["text", "SVG", "HEIC", "JPEG XL", "EPS", "ICO", "PDF", "TGA"],
)
def test_other_formats_are_refused_with_those_that_are_read(file: bytes) -> None:
    for said in (decode(file)[1], fault(file)):
        assert said.startswith("undecodable image: its bytes are no image file") and "JPEG 2000" in said
    assert decode(None) == decode(b"") == (None, "no image")


def announced(width: int, height: int) -> bytes:
    """A PNG whose header says how large it would be."""
    file, head = png(np.zeros((1, 1, 3), np.uint8), 2), struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return file[:16] + head + struct.pack(">I", zlib.crc32(b"IHDR" + head)) + file[33:]


@pytest.mark.filterwarnings("ignore:Image size")  # Pillow's own, from 89 million on
@pytest.mark.parametrize("size", [(13_000, 13_000), (9_000, 9_000), (8_192, 4_097), (100_000, 1_000), (60_000, 60_000)])
def test_too_many_pixels_are_refused_by_the_header(size: tuple[int, int]) -> None:
    for said in (decode(announced(*size))[1], fault(announced(*size))):
        assert said.startswith("undecodable image: ") and "pixels" in said and str(size[0] * size[1])[:2] in said
    assert fault(announced(8_192, 4_096)) == "" and pictures.pixels(announced(8_192, 4_096)) == pictures.MOST_PIXELS


def test_a_path_is_read_below_the_datasets_folder_alone(tmp_path: Path) -> None:
    data, secret = tmp_path / "data", tmp_path / "secret.png"
    (data / "a").mkdir(parents=True)
    secret.write_bytes(saved(QUARTERS, "PNG"))
    (data / "own.png").write_bytes(saved(QUARTERS, "PNG"))
    (data / "link.png").symlink_to(secret)
    (data / "inner.png").symlink_to(data / "own.png")
    for path in ("../own.png", str(data / "own.png"), "../inner.png"):
        near(right(path, folder=data / "a", within=data), QUARTERS)
    for path in ("../../secret.png", str(secret), "../link.png", "/etc/passwd", "../../nowhere.png"):
        picture, reason = decode(path, data / "a", data)
        assert picture is None and f"{path!r} lies outside of the dataset's folder" in reason
        assert "pairs.outside = true" in reason
    near(right("../../secret.png", folder=data / "a", within=None), QUARTERS)
    assert decode("own.png")[1] == "'own.png' is a path, and here the bytes of an image file are read"


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "folder.png", "zero.png"):
        assert decode(name, tmp_path) == (None, f"{name!r} is no regular file")
    (tmp_path / "loop.png").symlink_to("loop.png")
    for name in ("none.png", "none/none.png", "loop.png", "x" * 300, "a\0b", "https://example.org/x.png"):
        picture, reason = decode(name, tmp_path)
        assert picture is None and reason
    assert decode("none.png", tmp_path)[1] == "there is no image file 'none.png'"
