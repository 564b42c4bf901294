"""State dictionaries in .pth files."""

from __future__ import annotations

import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from slim_core.errors import InvalidModelError, SecurityError, SlimError
from slim_sd.wan.pth_files import load_pth

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


class Harmful:
    """Unpickling it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_are_read(tmp_path: Path, zipped: bool) -> None:
    file = tmp_path / "model.pth"
    torch.save(TENSORS, file, _use_new_zipfile_serialization=zipped)
    found = load_pth(file)
    assert list(found) == list(TENSORS)
    for name, value in TENSORS.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def test_a_zipped_file_is_mapped_and_never_written(tmp_path: Path) -> None:
    file = tmp_path / "model.pth"
    torch.save(TENSORS, file)
    before = file.read_bytes()
    found = load_pth(file)
    assert str(file) in Path("/proc/self/maps").read_text()
    found["a.weight"].zero_()
    assert file.read_bytes() == before


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("inside", [False, True])
def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, zipped: bool, inside: bool) -> None:
    file, mark = tmp_path / "model.pth", tmp_path / "mark"
    content: Any = Harmful(mark)
    torch.save({**TENSORS, "x": content} if inside else content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(SecurityError, match="would run code") as caught:
        load_pth(file)
    assert caught.value.where == str(file)
    assert not mark.exists()


def test_a_bare_pickle_is_not_run(tmp_path: Path) -> None:
    file, mark = tmp_path / "model.pth", tmp_path / "mark"
    file.write_bytes(pickle.dumps(Harmful(mark)))
    with pytest.raises(SlimError):
        load_pth(file)
    assert not mark.exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.99])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_file_is_an_error(tmp_path: Path, share: float, zipped: bool) -> None:
    file = tmp_path / "model.pth"
    torch.save({"a": torch.ones(5000)}, file, _use_new_zipfile_serialization=zipped)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InvalidModelError, match="not a complete") as caught:
        load_pth(file)
    assert caught.value.where == str(file)


def test_a_missing_file_and_a_folder_are_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(InvalidModelError, match="missing"):
            load_pth(path)


def test_the_oldest_container_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "model.pth"
    member = tmp_path / "storages"
    member.write_bytes(b"abc")
    with tarfile.open(file, "w:", format=tarfile.PAX_FORMAT) as tar:
        tar.add(member, "storages")
    with pytest.raises(SlimError, match="pth"):
        load_pth(file)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({}, "instead of named tensors"),
        ([torch.ones(2)], "holds a list"),
        (torch.ones(2), "holds a Tensor"),
        ({"model": {"a": torch.ones(2)}}, "entry 'model' is a dict"),
        ({1: torch.ones(2)}, "entry 1"),
        ({"a": torch.ones(2).to_sparse()}, "'a' is not a plain dense one"),
        ({"a": torch.ones(2, device="meta")}, "'a' is not a plain dense one"),
    ],
)
def test_anything_else_than_named_tensors_is_an_error(tmp_path: Path, content: Any, problem: str) -> None:
    file = tmp_path / "model.pth"
    torch.save(content, file)
    with pytest.raises(InvalidModelError, match=problem):
        load_pth(file)
