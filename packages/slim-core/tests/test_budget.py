"""How a memory budget is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from slim_core.budget import UNLIMITED, MemoryBudget, parse_budget
from slim_core.errors import SchemaValidateError
from slim_core.options import make_request
from slim_core.service import QuantRequest


@pytest.mark.parametrize(
    ("text", "host", "device"),
    [
        ("host=8GiB,device=20GiB", 8 << 30, 20 << 30),
        ("device=1GB", None, 10**9),
        ("host=512MiB", 512 << 20, None),
        ("host=3KB", 3000, None),
        ("host=3KiB", 3072, None),
        ("host=5mb", 5 * 10**6, None),
        ("host=4096", 4096, None),
        ("host=4096B", 4096, None),
        ("host=1.5GiB", 3 << 29, None),
        (" device = 2 gib , host = 1 GiB ", 1 << 30, 2 << 30),
    ],
)
def test_sizes(text: str, host: int | None, device: int | None) -> None:
    assert parse_budget(text) == MemoryBudget(host, device)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8GiB", "'8GiB' is no budget; write host=8GiB, device=20GiB, or both"),
        ("", "'' is no budget"),
        ("host=8GiB,", "'' is no budget"),
        ("gpu=8GiB", "'gpu=8GiB' is no budget"),
        ("host=1GiB,host=2GiB", "host is given twice"),
        ("host=", "'' is no size; give a number and one of"),
        ("host=many", "'many' is no size"),
        ("host=8TiBs", "'8TiBs' is no size"),
        ("host=-8GiB", "'-8GiB' is no size"),
        ("host=1e9", "'1e9' is no size"),
        ("host=0", "'0' is no memory at all"),
        ("device=0.0GiB", "'0.0GiB' is no memory at all"),
        ("host=0.1B", "'0.1B' is no memory at all"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(")):
        parse_budget(text)


def test_of_a_request(tmp_path: Path) -> None:
    given = {"model_path": tmp_path, "save_path": tmp_path / "out", "model_type": "any"}
    assert make_request(QuantRequest, given).memory_budget == UNLIMITED
    assert make_request(QuantRequest, given | {"max_memory": "host=2KiB"}).memory_budget == MemoryBudget(2048)
    with pytest.raises(SchemaValidateError, match="'lots' is no budget") as caught:
        make_request(QuantRequest, given | {"max_memory": "lots"})
    assert caught.value.where == "--max_memory"
    assert caught.value.what.startswith("got 'lots': 'lots' is no budget; write host=8GiB")
