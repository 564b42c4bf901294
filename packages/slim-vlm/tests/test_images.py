"""Pictures: whatever they are made of comes out as plain RGB, and broken ones are refused."""

from __future__ import annotations

import io
import json
import random
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

import slim_vlm.images
from slim_core.errors import InvalidDatasetError
from slim_vlm.dataset import ImageSample, find_dataset, read_samples
from slim_vlm.images import MAX_PIXELS, check_images, open_image

ROOT = Path(__file__).parents[3]
ORIENTATION = 0x0112
QUALITY = {"quality": 95, "subsampling": 0}


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    size = width * height * len(Image.new(mode, (1, 1)).getbands())
    return Image.frombytes(mode, (width, height), random.Random(0).randbytes(size))


def sample(path: Path) -> ImageSample:
    return ImageSample("list.jsonl:3", path, "What?")


def saved(folder: Path, picture: Image.Image, name: str = "a.png", **options: Any) -> ImageSample:
    picture.save(folder / name, **options)
    return sample(folder / name)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, color: int, rows: bytes, *chunks: bytes) -> bytes:
    """A PNG file from its parts; rows begin with the number of their filter."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    parts = (chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def pixels(picture: Image.Image) -> np.ndarray:
    assert picture.mode == "RGB"
    return np.asarray(picture)


def refusal(broken: ImageSample) -> str:
    with pytest.raises(InvalidDatasetError) as caught:
        open_image(broken)
    assert str(caught.value).startswith(f"{broken.where}: the image '{broken.image}' ")
    assert caught.value.remedy
    return str(caught.value)


class TestKinds:
    def test_rgb(self, tmp_path: Path) -> None:
        picture = noise(7, 5)
        assert np.array_equal(pixels(open_image(saved(tmp_path, picture))), np.asarray(picture))

    @pytest.mark.parametrize("size", [(1, 1), (3000, 1), (1, 3000), (2500, 3)])
    @pytest.mark.parametrize("name", ["a.png", "a.jpg"])
    def test_sizes(self, size: tuple[int, int], name: str, tmp_path: Path) -> None:
        assert open_image(saved(tmp_path, noise(*size), name)).size == size

    @pytest.mark.parametrize("name", ["a.png", "a.jpg"])
    def test_grey(self, name: str, tmp_path: Path) -> None:
        picture = noise(9, 9, "L")
        found = pixels(open_image(saved(tmp_path, picture, name)))
        assert (found == found[..., :1]).all()
        if name == "a.png":
            assert np.array_equal(found[..., 0], np.asarray(picture))

    def test_black_and_white(self, tmp_path: Path) -> None:
        picture = noise(16, 8, "L").convert("1")
        found = pixels(open_image(saved(tmp_path, picture)))
        assert np.array_equal(found[..., 0], np.asarray(picture) * np.uint8(255))

    def test_palette(self, tmp_path: Path) -> None:
        picture = noise(12, 12).quantize(16)
        assert np.array_equal(pixels(open_image(saved(tmp_path, picture))), np.asarray(picture.convert("RGB")))

    @pytest.mark.parametrize("progressive", [False, True])
    def test_jpeg(self, progressive: bool, tmp_path: Path) -> None:
        picture = Image.linear_gradient("L").convert("RGB")
        found = pixels(open_image(saved(tmp_path, picture, "a.jpg", progressive=progressive, **QUALITY)))
        assert np.abs(found.astype(int) - np.asarray(picture)).max() <= 3

    def test_cmyk(self, tmp_path: Path) -> None:
        """No ink is white, cyan takes red away."""
        picture = Image.new("CMYK", (16, 16), (0, 0, 0, 0))
        picture.paste((255, 0, 0, 0), (0, 8, 16, 16))
        found = pixels(open_image(saved(tmp_path, picture, "a.jpg", **QUALITY))).astype(int)
        assert np.abs(found[2, 8] - (255, 255, 255)).max() <= 4
        assert np.abs(found[13, 8] - (0, 255, 255)).max() <= 4

    def test_16_bit_grey_keeps_the_upper_byte(self, tmp_path: Path) -> None:
        values = np.array([0, 1, 255, 256, 257, 4660, 32767, 32768, 65279, 65280, 65535], ">u2")
        (tmp_path / "a.png").write_bytes(png(len(values), 1, 16, 0, b"\0" + values.tobytes()))
        found = pixels(open_image(sample(tmp_path / "a.png")))
        assert (found == (values >> 8)[None, :, None]).all()

    def test_16_bit_colour(self, tmp_path: Path) -> None:
        values = np.array([[65535, 256, 255], [4660, 0, 512]], ">u2")
        (tmp_path / "a.png").write_bytes(png(2, 1, 16, 2, b"\0" + values.tobytes()))
        assert (pixels(open_image(sample(tmp_path / "a.png"))) == (values >> 8)[None]).all()

    def test_the_name_may_be_of_the_other_kind(self, tmp_path: Path) -> None:
        noise(4, 4).save(tmp_path / "a.jpg", "PNG")
        assert open_image(sample(tmp_path / "a.jpg")).size == (4, 4)

    def test_the_first_picture_of_an_animation(self, tmp_path: Path) -> None:
        first, second = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
        found = open_image(saved(tmp_path, first, save_all=True, append_images=[second]))
        assert found.getcolors() == [(16, (255, 0, 0))]

    def test_several_pictures_in_a_jpeg(self, tmp_path: Path) -> None:
        """Telephones write files with a second picture behind the first."""
        first, second = Image.new("RGB", (8, 8), "white"), Image.new("RGB", (8, 8))
        first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second])
        assert open_image(sample(tmp_path / "a.jpg")).getcolors() == [(64, (255, 255, 255))]


class TestTransparency:
    @given(st.lists(st.tuples(*[st.integers(0, 255)] * 4), min_size=1, max_size=8))
    def test_is_laid_on_white(self, values: list[tuple[int, ...]]) -> None:
        picture = Image.frombytes("RGBA", (len(values), 1), bytes(sum(values, ())))
        with TemporaryDirectory() as folder:
            found = pixels(open_image(saved(Path(folder), picture)))
        rgba = np.array(values, float)
        alpha = rgba[:, 3:] / 255
        assert np.abs(found[0] - (rgba[:, :3] * alpha + 255 * (1 - alpha))).max() <= 0.51

    def test_of_grey(self, tmp_path: Path) -> None:
        picture = Image.frombytes("LA", (3, 1), bytes([10, 255, 10, 0, 0, 51]))
        assert pixels(open_image(saved(tmp_path, picture)))[0, :, 0].tolist() == [10, 255, 204]

    def test_of_a_palette(self, tmp_path: Path) -> None:
        picture = Image.frombytes("P", (3, 1), bytes([0, 1, 2]))
        picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
        found = open_image(saved(tmp_path, picture, transparency=bytes([255, 0, 51])))
        assert pixels(found)[0].tolist() == [[255, 0, 0], [255, 255, 255], [204, 204, 255]]

    @pytest.mark.parametrize(
        ("depth", "color", "row", "clear", "expected"),
        [
            (8, 0, bytes([10, 20, 30]), struct.pack(">H", 20), [[10] * 3, [255] * 3, [30] * 3]),
            (8, 2, bytes([1, 2, 3, 4, 5, 6, 1, 2, 9]), struct.pack(">3H", 4, 5, 6), [[1, 2, 3], [255] * 3, [1, 2, 9]]),
            (16, 0, struct.pack(">3H", 300, 301, 299), struct.pack(">H", 300), [[255] * 3, [1] * 3, [1] * 3]),
            (16, 0, struct.pack(">3H", 0, 65535, 300), struct.pack(">H", 0), [[255] * 3, [255] * 3, [1] * 3]),
            (16, 0, struct.pack(">3H", 0, 65535, 300), struct.pack(">H", 65535), [[0] * 3, [255] * 3, [1] * 3]),
        ],
    )
    def test_of_one_value(
        self, depth: int, color: int, row: bytes, clear: bytes, expected: list[list[int]], tmp_path: Path
    ) -> None:
        (tmp_path / "a.png").write_bytes(png(3, 1, depth, color, b"\0" + row, chunk(b"tRNS", clear)))
        assert pixels(open_image(sample(tmp_path / "a.png")))[0].tolist() == expected


# Rows of the upright picture, for each value; the file holds "abc" above "def".
UPRIGHT = {
    1: ("abc", "def"),
    2: ("cba", "fed"),
    3: ("fed", "cba"),
    4: ("def", "abc"),
    5: ("ad", "be", "cf"),
    6: ("da", "eb", "fc"),
    7: ("fc", "eb", "da"),
    8: ("cf", "be", "ad"),
    0: ("abc", "def"),
    9: ("abc", "def"),
}


class TestOrientation:
    @pytest.mark.parametrize("value", UPRIGHT)
    def test_is_applied(self, value: int, tmp_path: Path) -> None:
        picture = Image.frombytes("L", (3, 2), b"abcdef")
        exif = Image.Exif()
        exif[ORIENTATION] = value
        found = open_image(saved(tmp_path, picture, exif=exif))
        rows = tuple(bytes(row[:, 0]).decode() for row in pixels(found))
        assert rows == UPRIGHT[value]
        assert pixels(ImageOps.exif_transpose(found)).tolist() == pixels(found).tolist()  # nobody turns it again

    def test_of_a_jpeg(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[ORIENTATION] = 6
        picture = Image.new("RGB", (40, 20), "white")
        picture.paste("black", (0, 0, 8, 8))
        found = open_image(saved(tmp_path, picture, "a.jpg", exif=exif))
        assert found.size == (20, 40)
        assert [sum(found.getpixel(at)) < 60 for at in ((16, 3), (3, 3), (3, 36), (16, 36))] == [
            True,
            False,
            False,
            False,
        ]

    @pytest.mark.parametrize(
        "exif",
        [
            b"nonsense",
            b"Exif\0\0",
            b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x01A\0\0\0",
            b"Exif\0\0II*\0" + b"\xff" * 9,
        ],
    )
    @pytest.mark.filterwarnings("ignore:.*EXIF data:UserWarning")
    def test_that_nobody_understands_counts_as_none(self, exif: bytes, tmp_path: Path) -> None:
        assert open_image(saved(tmp_path, Image.new("RGB", (3, 2)), "a.jpg", exif=exif)).size == (3, 2)


def test_metadata_is_dropped(tmp_path: Path) -> None:
    found = open_image(saved(tmp_path, noise(3, 3), "a.jpg", comment="secret", dpi=(300, 300), icc_profile=b"x" * 40))
    assert found.info == {}
    assert type(found) is Image.Image


class TestBroken:
    def test_empty(self, tmp_path: Path) -> None:
        (tmp_path / "a.jpg").touch()
        assert "is empty" in refusal(sample(tmp_path / "a.jpg"))

    def test_missing(self, tmp_path: Path) -> None:
        assert "cannot be read: No such file or directory" in refusal(sample(tmp_path / "a.jpg"))
        assert "cannot be read: Is a directory" in refusal(sample(tmp_path))

    @pytest.mark.parametrize("kind", ["GIF", "BMP", "WEBP", "TIFF", "PPM"])
    def test_another_format_whatever_its_name(self, kind: str, tmp_path: Path) -> None:
        noise(4, 4).save(tmp_path / "a.jpg", kind)
        assert "is neither a JPEG nor a PNG file" in refusal(sample(tmp_path / "a.jpg"))

    @pytest.mark.parametrize(
        "content", [b"<html>", b"\0" * 99, b"\xff\xd8", b"\x89PNG", '{"image": 1}'.encode("utf-16")]
    )
    def test_no_picture_at_all(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / "a.jpg").write_bytes(content)
        assert "is neither a JPEG nor a PNG file" in refusal(sample(tmp_path / "a.jpg"))

    def test_the_place_is_named_once_where_there_is_no_list(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jpg"
        path.touch()
        with pytest.raises(InvalidDatasetError) as caught:
            open_image(ImageSample(str(path), path, "x"))
        assert str(caught.value) == f"{path}: the picture is empty (replace the file)"

    @pytest.mark.parametrize("kind", ["baseline", "progressive", "png"])
    def test_cut_anywhere(self, kind: str, tmp_path: Path) -> None:
        """Only the checksum of the very end of a PNG, which guards nothing, can be missing."""
        buffer = io.BytesIO()
        noise(9, 7).save(buffer, "PNG" if kind == "png" else "JPEG", progressive=kind == "progressive")
        whole = buffer.getvalue()
        path = tmp_path / "a.jpg"
        for length in range(1, len(whole) - 4 * (kind == "png")):
            path.write_bytes(whole[:length])
            refusal(sample(path))
        path.write_bytes(whole)
        open_image(sample(path))

    @pytest.mark.parametrize("name", ["a.png", "a.jpg"])
    def test_the_switch_of_pillow_is_left_alone(self, name: str, tmp_path: Path) -> None:
        """It would fill what is missing with grey."""
        whole = saved(tmp_path, noise(40, 40), name).image
        whole.write_bytes(whole.read_bytes()[:-200])
        assert "is incomplete or broken" in refusal(sample(whole))
        assert not ImageFile.LOAD_TRUNCATED_IMAGES

    def test_any_flipped_bit_of_a_png(self, tmp_path: Path) -> None:
        """By its checksums; a bit of those of the end, or of the length of nothing, changes no pixel."""
        path = saved(tmp_path, noise(2, 2)).image
        whole = path.read_bytes()
        for place in range((len(whole) - 12) * 8):
            changed = bytearray(whole)
            changed[place // 8] ^= 1 << place % 8
            path.write_bytes(changed)
            refusal(sample(path))

    @pytest.mark.parametrize("kind", ["JPEG", "PNG"])
    @settings(max_examples=150)
    @given(
        changes=st.lists(st.tuples(st.integers(0, 1400), st.integers(0, 255)), min_size=1, max_size=6),
        more=st.binary(max_size=8),
    )
    @example(changes=[(16, 255), (17, 255)], more=b"")
    def test_anything_else_is_refused_or_opened(self, kind: str, changes: list[tuple[int, int]], more: bytes) -> None:
        """No other error comes out, whatever is overwritten."""
        buffer = io.BytesIO()
        noise(20, 20).save(buffer, kind)
        data = bytearray(buffer.getvalue())
        for place, value in changes:
            data[place % len(data)] = value
        with TemporaryDirectory() as folder, suppress(InvalidDatasetError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = Path(folder, "a.jpg")
            path.write_bytes(data + more)
            assert open_image(sample(path)).mode == "RGB"


class TestHuge:
    @pytest.mark.parametrize("size", [(8001, 8000), (64_000_001, 1), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
    @pytest.mark.filterwarnings("error")
    def test_png(self, size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """By the header: there is nothing to decode."""
        self.forbid_decoding(monkeypatch)
        (tmp_path / "a.png").write_bytes(png(*size, 1, 0, b""))
        assert f"has {size[0]} x {size[1]} pixels, more than 64 million in all" in refusal(sample(tmp_path / "a.png"))

    @pytest.mark.filterwarnings("error")
    def test_jpeg(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forbid_decoding(monkeypatch)
        path = saved(tmp_path, noise(16, 16), "a.jpg").image
        data = bytearray(path.read_bytes())
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", 60_000, 50_000)
        path.write_bytes(data)
        assert "has 50000 x 60000 pixels" in refusal(sample(path))

    @staticmethod
    def forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise AssertionError("decoded")

        monkeypatch.setattr(ImageFile.ImageFile, "load", fail)

    def test_the_limit_is_ours(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """That of pillow neither counts nor changes."""
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
        monkeypatch.setattr(slim_vlm.images, "MAX_PIXELS", 100)
        assert open_image(saved(tmp_path, noise(10, 10))).size == (10, 10)
        refusal(saved(tmp_path, noise(101, 1)))
        assert Image.MAX_IMAGE_PIXELS == 4
        assert MAX_PIXELS == 64_000_000


class TestChecks:
    def test_the_first_in_order_counts(self, tmp_path: Path) -> None:
        """However many are broken, and whichever thread is done first."""
        good = saved(tmp_path, noise(300, 300), "good.png").image
        slow = saved(tmp_path, noise(900, 900), "slow.png").image
        slow.write_bytes(slow.read_bytes()[:-40])
        (tmp_path / "empty.png").touch()
        paths = [good, slow, tmp_path / "empty.png", tmp_path / "missing.png"]
        for order in ([0, 1, 2, 3], [0, 2, 1, 3], [3, 2, 1, 0]):
            samples = [ImageSample(f"l.jsonl:{i}", paths[i], "x") for i in order]
            expected = next(f"l.jsonl:{i}" for i in order if i)
            with pytest.raises(InvalidDatasetError) as caught:
                check_images(samples)
            assert caught.value.where == expected

    def test_every_file_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        one, two = (saved(tmp_path, noise(3, 3), name).image for name in ("1.png", "2.png"))
        (tmp_path / "link.png").symlink_to("1.png")
        opened: list[Path] = []

        def watched(given: ImageSample) -> Image.Image:
            opened.append(given.image)
            return open_image(given)

        monkeypatch.setattr(slim_vlm.images, "open_image", watched)
        check_images([sample(path) for path in (one, two, one, tmp_path / "link.png", tmp_path / "." / "2.png")])
        assert sorted(opened) == [one, two]

    def test_pictures_are_not_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """At most one per thread is alive, however many there are."""
        alive, most, lock = 0, 0, threading.Lock()

        class Picture:
            size = (1, 1)

            def __init__(self) -> None:
                nonlocal alive, most
                with lock:
                    alive += 1
                    most = max(most, alive)

            def __del__(self) -> None:
                nonlocal alive
                with lock:
                    alive -= 1

        monkeypatch.setattr(slim_vlm.images, "open_image", lambda _: Picture())
        check_images([sample(tmp_path / f"{i}.png") for i in range(60)])
        assert alive == 0
        assert most <= 4

    def test_sizes_are_told_for_every_sample(self, tmp_path: Path) -> None:
        """Of the picture as it is looked at."""
        exif = Image.Exif()
        exif[ORIENTATION] = 6
        paths = [saved(tmp_path, noise(3, 5), "1.png").image, saved(tmp_path, noise(8, 2), "2.jpg", exif=exif).image]
        assert check_images([sample(paths[i]) for i in (0, 1, 0)]) == [(3, 5), (2, 8), (3, 5)]
        assert check_images([]) == []


class TestBundledSet:
    def test_it_is_whole(self) -> None:
        """All pictures are listed and can be opened; every sample has a prompt and an answer, in two languages."""
        folder = find_dataset("calibImages")
        samples = read_samples(folder, "", answers=True)
        check_images(samples)
        pictures = {path.name for path in folder.iterdir()} - {"index.jsonl"}
        assert {given.image.name for given in samples} == pictures
        assert len(pictures) >= 12
        assert len({(given.image, given.text) for given in samples}) == len(samples)
        chinese = [given for given in samples if any(character >= "\u4e00" for character in given.text)]
        assert len(samples) / 3 <= len(chinese) <= len(samples) * 2 / 3
        ratios = [width / height for width, height in (open_image(given).size for given in samples)]
        assert min(ratios) < 0.5 < 2 < max(ratios)

    def test_its_beginning_is_a_mixture(self) -> None:
        """Every picture comes once before one comes again."""
        rows = (find_dataset("calibImages") / "index.jsonl").read_text("utf-8").splitlines()
        images = [json.loads(row)["image"] for row in rows]
        distinct = len(set(images))
        assert len(set(images[:distinct])) == distinct

    def test_it_is_small(self) -> None:
        assert sum(path.stat().st_size for path in find_dataset("calibImages").iterdir()) < 1_500_000

    def test_it_is_what_the_script_draws(self, tmp_path: Path) -> None:
        script = ROOT / "lab_calib" / "draw_calib_images.py"
        subprocess.run([sys.executable, "-B", script, tmp_path], check=True, timeout=120)
        folder = find_dataset("calibImages")
        drawn = sorted(path.name for path in tmp_path.iterdir())
        assert drawn == sorted(path.name for path in folder.iterdir() if path.name != "index.jsonl")
        for name in drawn:
            again, bundled = open_image(sample(tmp_path / name)), open_image(sample(folder / name))
            assert np.array_equal(pixels(again), pixels(bundled)), name
