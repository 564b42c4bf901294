"""Device strings and what becomes of them on machines with and without accelerators."""

from __future__ import annotations

import builtins
import importlib
import logging
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slim_core import devices
from slim_core.devices import Devices, free_device_memory, free_host_memory, parse_device, resolve_devices
from slim_core.errors import EnvError, SchemaValidateError

GRAMMAR: list[tuple[str, tuple[str, tuple[int, ...]]]] = [
    ("npu", ("npu", ())),
    ("cpu", ("cpu", ())),
    ("cuda", ("cuda", ())),
    ("npu:", ("npu", ())),
    ("npu: ", ("npu", ())),
    ("npu:0", ("npu", (0,))),
    ("npu:0,1,2,3", ("npu", (0, 1, 2, 3))),
    ("npu:3,1", ("npu", (3, 1))),
    ("npu: 0 , 1,,2", ("npu", (0, 1, 2))),
    ("cuda:,7,", ("cuda", (7,))),
    ("cpu:0", ("cpu", (0,))),
    ("cpu:0,1", ("cpu", (0, 1))),
    ("npu:007", ("npu", (7,))),
]


@pytest.mark.parametrize(("text", "parts"), GRAMMAR)
def test_device_strings(text: str, parts: tuple[str, tuple[int, ...]]) -> None:
    assert parse_device(text) == parts


REFUSED = [
    ("", "unknown device ''"),
    (" npu", "unknown device"),
    ("NPU", "unknown device 'NPU'.*use one of npu, cuda, cpu"),
    ("gpu:0", "unknown device"),
    ("npu0", "unknown device"),
    (":0", "unknown device"),
    ("npu:,", "must be numbers, got ','"),
    ("npu: , ,", "must be numbers"),
    ("npu:a", "must be numbers, got 'a'.*write npu:0 or npu:0,1"),
    ("npu:0,x", "must be numbers"),
    ("npu:1.0", "must be numbers"),
    ("npu:-1", "must be numbers"),
    ("npu:+1", "must be numbers"),
    ("npu:0:1", "must be numbers"),
    ("npu:0 1", "must be numbers"),
    ("npu:٣", "must be numbers"),
    ("npu:²", "must be numbers"),
    ("npu:" + "9" * 5000, "must be numbers"),
    ("npu:0,0", "index is repeated"),
    ("npu:1,01", "index is repeated"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_refused_device_strings(text: str, message: str) -> None:
    with pytest.raises(SchemaValidateError, match=message) as caught:
        parse_device(text)
    assert caught.value.where == "--device"


@given(st.sampled_from(["npu", "cuda"]), st.lists(st.integers(0, 99), unique=True))
def test_what_is_written_is_read(kind: str, indices: list[int]) -> None:
    assert parse_device(f"{kind}:{','.join(map(str, indices))}") == (kind, tuple(indices))


@given(st.text("npucda:,0 1-x", max_size=12))
def test_nothing_else_is_raised(text: str) -> None:
    try:
        kind, indices = parse_device(text)
    except SchemaValidateError:
        return
    assert kind in ("npu", "cuda", "cpu")
    assert text.startswith(kind)
    assert all(index >= 0 for index in indices)


def accelerator(count: int, available: bool = True) -> Any:
    return SimpleNamespace(is_available=lambda: available, device_count=lambda: count)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives the machine that many NPUs and GPUs. ``npu=None``: torch_npu is not installed or cannot be imported."""

    def equip(npu: int | None = None, cuda: int = 0, error: type[Exception] = ImportError) -> None:
        def import_module(name: str) -> Any:
            assert name == "torch_npu"
            if npu is None:
                raise error("libascend_hal.so: cannot open shared object file")

        monkeypatch.setattr(importlib, "import_module", import_module)
        monkeypatch.setattr(torch, "cuda", accelerator(cuda, cuda > 0))
        monkeypatch.setattr(torch, "npu", accelerator(npu or 0, bool(npu)), raising=False)

    monkeypatch.setattr(logging.getLogger("slim"), "propagate", True)
    equip()
    return equip


def test_on_a_machine_with_npus(machine: Any, caplog: pytest.LogCaptureFixture) -> None:
    machine(npu=4, cuda=2)
    for explicit in (False, True):
        assert resolve_devices("npu", explicit=explicit) == Devices("npu", (0,))
        assert resolve_devices("npu:1,3", explicit=explicit) == Devices("npu", (1, 3))
        assert resolve_devices("cuda:1", explicit=explicit) == Devices("cuda", (1,))
        assert resolve_devices("cpu", explicit=explicit) == Devices("cpu")
    assert not caplog.records
    with pytest.raises(
        SchemaValidateError, match=r"npu:4 does not exist, this machine has 4 \(indices go from 0 to 3\)"
    ):
        resolve_devices("npu:0,4", explicit=True)
    with pytest.raises(SchemaValidateError, match="cuda:2 does not exist"):
        resolve_devices("cuda:2", explicit=True)


@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError])
def test_the_default_gives_way_loudly(machine: Any, caplog: pytest.LogCaptureFixture, error: type[Exception]) -> None:
    for cuda, kind in ((0, "cpu"), (1, "cuda")):
        machine(cuda=cuda, error=error)
        caplog.clear()
        assert resolve_devices("npu", explicit=False) == Devices(kind, (0,))
        assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
            ("WARNING", f"no NPU here: running on {kind.upper()} (pass --device to choose)")
        ]


def test_an_installed_torch_npu_without_a_device(machine: Any) -> None:
    machine(npu=0)
    assert resolve_devices("npu", explicit=False).kind == "cpu"


def test_a_default_of_another_kind_gives_way_too(machine: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert resolve_devices("cuda", explicit=False) == Devices("cpu")
    assert "no CUDA here: running on CPU" in caplog.text


def test_what_is_asked_for_must_be_there(machine: Any, caplog: pytest.LogCaptureFixture) -> None:
    machine(cuda=0)
    with pytest.raises(
        EnvError, match=r"no npu device on this machine .install the slim-core\[npu\] extra .* --device cpu"
    ):
        resolve_devices("npu", explicit=True)
    with pytest.raises(EnvError, match=r"no cuda device on this machine \(pass --device cpu\)"):
        resolve_devices("cuda:0", explicit=True)
    machine(cuda=8)
    with pytest.raises(EnvError, match="no npu device"):
        resolve_devices("npu:0", explicit=True)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_torch_without_the_module(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(npu=1)
    monkeypatch.delattr(torch, "npu")
    assert resolve_devices("npu", explicit=False).kind == "cpu"


def test_the_index_of_the_cpu_means_nothing(machine: Any) -> None:
    assert resolve_devices("cpu:99", explicit=True) == Devices("cpu", (0,))


def test_names_of_devices() -> None:
    assert str(Devices("cpu")) == "cpu"
    assert str(Devices("cpu", (0, 1))) == "cpu:0,1"
    assert str(Devices("npu", (0, 2))) == "npu:0,2"
    assert Devices("cpu").first == torch.device("cpu")
    assert Devices("cuda", (2, 1)).first == torch.device("cuda", 2)


def test_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < free_host_memory() < physical
    assert abs(free_device_memory(torch.device("cpu")) - free_host_memory()) < physical / 2
    asked: list[torch.device] = []
    memory = SimpleNamespace(mem_get_info=lambda device: asked.append(device) or (5, 9))
    monkeypatch.setattr(torch, "cuda", memory)
    assert free_device_memory(torch.device("cuda", 1)) == 5
    assert asked == [torch.device("cuda", 1)]


def test_free_memory_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_options: Any) -> Any:
        raise FileNotFoundError

    monkeypatch.setattr(builtins, "open", refuse)
    assert devices.free_host_memory() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
