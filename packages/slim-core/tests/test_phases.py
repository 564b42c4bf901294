"""Seconds by phase count once, whatever is nested and however it ends; busy seconds are those of any piece of work."""

from __future__ import annotations

from contextlib import suppress

import pytest

from slim_core.phases import Busy, Phase, Profile


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_an_inner_phase_stops_the_outer_one(clock: Clock) -> None:
    profile = Profile(clock)
    clock.now += 1
    with profile.within(Phase.FORWARDS):
        clock.now += 2
        with profile.within(Phase.QUANTIZING):
            clock.now += 4
            with profile.within(Phase.FORWARDS):
                clock.now += 8
        clock.now += 16
    clock.now += 32
    assert profile.spent() == {Phase.REST: 33, Phase.FORWARDS: 26, Phase.QUANTIZING: 4}
    assert sum(profile.spent().values()) == clock.now - 100


def test_an_exception_ends_a_phase(clock: Clock) -> None:
    profile = Profile(clock)
    with suppress(KeyError), profile.within(Phase.FORWARDS), profile.within(Phase.WRITER):
        clock.now += 1
        raise KeyError
    clock.now += 2
    assert profile.spent() == {Phase.WRITER: 1, Phase.REST: 2}


def test_since_an_earlier_look(clock: Clock) -> None:
    profile = Profile(clock)
    with profile.within(Phase.LOADING):
        clock.now += 1
        before = profile.spent()
        clock.now += 2
    with profile.within(Phase.FORWARDS):
        clock.now += 4
    assert profile.spent(before) == {Phase.LOADING: 2, Phase.FORWARDS: 4}


def test_busy_is_not_counted_twice(clock: Clock) -> None:
    busy = Busy(clock)
    with busy.within():
        clock.now += 1
        with busy.within():
            clock.now += 2
        clock.now += 4
        assert busy.seconds == 7
    clock.now += 8
    busy.wait()
    with suppress(KeyError), busy.within():
        clock.now += 16
        raise KeyError
    assert busy.seconds == 23
