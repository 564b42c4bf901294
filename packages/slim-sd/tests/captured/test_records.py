"""Opening calibration inputs: whether they are of this model and these settings, names of files, choice of steps."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from slim_core.errors import InvalidDatasetError, SchemaValidateError
from slim_sd.captured.archive import RecordArchive
from slim_sd.captured.recorder import Recorder, forward_parameters
from slim_sd.captured.records import Records, find_records, open_records, records_file, sidecar_file

SETTINGS = {"size": "1280*720", "frame_num": 121, "prompt": "a fox", "sample_shift": None}
CONFIG = {"in_channels": 4, "text_dim": 6, "patch_size": [1, 2, 2]}


class Transformer(nn.Module):
    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = True
    ) -> None: ...


NAMES = forward_parameters(Transformer())


def _call(step: float, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(1, 4, 2, 3, 3, generator=generator),
        "timestep": torch.tensor([step]),
        "encoder_hidden_states": torch.randn(1, 5, 6, generator=generator),
        "return_dict": False,
    }


def _captured(path: Path, steps: Sequence[float] = (3.0, 3.0, 2.0, 2.0)) -> Path:
    module = Transformer()
    with Recorder(module, path, fingerprint="model", settings=SETTINGS):
        for seed, step in enumerate(steps):
            module(**_call(step, seed))
    return path


def _foreign(path: Path, *changes: dict[str, Any]) -> Path:
    """A file without sidecar, its calls changed."""
    torch.save([list((_call(1.0) | change).values()) for change in changes or ({},)], path)
    return path


def _open(path: Path, **changes: Any) -> Records:
    return open_records(path, **({"parameters": NAMES, "fingerprint": "model", "settings": SETTINGS} | changes))


def test_what_was_captured_comes_back(tmp_path: Path) -> None:
    records = _open(_captured(tmp_path / "calib_data.pth"))
    assert (len(records), records.path) == (4, tmp_path / "calib_data.pth")
    for seed, (record, step) in enumerate(zip(records, (3.0, 3.0, 2.0, 2.0), strict=True)):
        expected = _call(step, seed)
        assert list(record) == list(expected)
        for name, value in expected.items():
            assert torch.equal(record[name], value) if isinstance(value, Tensor) else record[name] is value
    assert records[-1]["timestep"].item() == 2
    assert [record["timestep"].item() for record in records[1:3]] == [3, 2]
    assert isinstance(records[1:3], Records)
    assert records.identity == _open(tmp_path / "calib_data.pth").identity != records[1:3].identity
    assert records.identity != _open(_captured(tmp_path / "other.pth", (3.0, 3.0, 2.0, 1.0))).identity
    with pytest.raises(IndexError):
        records[4]
    outline = records.outline(3)
    assert outline["hidden_states"].is_meta
    assert outline["hidden_states"].shape == (1, 4, 2, 3, 3)


def test_a_record_is_read_when_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _captured(tmp_path / "calib_data.pth")
    read: list[int] = []
    own = RecordArchive.read

    def counted(archive: RecordArchive, stored: Any) -> Tensor:
        read.append(stored.offset)
        return own(archive, stored)

    monkeypatch.setattr(RecordArchive, "read", counted)
    records = _open(tmp_path / "calib_data.pth")
    assert read == []
    records.outline(0)
    assert read == []
    records[2]
    assert len(read) == 3


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"fingerprint": "another"}, "the model is another one or has changed"),
        ({"settings": SETTINGS | {"size": "832*480"}}, r"size was '1280\*720' and is '832\*480'"),
        ({"settings": SETTINGS | {"seed": 1}}, "seed was not given and is 1"),
        ({"settings": {"size": "1280*720", "frame_num": 121, "prompt": "a fox"}}, "sample_shift was None and is not g"),
        ({"settings": SETTINGS | {"prompt": "x" * 500}}, r"prompt was 'a fox' and is 'x{75}\.\.\.'"),
        ({"parameters": [*NAMES, "guidance"]}, "forward took .*return_dict and takes .*return_dict, guidance"),
    ],
)
def test_another_model_or_other_settings(
    tmp_path: Path, changes: dict[str, Any], difference: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = _captured(tmp_path / "calib_data.pth")
    with pytest.raises(InvalidDatasetError, match=difference) as caught:
        _open(path, **changes)
    assert "--reuse_calib" in str(caught.value)
    assert "delete" in str(caught.value)
    assert caught.value.where == str(path)
    with caplog.at_level(logging.WARNING, logger="slim"):
        records = _open(path, reuse=True, **changes)
    assert list(records[0]) == NAMES
    assert "although it is of another capture" in caplog.text


def test_all_differences_are_told_at_once(tmp_path: Path) -> None:
    path = _captured(tmp_path / "calib_data.pth")
    with pytest.raises(InvalidDatasetError, match=r"model is another .*; frame_num was 121 and is 81; prompt was "):
        _open(path, fingerprint="b", settings=SETTINGS | {"frame_num": 81, "prompt": "a cat"})


def test_settings_are_compared_as_they_are_written(tmp_path: Path) -> None:
    module, path = Transformer(), tmp_path / "a.pth"
    settings = {"size": (720, 1280), "image": Path("a.png"), "guidance": 5.0}
    with Recorder(module, path, fingerprint="model", settings=settings):
        module(**_call(1.0))
    _open(path, settings=settings)
    _open(path, settings=dict(reversed(settings.items())), fingerprint=None)
    with pytest.raises(InvalidDatasetError, match="guidance was"):
        _open(path, settings=settings | {"guidance": 5.5})


def test_what_is_not_told_is_not_compared(tmp_path: Path) -> None:
    path = _captured(tmp_path / "calib_data.pth")
    assert len(_open(path, settings=None)) == len(_open(path, fingerprint=None)) == 4
    with pytest.raises(InvalidDatasetError, match="the model is another"):
        _open(path, settings=None, fingerprint="another")
    with pytest.raises(InvalidDatasetError, match="size was"):
        _open(path, settings={}, fingerprint=None)


def test_reuse_does_not_help_where_arguments_are_unknown(tmp_path: Path) -> None:
    path = _captured(tmp_path / "calib_data.pth")
    with pytest.raises(InvalidDatasetError, match="does not take: return_dict"):
        _open(path, parameters=NAMES[:3], reuse=True)


def test_reuse_does_not_help_where_shapes_do_not_fit(tmp_path: Path) -> None:
    path = _captured(tmp_path / "calib_data.pth")
    with pytest.raises(InvalidDatasetError, match="8 channels"):
        _open(path, fingerprint="b", reuse=True, config=CONFIG | {"in_channels": 8})


def test_a_file_that_is_not_that_of_its_sidecar(tmp_path: Path) -> None:
    path, other = _captured(tmp_path / "calib_data.pth"), _captured(tmp_path / "other.pth", (9.0,))
    other.replace(path)
    with pytest.raises(InvalidDatasetError, match="its sidecar belongs to another file"):
        _open(path)
    assert len(_open(path, reuse=True)) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b" " * (2 << 20)])
def test_a_damaged_sidecar(tmp_path: Path, content: bytes) -> None:
    path = _captured(tmp_path / "calib_data.pth")
    sidecar_file(path).write_bytes(content)
    with pytest.raises(InvalidDatasetError, match=r"damaged") as caught:
        _open(path)
    assert caught.value.where == str(tmp_path / "calib_data.json")
    assert len(_open(path, reuse=True)) == 4


@pytest.mark.parametrize("key", ["format_version", "parameters", "fingerprint", "settings", "file"])
@pytest.mark.parametrize("value", [None, 7, "x", [], {"a": 1}])
def test_a_sidecar_of_another_make(tmp_path: Path, key: str, value: Any) -> None:
    path = _captured(tmp_path / "calib_data.pth")
    about = json.loads(sidecar_file(path).read_text())
    sidecar_file(path).write_text(json.dumps(about | {key: value}))
    with pytest.raises(InvalidDatasetError, match="of another capture"):
        _open(path)
    if key != "parameters":
        assert list(_open(path, reuse=True)[0]) == NAMES


def test_a_file_without_sidecar(tmp_path: Path) -> None:
    path = _foreign(tmp_path / "calib_data.pth", {}, {"timestep": torch.tensor([2])})
    records = _open(path, config=CONFIG)
    assert len(records) == 2
    assert list(records[1]) == NAMES
    assert torch.equal(records[0]["hidden_states"], _call(1.0)["hidden_states"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_states": torch.zeros(1, 5, 2, 3, 3)}, r"tensor of shape \[1, 5, 2, 3, 3\], and .* 4 channels"),
        ({"hidden_states": torch.zeros(1, 4)}, "floats with 3 to 6 dimensions"),
        ({"hidden_states": torch.zeros(1, 4, 2, 3, 3, dtype=torch.int64)}, "floats with 3 to 6"),
        ({"hidden_states": [torch.zeros(4, 2, 3, 3)]}, "hidden_states is a list"),
        ({"timestep": torch.zeros(1, 1, 2, 3)}, "a number or a tensor"),
        ({"timestep": None}, "timestep is a NoneType"),
        ({"encoder_hidden_states": torch.zeros(1, 5, 7)}, "6 numbers per token"),
        ({"encoder_hidden_states": torch.zeros(5, 6)}, "with 3 or 4 dimensions"),
        ({"guidance": 1}, r"record 1 has 5 arguments, .* takes 4: hidden_states, timestep"),
    ],
)
def test_a_file_of_another_model(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    path = _foreign(tmp_path / "calib_data.pth", {}, change)
    with pytest.raises(InvalidDatasetError, match=reason) as caught:
        _open(path, config=CONFIG)
    assert "record 1" in str(caught.value)
    assert "delete the file" in str(caught.value)


@pytest.mark.parametrize("shape", [(1, 9, 4), (1, 4, 3, 3), (1, 4, 2, 3, 3), (1, 2, 4, 3, 3)])
def test_layouts_of_latents(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = _foreign(tmp_path / "calib_data.pth", {"hidden_states": torch.zeros(shape)})
    assert _open(path, config=CONFIG)[0]["hidden_states"].shape == shape


@pytest.mark.parametrize(("value", "reason"), [(float("nan"), "NaN"), (-float("inf"), "infinite")])
def test_numbers_that_calibrate_nothing(tmp_path: Path, value: float, reason: str) -> None:
    states = torch.zeros(1, 4, 2, 3, 3)
    states[0, 1, 1, 2, 2] = value
    records = _open(_foreign(tmp_path / "calib_data.pth", {}, {"hidden_states": states}))
    assert len(records[0]) == 4
    with pytest.raises(InvalidDatasetError, match=f"{reason}.*delete the file") as caught:
        records[1]
    assert caught.value.where == f"{records.path}, record 1, argument hidden_states"


def test_numbers_inside_of_containers(tmp_path: Path) -> None:
    bad = [{"a": (torch.tensor([1.0, float("nan")]),)}]
    torch.save([[torch.zeros(1), bad]], tmp_path / "a.pth")
    with pytest.raises(InvalidDatasetError, match=r"argument b\[0\]\['a'\]\[0\]: a calibration input has NaN"):
        _open(tmp_path / "a.pth", parameters=["a", "b"])[0]


def _named(folder: Path, *names: str) -> Callable[..., str | None]:
    folder.mkdir()
    for name in names:
        (folder / name).touch()

    def found(*arguments: Any) -> str | None:
        path = find_records(folder, *arguments)
        return None if path is None else path.name

    return found


def test_names_of_files(tmp_path: Path) -> None:
    experts = ("high_noise_model", "low_noise_model")
    assert records_file(tmp_path) == tmp_path / "calib_data.pth"
    assert records_file(tmp_path, experts[0]) == tmp_path / "calib_data_high_noise_model.pth"
    assert sidecar_file(records_file(tmp_path, experts[0])).name == "calib_data_high_noise_model.json"
    assert find_records(tmp_path / "nothing") is None
    assert _named(tmp_path / "a")() is None
    assert _named(tmp_path / "b", "calib_data.pth", "calib_data_t2v_.pth")() == "calib_data.pth"
    assert _named(tmp_path / "c", "calib_data_t2v-1.3B_.pth", "other_.pth")() == "calib_data_t2v-1.3B_.pth"
    two = _named(tmp_path / "d", "calib_data_t2v-A14B_high_noise_model.pth", "calib_data_low_noise_model.pth")
    assert two("high_noise_model", experts) == "calib_data_t2v-A14B_high_noise_model.pth"
    assert two("low_noise_model", experts) == "calib_data_low_noise_model.pth"
    assert two() is None
    both = _named(tmp_path / "e", "calib_data_t2v_.pth", "calib_data_t2v-1.3B_.pth")
    with pytest.raises(InvalidDatasetError, match=r"calib_data_t2v-1\.3B_\.pth, calib_data_t2v_\.pth"):
        both()


def test_steps_are_consecutive_calls_of_equal_time(tmp_path: Path) -> None:
    records = _open(_captured(tmp_path / "calib_data.pth", (3.0, 3.0, 2.0, 2.5, 2.5, 2.5, 3.0)))
    assert records.steps() == [[0, 1], [2], [3, 4, 5], [6]]
    assert records[1:4].steps() == [[0], [1], [2]]


def test_equal_times_that_are_stored_apart(tmp_path: Path) -> None:
    """Files of msModelSlim hold every tensor as often as it was passed; tokens may have their own time."""
    times = [
        torch.tensor([1.0]),
        torch.tensor([1.0]),
        torch.tensor([[1.0, 0.0]]),
        torch.tensor([[1.0, 0.0]]),
        5,
        5,
        5.5,
    ]
    path = _foreign(tmp_path / "calib_data.pth", *({"timestep": time} for time in times))
    assert _open(path).steps() == [[0, 1], [2, 3], [4, 5], [6]]


def test_without_a_time_every_call_is_a_step(tmp_path: Path) -> None:
    torch.save([[torch.zeros(1), None]] * 3, tmp_path / "a.pth")
    assert _open(tmp_path / "a.pth", parameters=["a", "b"]).steps() == [[0], [1], [2]]


@given(steps=st.integers(1, 40), count=st.integers(1, 50), branches=st.integers(1, 3))
def test_steps_are_evenly_spread(steps: int, count: int, branches: int) -> None:
    chosen = _evenly(steps, count, branches)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(steps, count)
    if count == 1:
        assert chosen == [(steps - 1) // 2]
    elif count >= steps:
        assert chosen == list(range(steps))
    else:
        assert (chosen[0], chosen[-1]) == (0, steps - 1)
        for place, step in enumerate(chosen):
            assert abs(step - place * (steps - 1) / (count - 1)) <= 0.5


def _evenly(steps: int, count: int, branches: int) -> list[int]:
    class Archive:
        def __init__(self) -> None:
            self.path = Path("none")
            self.records = [[step] for step in range(steps) for _ in range(branches)]

        def load(self, value: Any) -> Any:
            return value

    records = Records(Archive(), ["timestep"])  # pyright: ignore
    chosen = [record["timestep"] for record in records.evenly(count)]
    assert all(chosen.count(step) == branches for step in chosen)
    return chosen[::branches]


def test_both_branches_of_guidance_stay(tmp_path: Path) -> None:
    steps = [time for time in (9.0, 7.0, 5.0, 3.0, 1.0) for _ in range(2)]
    records = _open(_captured(tmp_path / "calib_data.pth", steps))
    few = records.evenly(3)
    assert [record["timestep"].item() for record in few] == [9, 9, 5, 5, 1, 1]
    for seed, record in zip((0, 1, 4, 5, 8, 9), few, strict=True):
        assert torch.equal(record["hidden_states"], _call(0.0, seed)["hidden_states"])
    assert [record["timestep"].item() for record in few.evenly(2)] == [9, 9, 1, 1]
    assert len(records.evenly(None)) == len(records.evenly(5)) == len(records.evenly(500)) == 10
    for count in (0, -3):
        with pytest.raises(SchemaValidateError, match=f"{count} time steps"):
            records.evenly(count)
