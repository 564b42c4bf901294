"""Pictures of samples: opened, decoded completely, upright, RGB.

Pillow's parsers for JPEG and PNG are used directly. ``Image.open`` has a limit on the number of pixels, but that is a
setting of the whole process and at first only warns; here the header decides.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL import Image, ImageChops
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from slim_core.errors import InvalidDatasetError
from slim_vlm.dataset import ImageSample

__all__ = ["MAX_PIXELS", "check_images", "open_image"]

MAX_PIXELS = 64_000_000

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_THREADS = 4
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What pillow raises on files that are not as they should be; warnings, where somebody made them errors.
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    AttributeError,
    struct.error,
    zlib.error,
    Warning,
)


def open_image(sample: ImageSample) -> Image.Image:
    """The picture of a sample as plain 8-bit RGB, of the size and orientation in which it is looked at.

    The orientation of EXIF is applied, transparency laid on white, 16-bit grey cut to its upper byte. Colour profiles
    are not applied. What is returned carries no metadata, so that nobody turns it a second time.

    Raises:
        InvalidDatasetError: the file cannot be read, is neither JPEG nor PNG, is incomplete or broken, or has more than
            ``MAX_PIXELS`` pixels (which the header tells, so that such a file is not decoded).
    """
    try:
        data = sample.image.read_bytes()
    except OSError as error:
        raise _fault(sample, f"cannot be read: {error.strerror}", "check the file and its permissions") from error
    if not data:
        raise _fault(sample, "is empty", "replace the file")
    try:
        picture = _parse(data)
        size = picture.size if picture else (0, 0)
        if picture and size[0] * size[1] <= MAX_PIXELS:
            return _finish(picture, data)
    except _BROKEN as error:
        raise _fault(sample, f"is incomplete or broken: {error}", "replace the file") from error
    if picture is None:
        raise _fault(sample, "is neither a JPEG nor a PNG file, whatever its name", "convert it to one of these")
    raise _fault(
        sample,
        f"has {size[0]} x {size[1]} pixels, more than {MAX_PIXELS // 10**6} million in all",
        "scale the picture down",
    )


def check_images(samples: Sequence[ImageSample]) -> list[tuple[int, int]]:
    """Open every picture once, so that errors come before a run.

    Returns:
        Width and height of the picture of each sample.

    Raises:
        InvalidDatasetError: of the first sample whose picture :func:`open_image` refuses.
    """
    distinct: dict[str, ImageSample] = {}
    for sample in samples:
        distinct.setdefault(os.path.realpath(sample.image), sample)
    # Pillow decodes outside of the lock of the interpreter. Pictures are dropped at once: at most four are in memory.
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = dict(zip(distinct, pool.map(_size, distinct.values()), strict=True))
    return [sizes[os.path.realpath(sample.image)] for sample in samples]


def _size(sample: ImageSample) -> tuple[int, int]:
    return open_image(sample).size


def _fault(sample: ImageSample, problem: str, remedy: str) -> InvalidDatasetError:
    name = "the picture" if sample.where == str(sample.image) else f"the image {str(sample.image)!r}"
    return InvalidDatasetError(f"{name} {problem}", where=sample.where, remedy=remedy)


def _parse(data: bytes) -> ImageFile | None:
    """The picture with its header read and nothing decoded; None if the file is of another kind."""
    if data.startswith(_PNG):
        return PngImageFile(io.BytesIO(data))
    return JpegImageFile(io.BytesIO(data)) if data.startswith(_JPEG) else None


def _finish(picture: ImageFile, data: bytes) -> Image.Image:
    if isinstance(picture, PngImageFile):
        # Decoding stops at the last pixel and looks at no checksum; this reads all chunks, up to the one at the end.
        PngImageFile(io.BytesIO(data)).verify()
    picture.load()
    turn = _UPRIGHT.get(_orientation(picture))
    plain = _flatten(picture)
    return plain.transpose(turn) if turn is not None else plain


def _orientation(picture: Image.Image) -> int:
    """By EXIF; 1, upright, if it says nothing or cannot be understood, as viewers have it."""
    try:
        value = picture.getexif().get(_ORIENTATION, 1)
    except _BROKEN:
        return 1
    return value if isinstance(value, int) else 1


def _flatten(picture: Image.Image) -> Image.Image:
    """RGB on white, without metadata."""
    if picture.mode.startswith("I"):
        grey, opaque = _from_16_bits(picture)
        picture = Image.merge("LA", (grey, opaque)) if opaque else grey
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        plain = Image.new("RGB", picture.size, "white")
        plain.paste(layer, mask=layer.getchannel("A"))
        return plain
    plain = picture.convert("RGB")
    plain.info.clear()
    return plain


def _from_16_bits(picture: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The upper bytes of 16-bit grey, and where one value stands for transparent, what is opaque.

    ``convert`` would clip to 255 in some versions of pillow.
    """
    wide = picture.convert("I")
    grey = wide.point(lambda value: value * (1 / 256)).convert("L")
    clear = picture.info.get("transparency")
    if not isinstance(clear, int):
        return grey, None
    above = wide.point(lambda value: value * 1 + -clear).convert("L")
    below = wide.point(lambda value: value * -1 + clear).convert("L")
    return grey, ImageChops.lighter(above, below).point(lambda value: 255 if value else 0)
