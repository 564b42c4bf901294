"""What the pictures of ``calibImages`` are drawn with: a canvas with smooth edges, Chinese characters, grain."""

from __future__ import annotations

import random
from collections.abc import Sequence

from PIL import Image, ImageChops, ImageDraw, ImageFont

Point = tuple[float, float]
INK, GREY, PALE, WHITE = "#1d2430", "#7b8494", "#e4e8ee", "#ffffff"
BLUE, RED, GREEN, GOLD, VIOLET = "#2f6fb3", "#c8452f", "#3d8b4f", "#e0a526", "#7a4fa3"
FINE = 3  # drawn so many times larger and averaged, which makes edges smooth

# Strokes of characters in a square of 100, since no font for them can be shipped.
STROKES = {
    "一": "8,50 92,50",
    "二": "20,28 80,28|8,80 92,80",
    "三": "18,18 82,18|25,50 75,50|8,84 92,84",
    "四": "14,20 14,86|14,20 86,20 86,86|40,20 39,44 28,62|58,20 58,56 74,57|14,80 86,80",
    "五": "15,14 85,14|46,14 35,86|20,48 72,48 69,86|6,87 94,87",
    "六": "46,4 55,20|8,34 92,34|38,50 30,70 14,92|60,50 72,66 87,92",
    "十": "8,46 92,46|50,6 50,95",
    "日": "25,10 25,92|25,10 75,10 75,92|25,49 75,49|25,88 75,88",
    "月": "30,8 30,58 25,77 12,94|30,8 77,8 77,92 63,87|30,34 77,34|30,60 77,60",
    "年": "32,4 23,24 10,40|26,22 86,22|30,45 82,45|30,45 30,68|6,68 94,68|56,22 56,97",
    "出": "50,5 50,90|22,18 22,47 78,47|78,18 78,50|14,58 14,90 86,90|86,58 86,93",
    "口": "18,20 18,88|18,20 82,20 82,88|18,81 82,81",
    "今": "50,4 34,29 7,52|50,4 66,28 94,50|42,38 56,50|26,62 73,62 60,79 40,96",
    "米": "26,12 37,32|75,12 64,32|8,46 92,46|50,5 50,96|46,50 32,69 9,87|54,50 68,69 93,87",
    "价": "32,4 22,31 5,54|22,34 22,96|64,4 54,25 36,44|64,4 76,23 97,42|54,48 52,72 39,94|77,46 77,96",
    "大": "8,36 92,36|50,5 50,36 42,61 9,95|52,40 65,67 93,95",
    "小": "50,6 50,92 37,85|28,36 21,55 8,73|71,36 81,53 92,73",
    "豆": "14,10 86,10|26,26 26,56|26,26 74,26 74,56|26,52 74,52|33,64 40,82|67,62 58,84|5,90 95,90",
    "元": "24,16 76,16|8,40 92,40|38,40 33,67 8,94|60,40 60,83 68,90 90,88 93,70",
    "斤": "78,6 56,14 28,18|28,18 27,56 10,92|28,44 92,44|64,44 64,96",
    "公": "36,10 28,34 7,54|62,8 72,32 94,50|50,42 38,65 18,87 80,82|66,64 84,95",
    "里": "22,8 22,54|22,8 78,8 78,54|22,29 78,29|22,50 78,50|50,8 50,90|18,70 82,70|5,91 95,91",
    "北": "34,8 34,92|8,36 34,36|5,82 34,68|89,24 74,38 60,46|60,6 60,82 66,90 89,90 93,73",
    "山": "50,8 50,86|16,36 16,87 84,87|84,36 84,93",
    "水": "50,4 50,94 37,86|10,32 41,32 32,57 8,83|85,21 70,36 54,46|54,46 70,68 95,90",
    "田": "16,14 16,92|16,14 84,14 84,92|16,50 84,50|50,14 50,87|16,86 84,86",
}


class Canvas:
    """A picture that is drawn large and averaged down. All lengths are in pixels of the result."""

    def __init__(self, width: int, height: int, color: str | Image.Image = WHITE) -> None:
        size = (width * FINE, height * FINE)
        self.image = color.resize(size) if isinstance(color, Image.Image) else Image.new("RGB", size, color)
        self.pen = ImageDraw.Draw(self.image)

    def line(self, points: Sequence[Point], color: str = INK, width: float = 2) -> None:
        large = [(x * FINE, y * FINE) for x, y in points]
        self.pen.line(large, color, round(width * FINE), joint="curve")
        for x, y in points:  # round ends
            self.circle(x, y, width / 2, color)

    def polygon(self, points: Sequence[Point], color: str) -> None:
        self.pen.polygon([(x * FINE, y * FINE) for x, y in points], color)

    def circle(self, x: float, y: float, radius: float, color: str | None, outline: str | None = None) -> None:
        box = [(x - radius) * FINE, (y - radius) * FINE, (x + radius) * FINE, (y + radius) * FINE]
        self.pen.ellipse(box, color, outline, 2 * FINE)

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        color: str | None,
        outline: str | None = None,
        round_: float = 0,
    ) -> None:
        box = [x * FINE, y * FINE, (x + width) * FINE, (y + height) * FINE]
        self.pen.rounded_rectangle(box, round_ * FINE, color, outline, 2 * FINE)

    def text(self, x: float, y: float, text: str, size: float = 20, color: str = INK, anchor: str = "lm") -> None:
        font = ImageFont.load_default(size * FINE)
        self.pen.text((x * FINE, y * FINE), text, color, font, anchor)

    def strokes(self, x: float, y: float, text: str, size: float, color: str = INK, weight: float = 0.08) -> None:
        """Characters of ``STROKES`` in a row, from their left upper corner; others come from the font."""
        for character in text:
            if character in STROKES:
                for stroke in STROKES[character].split("|"):
                    points = [tuple(map(float, point.split(","))) for point in stroke.split()]
                    self.line([(x + px * size / 100, y + py * size / 100) for px, py in points], color, size * weight)
                x += size * 1.12
            elif character == " ":
                x += size * 0.5
            else:
                self.text(x, y + size * 0.52, character, size, color)
                x += size * 0.62

    def done(self) -> Image.Image:
        return self.image.reduce(FINE)


def graded(width: int, height: int, top: str, bottom: str) -> Image.Image:
    mask = Image.linear_gradient("L").resize((width, height), Image.Resampling.BICUBIC)
    return Image.composite(Image.new("RGB", (width, height), bottom), Image.new("RGB", (width, height), top), mask)


def grained(picture: Image.Image, seed: int, strength: int, size: int) -> Image.Image:
    """With noise such as photographs have: over ``strength`` levels, in grains of ``size`` pixels."""
    width, height = picture.width // size + 1, picture.height // size + 1
    noise = Image.frombytes("L", (width, height), random.Random(seed).randbytes(width * height))
    noise = noise.resize((width * size, height * size), Image.Resampling.BICUBIC).crop((0, 0, *picture.size))
    noise = noise.point([value * strength // 255 for value in range(256)])
    return ImageChops.add(picture, Image.merge("RGB", (noise,) * 3), 1, -(strength // 2))
