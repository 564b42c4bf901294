"""Draws the pictures of ``calibImages``: ``python lab_calib/draw_calib_images.py [FOLDER]``.

Everything is drawn here, from shapes, strokes, the font inside pillow (Aileron, in the public domain) and noise of
fixed seeds, so the pictures are nobody else's, and another run gives the same bytes. The prompts and answers in
``calibImages/index.jsonl`` are written by hand and speak of what is drawn: change both together.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable
from pathlib import Path

from calib_canvas import BLUE, GOLD, GREEN, GREY, INK, PALE, RED, VIOLET, WHITE, Canvas, Point, graded, grained
from PIL import Image, ImageChops, ImageDraw, ImageFilter


def bar_chart() -> Image.Image:
    canvas = Canvas(960, 640)
    canvas.text(480, 44, "Library visits per month", 32, anchor="mm")
    for value in range(0, 501, 100):
        y = 560 - value * 0.88
        canvas.line([(100, y), (920, y)], PALE if value else INK, 1.5)
        canvas.text(88, y, str(value), 18, GREY, "rm")
    visits = {"Jan": 210, "Feb": 180, "Mar": 260, "Apr": 330, "May": 450, "Jun": 390, "Jul": 120}
    for i, (month, value) in enumerate(visits.items()):
        x = 130 + i * 114
        canvas.box(x, 560 - value * 0.88, 70, value * 0.88, RED if value == max(visits.values()) else BLUE)
        canvas.text(x + 35, 544 - value * 0.88, str(value), 18, anchor="mm")
        canvas.text(x + 35, 590, month, 20, anchor="mm")
    return canvas.done()


def line_chart() -> Image.Image:
    canvas = Canvas(1200, 480, "#fbfaf6")
    canvas.text(40, 36, "Temperature in two towns, degrees Celsius", 26)
    for value in range(-10, 31, 10):
        y = 350 - value * 8
        canvas.line([(80, y), (1000, y)], INK if value == 0 else PALE, 1.5)
        canvas.text(68, y, str(value), 17, GREY, "rm")
    towns = {
        "Harbour": (4, 5, 8, 12, 16, 20, 22, 21, 18, 13, 8, 5),
        "Valley": (-8, -5, 2, 9, 16, 22, 26, 24, 17, 9, 1, -6),
    }
    for color, (town, values) in zip((BLUE, RED), towns.items(), strict=True):
        points = [(110 + i * 78.0, 350.0 - value * 8) for i, value in enumerate(values)]
        canvas.line(points, color, 4)
        for x, y in points:
            canvas.circle(x, y, 6, WHITE, color)
        canvas.text(1020, points[-1][1], town, 22, color)
    for i, month in enumerate("JFMAMJJASOND"):
        canvas.text(110 + i * 78, 455, month, 18, GREY, "mm")
    return canvas.done()


def table() -> Image.Image:
    canvas = Canvas(1000, 520)
    canvas.text(40, 44, "Ferry timetable, summer", 30)
    rows = (
        ("Boat", "Departs", "Arrives", "Seats", "Price"),
        ("Petrel", "07:15", "08:40", "120", "14.50"),
        ("Heron", "09:30", "10:35", "80", "18.00"),
        ("Petrel", "12:00", "13:25", "120", "14.50"),
        ("Osprey", "15:45", "16:30", "40", "26.00"),
        ("Heron", "19:10", "20:15", "80", "18.00"),
    )
    for i, row in enumerate(rows):
        y = 90 + i * 66
        canvas.box(40, y, 920, 66, BLUE if i == 0 else ("#f2f5f9", WHITE)[i % 2], PALE)
        for j, cell in enumerate(row):
            right = j > 2
            x = (60, 300, 480, 780, 930)[j]
            canvas.text(x, y + 34, cell, 24, WHITE if i == 0 else INK, "rm" if right else "lm")
    return canvas.done()


def page() -> Image.Image:
    canvas = Canvas(827, 1169, "#fdfdfb")
    canvas.text(90, 120, "How bees find their way", 40)
    canvas.text(90, 170, "A short introduction", 22, GREY)
    canvas.line([(90, 200), (737, 200)], GREY, 1.5)
    paragraphs = (
        "A bee that leaves its hive for the first time does not fly straight to a flower. It turns round, looks at "
        "the entrance, and flies in growing arcs. In these few minutes it learns what its home looks like.",
        "Later it uses three things: the position of the sun, the pattern of polarised light in the sky, which our "
        "eyes cannot see, and landmarks such as trees and fences. If clouds hide the sun, a small patch of blue is "
        "enough.",
        "Back in the hive it tells others where it has been. The direction of its dance on the comb gives the angle "
        "to the sun, and the length of the waggling run gives the distance: about one second for each kilometre.",
    )
    y = 250.0
    for number, paragraph in enumerate(paragraphs, 1):
        canvas.text(90, y, f"{number}. " + ("Learning", "Steering", "Telling")[number - 1], 26)
        y += 44
        for line in wrapped(paragraph, 62):
            canvas.text(90, y, line, 20)
            y += 32
        y += 28
    canvas.box(90, y, 300, 190, "#eef3ea", GREY)
    canvas.circle(240, y + 95, 60, "#f6d36b", GOLD)
    canvas.line([(240, y + 150), (240, y + 40)], INK, 3)
    canvas.polygon([(228, y + 48), (252, y + 48), (240, y + 24)], INK)
    canvas.text(415, y + 96, "Figure 1. The waggling run", 18, GREY)
    canvas.text(413, 1120, "7", 18, GREY, "mm")
    return canvas.done()


def wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def form() -> Image.Image:
    canvas = Canvas(700, 900, "#f7f4ec")
    canvas.text(350, 60, "Bicycle repair order", 34, anchor="mm")
    fields = (("Name", "R. Okafor"), ("Telephone", "555 0142"), ("Bicycle", "green touring bike"), ("Due", "14 May"))
    for i, (label, value) in enumerate(fields):
        canvas.text(60, 140 + i * 84, label, 18, GREY)
        canvas.box(60, 156 + i * 84, 580, 44, WHITE, GREY, 4)
        canvas.text(76, 179 + i * 84, value, 24, "#24418f")
    for i, (label, ticked) in enumerate(
        (("Brakes", True), ("Gears", False), ("New tyre, rear", True), ("Lights", False))
    ):
        y = 510 + i * 56
        canvas.box(60, y, 32, 32, WHITE, INK, 3)
        if ticked:
            canvas.line([(66, y + 16), (74, y + 26), (90, y + 2)], "#24418f", 4)
        canvas.text(112, y + 17, label, 24)
    canvas.line([(60, 830), (400, 830)], GREY, 1.5)
    canvas.text(60, 850, "Signature", 16, GREY)
    curve = [(80 + t * 2.6, 800 - 26 * math.sin(t / 6) - 10 * math.sin(t / 2.3)) for t in range(100)]
    canvas.line(curve, "#24418f", 2.5)
    canvas.box(480, 770, 160, 60, None, RED, 6)
    canvas.text(560, 801, "URGENT", 26, RED, "mm")
    return grained(canvas.done(), 7, 14, 2)


def town_map() -> Image.Image:
    canvas = Canvas(1000, 800, "#efece2")
    canvas.line([(-20, 620), (180, 560), (380, 610), (620, 520), (820, 560), (1020, 470)], "#a9cfe8", 70)
    canvas.box(90, 90, 260, 200, "#c4dfb2", None, 20)
    canvas.text(220, 190, "Elm Park", 24, GREEN, "mm")
    streets: dict[str, list[Point]] = {
        "Mill Road": [(0, 380), (1000, 330)],
        "Station Street": [(430, 0), (470, 800)],
        "Quay Lane": [(760, 0), (720, 800)],
        "": [(0, 720), (1000, 700)],
    }
    for width, color in ((30, "#cfc8b8"), (24, WHITE)):
        for points in streets.values():
            canvas.line(points, color, width)
    canvas.text(600, 351, "Mill Road", 18, GREY, "mm")
    canvas.text(486, 240, "Station Street", 18, GREY)
    canvas.text(770, 660, "Quay Lane", 18, GREY)
    for x, y, w, h in (
        (530, 40, 80, 60),
        (640, 80, 70, 110),
        (820, 90, 120, 80),
        (540, 400, 80, 60),
        (180, 420, 120, 60),
    ):
        canvas.box(x, y, w, h, "#d9cdb9", "#bdae95")
    for x, y, color, label in ((486, 140, RED, "Station"), (850, 250, VIOLET, "Museum"), (240, 660, BLUE, "Harbour")):
        canvas.circle(x, y, 16, color, WHITE)
        canvas.text(x + 24, y, label, 22, color)
    canvas.polygon([(930, 640), (914, 690), (930, 678), (946, 690)], INK)
    canvas.text(930, 622, "N", 22, anchor="mm")
    canvas.line([(60, 770), (220, 770)], INK, 4)
    canvas.text(240, 770, "200 m", 18)
    return canvas.done()


def settings() -> Image.Image:
    canvas = Canvas(1280, 720, "#cfd6df")
    canvas.box(140, 60, 1000, 600, WHITE, GREY, 14)
    canvas.box(140, 60, 1000, 48, "#2b3340", None, 14)
    for i, color in enumerate(("#e5695a", "#e6b94b", "#63b364")):
        canvas.circle(172 + i * 28, 84, 8, color)
    canvas.text(640, 85, "Settings", 20, WHITE, "mm")
    canvas.box(142, 108, 240, 550, "#f1f3f6")
    for i, name in enumerate(("General", "Display", "Sound", "Network", "Privacy", "About")):
        if name == "Sound":
            canvas.box(154, 128 + i * 54, 216, 44, BLUE, None, 8)
        canvas.text(176, 151 + i * 54, name, 20, WHITE if name == "Sound" else INK)
    canvas.text(430, 150, "Sound", 30)
    for i, (name, level) in enumerate((("Volume", 0.7), ("Microphone", 0.25))):
        y = 220 + i * 80
        canvas.text(430, y, name, 20)
        canvas.line([(620, y), (1020, y)], PALE, 6)
        canvas.line([(620, y), (620 + 400 * level, y)], BLUE, 6)
        canvas.circle(620 + 400 * level, y, 13, WHITE, BLUE)
        canvas.text(1050, y, f"{round(level * 100)} %", 18, GREY)
    for i, (name, on) in enumerate((("Mute at night", True), ("Sound at start", False), ("Mono", False))):
        y = 380 + i * 56
        canvas.text(430, y, name, 20)
        canvas.box(1020, y - 14, 56, 28, GREEN if on else "#b8c0cb", None, 14)
        canvas.circle(1062 if on else 1034, y, 11, WHITE)
    canvas.box(820, 590, 130, 44, WHITE, GREY, 8)
    canvas.text(885, 613, "Cancel", 20, anchor="mm")
    canvas.box(970, 590, 130, 44, BLUE, None, 8)
    canvas.text(1035, 613, "Apply", 20, WHITE, "mm")
    return canvas.done()


def mountains() -> Image.Image:
    canvas = Canvas(1280, 800, graded(1280, 800, "#5d93cf", "#f3dcc0"))
    canvas.circle(980, 170, 70, "#fff3c4")
    for level, height, color, seed in ((430, 190, "#8fa3bd", 1), (500, 130, "#6b86a0", 2), (570, 70, "#587a63", 3)):
        chance = random.Random(seed)
        waves = [
            (chance.uniform(0.5, 1) / k, k * chance.uniform(0.003, 0.006), chance.uniform(0, 6)) for k in range(1, 9)
        ]
        ridge = [(x, level - height * sum(a * math.sin(f * x + p) for a, f, p in waves) / 2) for x in range(0, 1281, 4)]
        canvas.polygon([(0, 800), *ridge, (1280, 800)], color)
    canvas.polygon([(0, 800), (0, 640), (500, 610), (1280, 660), (1280, 800)], "#6f9a4c")
    canvas.box(300, 560, 170, 110, "#b5573f")
    canvas.polygon([(280, 562), (385, 480), (490, 562)], "#5a3a31")
    canvas.box(360, 610, 46, 60, "#3f2b25")
    for x in (318, 418):
        canvas.box(x, 582, 34, 30, "#fbe7a1", "#3f2b25")
    for x, y, size in ((120, 660, 1.0), (640, 665, 1.2), (1090, 690, 1.5)):
        canvas.box(x - 8 * size, y - 40 * size, 16 * size, 60 * size, "#5b4030")
        for i in range(3):
            top, half = y - (150 - 40 * i) * size, (34 + 14 * i) * size
            canvas.polygon([(x - half, top + 60 * size), (x, top), (x + half, top + 60 * size)], "#2f5f3a")
    return grained(canvas.done(), 9, 34, 5)


def street_at_night() -> Image.Image:
    canvas = Canvas(480, 720, graded(480, 720, "#0d1330", "#3b2f55"))
    canvas.circle(370, 90, 38, "#f4efcf")
    canvas.circle(386, 80, 34, "#121739")
    chance = random.Random(4)
    for _ in range(60):
        canvas.circle(chance.uniform(0, 480), chance.uniform(0, 240), chance.uniform(0.5, 1.6), "#dfe4ff")
    for x, width, top, color in (
        (0, 120, 260, "#1b1f33"),
        (112, 140, 180, "#242942"),
        (250, 110, 300, "#191d30"),
        (352, 128, 220, "#222740"),
    ):
        canvas.box(x, top, width, 420, color)
        for wx in range(x + 16, x + width - 20, 30):
            for wy in range(top + 20, 590, 42):
                canvas.box(wx, wy, 16, 24, "#f2c35a" if chance.random() < 0.4 else "#30364f")
    canvas.polygon([(0, 720), (0, 620), (480, 620), (480, 720)], "#2a2a33")
    for x in range(20, 480, 90):
        canvas.box(x, 668, 44, 6, "#cfcfd6")
    canvas.line([(60, 640), (60, 420), (100, 420)], "#0a0a10", 7)
    canvas.circle(104, 428, 13, "#ffe9a8")
    canvas.box(230, 612, 150, 44, RED, None, 16)
    canvas.polygon([(262, 616), (284, 584), (336, 584), (356, 616)], "#8c2c1f")
    for x in (264, 346):
        canvas.circle(x, 658, 17, "#0d0d12", GREY)
    picture = canvas.done()
    glow = picture.point([max(0, value - 150) * 2 for value in range(256)] * 3).filter(ImageFilter.GaussianBlur(9))
    return grained(ImageChops.add(picture, glow), 11, 26, 1)


def fruit() -> Image.Image:
    canvas = Canvas(640, 640, graded(640, 640, "#d9c9ae", "#a88a63"))
    canvas.polygon([(0, 640), (0, 400), (640, 370), (640, 640)], "#7c5637")
    picture = canvas.done()
    for x, y, radius, color in (
        (210, 380, 105, "#c23324"),
        (400, 350, 90, "#e38a1e"),
        (330, 470, 80, "#7fa32e"),
        (500, 460, 62, "#e38a1e"),
    ):
        shadow = Image.new("L", picture.size)
        ImageDraw.Draw(shadow).ellipse([x - radius, y + radius * 0.55, x + radius * 1.5, y + radius * 1.15], 150)
        picture.paste("#2c1c10", mask=shadow.filter(ImageFilter.GaussianBlur(radius / 6)))
        ball = ball_of(radius, color)
        picture.paste(ball, (x - radius, y - radius), ball.getchannel("A"))
    pen = ImageDraw.Draw(picture)
    pen.line([(210, 290), (222, 250)], "#4a321d", 7)
    pen.polygon([(222, 262), (262, 236), (284, 252), (250, 272)], "#5c8a34")
    return grained(picture.filter(ImageFilter.GaussianBlur(0.8)), 13, 22, 2)


def ball_of(radius: int, color: str) -> Image.Image:
    """A lit sphere on a transparent square."""
    size = 2 * radius
    light = (
        Image.radial_gradient("L")
        .resize((3 * size, 3 * size))
        .crop((int(size * 1.2), int(size * 1.25), int(size * 2.2), int(size * 2.25)))
    )
    dark = Image.new("RGB", (size, size), "#1a0f08")
    body = Image.composite(
        dark, Image.new("RGB", (size, size), color), light.point([min(235, int(v * 2.1)) for v in range(256)])
    )
    shine = Image.new("L", (size, size))
    ImageDraw.Draw(shine).ellipse([size * 0.24, size * 0.18, size * 0.42, size * 0.34], 170)
    body.paste("#ffffff", mask=shine.filter(ImageFilter.GaussianBlur(radius / 9)))
    mask = Image.new("L", (4 * size, 4 * size))
    ImageDraw.Draw(mask).ellipse([0, 0, 4 * size - 1, 4 * size - 1], 255)
    body.putalpha(mask.reduce(4))
    return body


def exit_sign() -> Image.Image:
    canvas = Canvas(800, 280, "#0f7a46")
    canvas.box(16, 16, 768, 248, None, WHITE, 18)
    canvas.strokes(60, 62, "出口", 150, WHITE)
    canvas.text(480, 188, "EXIT", 56, WHITE, "mm")
    canvas.line([(420, 110), (640, 110)], WHITE, 16)
    canvas.polygon([(630, 66), (720, 110), (630, 154)], WHITE)
    return canvas.done()


def trail_sign() -> Image.Image:
    canvas = Canvas(720, 560, graded(720, 560, "#bcd8ec", "#e9f1e2"))
    canvas.polygon([(0, 560), (0, 470), (720, 440), (720, 560)], "#7fa65a")
    canvas.box(340, 60, 44, 460, "#6b4a2f")
    canvas.polygon([(60, 170), (130, 90), (620, 90), (620, 250), (130, 250)], "#a9774a")
    canvas.strokes(150, 132, "北山 3 公里", 72, "#2c1a0d")
    canvas.polygon([(660, 360), (590, 280), (100, 280), (100, 440), (590, 440)], "#b58353")
    canvas.strokes(130, 322, "水田 5 公里", 72, "#2c1a0d")
    return grained(canvas.done(), 17, 24, 3)


def price_board() -> Image.Image:
    canvas = Canvas(640, 800, "#23382f")
    canvas.box(14, 14, 612, 772, None, "#a7763f", 8)
    canvas.strokes(124, 60, "今日米价", 84, "#f4f1e6", 0.07)
    canvas.line([(60, 180), (580, 180)], "#f4f1e6", 3)
    for i, (name, price) in enumerate((("大米", "6"), ("小米", "9"), ("大豆", "5"))):
        y = 230 + i * 170
        canvas.strokes(70, y, name, 96, "#f7e08a", 0.07)
        canvas.text(370, y + 50, price, 92, "#ffffff", "mm")
        canvas.strokes(420, y + 22, "元", 62, "#f4f1e6", 0.07)
        canvas.strokes(500, y + 40, "一斤", 40, "#f4f1e6", 0.07)
    return grained(canvas.done(), 19, 30, 2)


def calendar() -> Image.Image:
    """November 2026, which begins on a Sunday."""
    canvas = Canvas(700, 620)
    canvas.box(0, 0, 700, 110, RED)
    canvas.strokes(150, 30, "2026 年 十一月", 50, WHITE)
    for column, name in enumerate("日一二三四五六"):
        canvas.strokes(48 + column * 92, 130, name, 34, RED if column in (0, 6) else INK)
    for day in range(1, 31):
        row, column = divmod(day - 1, 7)
        x, y = 65 + column * 92, 225 + row * 82
        if day == 18:
            canvas.circle(x, y, 34, GOLD)
        canvas.text(x, y, str(day), 30, RED if column in (0, 6) else INK, "mm")
    return canvas.done()


def shapes() -> Image.Image:
    canvas = Canvas(224, 224, "#f4f4f4")
    canvas.circle(60, 60, 36, RED)
    canvas.box(124, 24, 72, 72, BLUE)
    canvas.polygon([(60, 128), (22, 196), (98, 196)], GREEN)
    star = [
        (160 + r * math.sin(k * math.pi / 5), 164 - r * math.cos(k * math.pi / 5))
        for k in range(10)
        for r in ((42, 18)[k % 2],)
    ]
    canvas.polygon(star, GOLD)
    return canvas.done()


def receipt() -> Image.Image:
    canvas = Canvas(320, 1000, "#fcfbf7")
    canvas.text(160, 60, "CORNER BAKERY", 28, anchor="mm")
    canvas.text(160, 98, "3 Mill Road", 18, GREY, "mm")
    items = (
        ("Rye bread", 420),
        ("Rolls x 6", 330),
        ("Apple cake", 385),
        ("Oat biscuits", 275),
        ("Coffee", 260),
        ("Jam, plum", 495),
    )
    for i, (name, cents) in enumerate((*items, ("TOTAL", sum(cents for _, cents in items)))):
        y = 180 + i * 70 + (40 if name == "TOTAL" else 0)
        size = 28 if name == "TOTAL" else 22
        canvas.text(30, y, name, size)
        canvas.text(290, y, f"{cents / 100:.2f}", size, anchor="rm")
    canvas.line([(30, 595), (290, 595)], INK, 2)
    chance, x = random.Random(5), 40.0
    while x < 276:
        width = chance.choice((2, 3, 5))
        canvas.box(x, 780, width, 110, INK)
        x += width + chance.choice((2, 4))
    canvas.text(160, 930, "Thank you", 22, anchor="mm")
    return canvas.done()


PICTURES: dict[str, Callable[[], Image.Image]] = {
    "bar-chart.png": bar_chart,
    "calendar-zh.png": calendar,
    "exit-sign-zh.png": exit_sign,
    "form.jpg": form,
    "fruit.jpg": fruit,
    "line-chart.png": line_chart,
    "map.png": town_map,
    "mountains.jpg": mountains,
    "page.png": page,
    "price-board-zh.jpg": price_board,
    "receipt.png": receipt,
    "settings.png": settings,
    "shapes.png": shapes,
    "street-at-night.jpg": street_at_night,
    "table.png": table,
    "trail-sign-zh.jpg": trail_sign,
}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        picture = draw()
        if name.endswith(".png"):
            # 256 colours are more than the drawings have, apart from their soft edges.
            picture.quantize(256, dither=Image.Dither.NONE).save(folder / name, optimize=True)
        else:
            picture.save(folder / name, quality=85)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "calibImages")
