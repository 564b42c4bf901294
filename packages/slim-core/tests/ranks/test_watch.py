"""Signs of life: who is given up, and who only waits."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable

import pytest

from slim_core.errors import EnvVarError
from slim_core.ranks.watch import Fault, Watch, timeout_of_environment
from slim_core.ranks.world import World, world_of_environment


class Store:
    """What the ranks share, in one process."""

    def __init__(self) -> None:
        self._held: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self._held[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self._held[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self._held for key in keys)


def watched(other: Callable[[int], list[object]] | None, seconds: float = 3) -> Fault | None:
    """What rank 0 says of rank 1, whose n-th sign of life is ``other(n)``, within so many seconds."""
    store, found, said = Store(), threading.Event(), list[Fault]()

    def on_fault(fault: Fault) -> bool:
        said.append(fault)
        found.set()
        return True

    watch = Watch(store, 0, 2, 0.8, on_fault)
    watch.start()
    ends, beat = time.monotonic() + seconds, 0
    while not found.is_set() and time.monotonic() < ends:
        beat += 1
        if other is not None:
            store.set("beat/1", json.dumps([beat, *other(beat)]))
        time.sleep(0.05)
    watch.stop()
    assert watch.fault == (said[0] if said else None)
    return watch.fault


def test_one_that_gets_on() -> None:
    assert watched(lambda beat: [beat, False, "a"]) is None


def test_one_that_waits_for_others() -> None:
    assert watched(lambda _beat: [3, True, "a"]) is None


def test_one_that_hangs() -> None:
    assert watched(lambda _beat: [3, False, "layer 7"]) == Fault(1, "it hangs: no progress for 0.8 s, at layer 7")


@pytest.mark.parametrize("seen", [False, True])
def test_one_that_is_silent(seen: bool) -> None:
    """From the beginning, or from some moment on."""
    store = Store()
    if seen:
        store.set("beat/1", json.dumps([5, 1, False, "layer 7"]))
    watch = Watch(store, 0, 2, 0.8, lambda _fault: True)
    watch.start()
    ends = time.monotonic() + 20
    while watch.fault is None and time.monotonic() < ends:
        time.sleep(0.05)
    watch.stop()
    assert watch.fault == Fault(
        1, f"it has given no sign of life for 0.8 s, at {'layer 7' if seen else 'the beginning'}"
    )


def test_a_store_that_is_gone() -> None:
    """It is that of rank 0."""

    class Gone(Store):
        def set(self, key: str, value: str) -> None:
            raise RuntimeError("connection reset\nmore")

    watch = Watch(Gone(), 1, 2, 0.8, lambda _fault: True)
    watch.start()
    ends = time.monotonic() + 20
    while watch.fault is None and time.monotonic() < ends:
        time.sleep(0.05)
    watch.stop()
    assert watch.fault == Fault(0, "it can no longer be reached (connection reset)")


@pytest.mark.parametrize("text", ["", "0", "-1", "inf", "nan", "soon"])
def test_a_timeout_that_is_none(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("SLIM_RANK_TIMEOUT", text)
    with pytest.raises(EnvVarError, match="SLIM_RANK_TIMEOUT is"):
        timeout_of_environment()


def test_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLIM_RANK_TIMEOUT", raising=False)
    assert timeout_of_environment() == 1800
    monkeypatch.setenv("SLIM_RANK_TIMEOUT", "2.5")
    assert timeout_of_environment() == 2.5


def test_the_place_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert world_of_environment() == World()
    monkeypatch.setenv("RANK", "5")
    assert world_of_environment() == World()
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert world_of_environment() == World(5, 8, 5, 8)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert world_of_environment() == World(5, 8, 1, 4)


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("x", "2"), ("0", "-2"), ("0", "")])
def test_a_place_that_makes_no_sense(monkeypatch: pytest.MonkeyPatch, rank: str, size: str) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(EnvVarError):
        world_of_environment()
