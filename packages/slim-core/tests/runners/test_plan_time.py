"""What the plan says of time, and which samples a probe takes."""

from __future__ import annotations

import pytest

from slim_core.runners.plan_time import PlannedTime
from slim_core.runners.probe_parts import typical
from slim_core.sizes import human_time


def test_the_slowest_decides() -> None:
    parts = {"forwards": 480.0, "quantizing": 180.0, "loading weights": 0.5}
    assert PlannedTime(parts, 10, 20).seconds == 660.5
    assert PlannedTime(parts, 700, 20).seconds == 700
    text = PlannedTime(parts, 10, 0.01, took=9.4, guessed=0.25, rough="training").summary()
    assert text == (
        "about 11 min 00 s (forwards 8 min 00 s, quantizing 3 min 00 s, beside it reading 10 s); measured in a probe "
        "of 9.4 s, which did not get to 25% of it; roughly, since training was not tried"
    )
    assert PlannedTime(unknown="nobody knows").summary() == "not predicted: nobody knows"


@pytest.mark.parametrize(
    ("tokens", "numbers"),
    [
        ([256] * 5, [0, 1, 2]),
        ([1, 300, 310, 600], [1, 2, 3]),
        ([7], [0]),
        ([100, 90, 110, 10, 190, 100, 100, 100, 100], [0, 1, 5, 6, 7, 8]),
        ([1] * 20, list(range(8))),
        ([], []),
    ],
)
def test_typical_samples(tokens: list[int], numbers: list[int]) -> None:
    assert typical(tokens) == numbers


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.123, "0.12 s"), (12.4, "12 s"), (59.9, "60 s"), (61, "1 min 01 s"), (3720, "1 h 02 min")]
)
def test_human_time(seconds: float, text: str) -> None:
    assert human_time(seconds) == text
