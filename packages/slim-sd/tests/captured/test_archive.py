"""Files of calibration inputs that are hostile, damaged or of another kind, and reading exactly what was saved."""

from __future__ import annotations

import io
import os
import pickle
import random
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slim_core.errors import InvalidDatasetError, SecurityError, SlimError, UnsupportedError
from slim_core.memory import peak_memory
from slim_sd.captured import archive as record_archive
from slim_sd.captured.archive import RecordArchive, directory_digest


def _save(path: Path, records: Any, **options: Any) -> Path:
    torch.save(records, path, **options)
    return path


def _entries(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _pack(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def _pickled(path: Path, content: bytes, storages: dict[str, bytes] | None = None) -> Path:
    """An archive around a pickle, as a version of torch without calculated offsets wrote it."""
    entries = {"a/data.pkl": content, "a/byteorder": b"little", "a/version": b"3\n"}
    return _pack(path, entries | {f"a/data/{key}": data for key, data in (storages or {}).items()})


def _load_all(path: Path) -> list[Any]:
    archive = RecordArchive(path)
    return [archive.load(record) for record in archive.records]


class Calls:
    """Unpickled, it calls something."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._made_of = function, arguments

    def __reduce__(self) -> Any:
        return self._made_of


def _hostile(target: Path) -> dict[str, Any]:
    command = f"touch {target}"
    return {
        "command": Calls(os.system, command),
        "in a dict": {"a": [({"b": Calls(os.system, command)},)]},
        "in place of a record": Calls(os.system, command),
        "eval": Calls(eval, f"open({str(target)!r}, 'w')"),
        "exec": Calls(exec, f"open({str(target)!r}, 'w')"),
        "attribute": Calls(getattr, Path, "touch"),
        "import": Calls(__import__, "antigravity"),
        "open": Calls(open, str(target), "w"),
        "torch": Calls(torch.save, [1], str(target)),
        "beside tensors": [torch.zeros(2), Calls(os.system, command)],
    }


@pytest.mark.parametrize("kind", sorted(_hostile(Path())))
@pytest.mark.parametrize("protocol", [2, 4])
def test_hostile_pickles_have_no_effect(tmp_path: Path, kind: str, protocol: int) -> None:
    target = tmp_path / "harm"
    payload = _hostile(target)[kind]
    records = [[1], payload] if kind == "in place of a record" else [[torch.zeros(3), payload]]
    path = _save(tmp_path / "calib_data.pth", records, pickle_protocol=protocol)
    with pytest.raises(SecurityError, match="to be run when it is read; it was not") as caught:
        RecordArchive(path)
    assert not target.exists()
    assert caught.value.where == str(path)
    # the file is what it is taken for: read carelessly, it does harm
    if kind in ("command", "eval", "exec", "open", "torch"):
        torch.load(path, weights_only=False)
        assert target.exists()


def test_hostile_global_is_named(tmp_path: Path) -> None:
    path = _save(tmp_path / "calib_data.pth", [[Calls(os.system, "true")]])
    with pytest.raises(SecurityError, match=r"wants (posix|nt)\.system to be run"):
        RecordArchive(path)


def test_what_a_program_allows_elsewhere_is_not_allowed_here(tmp_path: Path) -> None:
    target = tmp_path / "harm"
    path = _save(tmp_path / "calib_data.pth", [[Calls(_touch, str(target))]])
    with torch.serialization.safe_globals([_touch]):
        torch.load(path, weights_only=True)
        assert target.exists()
        target.unlink()
        with pytest.raises(SecurityError):
            RecordArchive(path)
    assert not target.exists()


def _touch(path: str) -> None:
    Path(path).touch()


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_bare_pickle(tmp_path: Path, protocol: int) -> None:
    target = tmp_path / "harm"
    path = tmp_path / "calib_data.pth"
    path.write_bytes(pickle.dumps([[Calls(os.system, f"touch {target}")]], protocol=protocol))
    with pytest.raises(SlimError):
        RecordArchive(path)
    assert not target.exists()


def test_the_old_format_of_torch(tmp_path: Path) -> None:
    path = _save(tmp_path / "calib_data.pth", [[torch.zeros(2)]], _use_new_zipfile_serialization=False)
    with pytest.raises(SecurityError, match="bare pickle"):
        RecordArchive(path)


@dataclass
class _Storage:
    key: str
    numel: int
    kind: Any = torch.FloatStorage


class _Claims:
    """A tensor that claims any size, whatever its data is."""

    def __init__(self, numel: int, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> None:
        self._storage = _Storage("0", numel)
        self._rest = offset, size, stride, False, OrderedDict()

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, (self._storage, *self._rest)


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return ("storage", obj.kind, obj.key, "cpu", obj.numel) if isinstance(obj, _Storage) else None


def _claiming(path: Path, value: Any, storage: bytes = bytes(40)) -> Path:
    stream = io.BytesIO()
    _Pickler(stream, 2).dump([[value]])
    return _pickled(path, stream.getvalue(), {"0": storage})


def test_an_honest_claim(tmp_path: Path) -> None:
    path = _claiming(tmp_path / "a.pth", _Claims(10, (2, 3), (3, 1), 4), torch.arange(10.0).numpy().tobytes())
    assert _load_all(path)[0][0].tolist() == [[4, 5, 6], [7, 8, 9]]


@pytest.mark.parametrize(
    "claim",
    [
        _Claims(1 << 40, (1 << 40,), (1,)),
        _Claims(1 << 40, (2,), (1,)),
        _Claims(11, (11,), (1,)),
        _Claims(9, (9,), (1,)),
        _Claims(10, (11,), (1,)),
        _Claims(10, (10,), (1,), 1),
        _Claims(10, (4,), (4,)),
        _Claims(10, (1 << 40,), (0,)),
        _Claims(10, (1 << 20, 1 << 20), (0, 0)),
        _Claims(10, (1 << 62, 4), (0, 0)),
        _Claims(10, (2,), (1,), -1),
        _Claims(10, (-2,), (1,)),
        _Claims(-10, (2,), (1,)),
        _Claims(10, (1 << 70,), (1,)),
    ],
)
def test_claims_that_the_data_does_not_cover(tmp_path: Path, claim: _Claims) -> None:
    path = _claiming(tmp_path / "a.pth", claim)
    before = peak_memory()
    with pytest.raises((SecurityError, InvalidDatasetError), match=r"claims|damaged"):
        RecordArchive(path)
    assert peak_memory() - before < 16 << 20


def test_a_storage_that_is_not_there(tmp_path: Path) -> None:
    entries = _entries(_save(tmp_path / "a.pth", [[torch.arange(10.0)]]))
    del entries["a/data/0"]
    with pytest.raises(SlimError):
        RecordArchive(_pack(tmp_path / "b.pth", entries))


def test_shared_lists_that_unfold_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert record_archive._MAX_VALUES == 1_000_000
    monkeypatch.setattr(record_archive, "_MAX_VALUES", 1000)
    laughs: list[Any] = [0]
    for _ in range(18):
        laughs = [laughs] * 10
    with pytest.raises(SecurityError, match="more than 1000 values"):
        RecordArchive(_save(tmp_path / "a.pth", [[laughs]]))


def test_lists_that_lie_in_each_other(tmp_path: Path) -> None:
    deep: Any = 1
    for _ in range(20):
        deep = [deep]
    assert _load_all(_save(tmp_path / "a.pth", [[deep]])) == [[deep]]
    with pytest.raises(SecurityError, match="20 deep"):
        RecordArchive(_save(tmp_path / "b.pth", [[[deep]]]))
    knot: list[Any] = []
    knot.append(knot)
    with pytest.raises(SecurityError, match="20 deep"):
        RecordArchive(_save(tmp_path / "c.pth", [knot]))
    endless = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
    with pytest.raises(SlimError):
        RecordArchive(_pickled(tmp_path / "d.pth", endless))


def test_compressed_archives(tmp_path: Path) -> None:
    """Small files that unpack to large ones."""
    entries = _entries(_save(tmp_path / "a.pth", [[torch.zeros(1_000_000)]]))
    with pytest.raises(InvalidDatasetError, match="compressed"):
        RecordArchive(_pack(tmp_path / "b.pth", entries, zipfile.ZIP_DEFLATED))


def test_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _save(tmp_path / "a.pth", [[torch.zeros(1000)]])
    monkeypatch.setattr(record_archive, "MAX_FILE_BYTES", 4000)
    with pytest.raises(SecurityError, match=r"KiB, more than the 3\.9 KiB"):
        RecordArchive(path)
    monkeypatch.undo()
    monkeypatch.setattr(record_archive, "_MAX_PICKLE_BYTES", 100)
    with pytest.raises(SecurityError, match="structure of the file takes"):
        RecordArchive(path)
    assert record_archive.MAX_FILE_BYTES == 64 << 30


def test_truncated_files(tmp_path: Path) -> None:
    content = _save(tmp_path / "a.pth", [[torch.arange(1000.0), "text"]] * 3).read_bytes()
    path = tmp_path / "b.pth"
    for length in [*range(0, 64, 7), *range(64, len(content), 97), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(InvalidDatasetError, match="damaged or was not written by torch"):
            RecordArchive(path)


def test_damaged_files_never_surprise(tmp_path: Path) -> None:
    """Whatever bytes change: the file is read, or refused with an error of the family."""
    records = [[torch.arange(20.0), {"a": torch.arange(4).expand(2, 4)}, ("b", None, 1.5)], [torch.zeros(0), {}, ()]]
    content = _save(tmp_path / "a.pth", records).read_bytes()
    path, refused = tmp_path / "b.pth", 0
    chance = random.Random(0)
    for _ in range(600):
        damaged = bytearray(content)
        for _ in range(chance.choice([1, 1, 1, 3])):
            damaged[chance.randrange(len(damaged))] = chance.choice([0, 1, 0x28, 0x2E, 0x51, 0x52, 0x74, 0xFF, 0x80])
        path.write_bytes(damaged)
        try:
            _load_all(path)
        except SlimError:
            refused += 1
    assert 60 < refused < 540


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.eye(3).to_sparse(), "a sparse tensor"),
        (torch.eye(3).to_sparse_csr(), "a sparse tensor"),
        (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "a quantized tensor"),
        (torch.empty(3, device="meta"), "a tensor without data"),
        (nn.Parameter(torch.ones(2)), "a parameter"),
        (torch.zeros(2).to(torch.float8_e4m3fn), "a tensor of an unusual type"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "a nested tensor"),
    ],
)
def test_tensors_that_are_no_inputs(tmp_path: Path, value: Tensor, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=f"the file holds {reason}"):
        RecordArchive(_save(tmp_path / "a.pth", [[value]]))


@pytest.mark.parametrize("value", [torch.float32, torch.device("cpu"), {1, 2}, 1j, slice(3), nn.Linear(1, 1)])
def test_values_that_are_no_inputs(tmp_path: Path, value: Any) -> None:
    with pytest.raises(SecurityError):
        RecordArchive(_save(tmp_path / "a.pth", [[value]]))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([], "it holds no record"),
        ({"a": [1]}, "it holds dict where a list of records belongs"),
        (torch.zeros(2), "it holds torch.Tensor"),
        ([[1], torch.zeros(2)], "record 1 is torch.Tensor, not a list of arguments"),
        ([{"hidden_states": 1}], "record 0 is dict"),
        ([[1, {1.5: 2}]], r"record 0, argument 1: float is the key"),
    ],
)
def test_files_of_another_kind(tmp_path: Path, content: Any, reason: str) -> None:
    with pytest.raises(InvalidDatasetError, match=reason):
        RecordArchive(_save(tmp_path / "a.pth", content))


def test_state_dicts_are_no_records(tmp_path: Path) -> None:
    with pytest.raises((InvalidDatasetError, SecurityError)):
        RecordArchive(_save(tmp_path / "a.pth", nn.Linear(2, 2).state_dict()))


def test_paths(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "empty").touch()
    for name, reason in {
        "folder": "not a regular file",
        "pipe": "not a regular file",
        "dangling": "No such file",
        "nothing": "No such file",
        "empty": "damaged",
    }.items():
        with pytest.raises(InvalidDatasetError, match=reason) as caught:
            RecordArchive(tmp_path / name)
        assert caught.value.where == str(tmp_path / name)
    (tmp_path / "link").symlink_to(_save(tmp_path / "a.pth", [[1]]))
    assert _load_all(tmp_path / "link") == [[1]]


def test_big_endian_files(tmp_path: Path) -> None:
    entries = _entries(_save(tmp_path / "a.pth", [[torch.zeros(1)]]))
    with pytest.raises(UnsupportedError, match="big-endian"):
        RecordArchive(_pack(tmp_path / "b.pth", entries | {"a/byteorder": b"big"}))


_DTYPES = "float64 float32 float16 bfloat16 complex64 complex128 int64 int32 int16 int8 uint8 bool".split()  # noqa: SIM905


@pytest.mark.parametrize("repacked", [False, True], ids=["as torch wrote it", "storages not aligned"])
def test_what_is_read_is_what_was_saved(tmp_path: Path, repacked: bool) -> None:
    base = torch.arange(60).reshape(3, 4, 5)
    records: list[list[Any]] = []
    for name in _DTYPES:
        tensor = (base % 7).to(getattr(torch, name))
        views = [
            tensor,
            tensor[1:, ::2],
            tensor.transpose(0, 2),
            tensor[2, 3, 4],
            tensor[:0],
            tensor[:1].expand(9, 4, 5),
        ]
        records.append(
            [views, tuple(views), {"a": views, 3: None}, OrderedDict(x=1), True, 7, 2.5, "text", torch.Size([2])]
        )
    path = _save(tmp_path / "a.pth", records)
    if repacked:
        entries = _entries(path)
        del entries["a/.format_version"]  # says that places can be calculated
        path = _pack(tmp_path / "b.pth", {"a/odd": b"x", **entries})
    _assert_same(_load_all(path), torch.load(tmp_path / "a.pth", weights_only=True))
    archive = RecordArchive(path)
    outline = archive.outline(archive.records[0])
    assert [tensor.shape for tensor in outline[0]] == [tensor.shape for tensor in records[0][0]]
    assert all(tensor.is_meta and tensor.dtype is torch.float64 for tensor in outline[0])


def _assert_same(one: Any, other: Any) -> None:
    if isinstance(other, Tensor):
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        assert torch.equal(one, other)
    elif isinstance(other, dict):
        assert list(one) == list(other)
        for key, value in other.items():
            _assert_same(one[key], value)
    elif isinstance(other, (list, tuple)):
        assert isinstance(one, list if isinstance(other, list) else tuple)
        for a, b in zip(one, other, strict=True):
            _assert_same(a, b)
    else:
        assert one == other
        assert type(one) is type(other)


def test_what_is_read_may_be_written_to(tmp_path: Path) -> None:
    path = _save(tmp_path / "a.pth", [[torch.zeros(5)]])
    archive = RecordArchive(path)
    archive.load(archive.records[0])[0].fill_(3)
    assert archive.load(archive.records[0])[0].tolist() == [0] * 5
    assert torch.load(path)[0][0].tolist() == [0] * 5


def test_a_file_that_changes_while_it_is_used(tmp_path: Path) -> None:
    path = _save(tmp_path / "a.pth", [[torch.zeros(5000)]])
    archive = RecordArchive(path)
    os.replace(_save(tmp_path / "b.pth", [[torch.ones(5000)]]), path)
    assert archive.load(archive.records[0])[0].tolist() == [0] * 5000
    archive = RecordArchive(path)
    os.truncate(path, 5000)
    with pytest.raises(SlimError, match="cut off while it was in use"):
        archive.load(archive.records[0])


def test_digests_tell_files_apart(tmp_path: Path) -> None:
    one = directory_digest(_save(tmp_path / "a.pth", [[torch.zeros(5)]]))
    assert one == RecordArchive(tmp_path / "a.pth").digest
    assert re.fullmatch("[0-9a-f]{64}", one)
    other = torch.zeros(5)
    other[4] = 1e-30
    assert directory_digest(_save(tmp_path / "b.pth", [[other]])) != one
    assert directory_digest(_save(tmp_path / "c.pth", [[torch.zeros(5), 1]])) != one
