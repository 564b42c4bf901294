"""Recording the calls of a transformer, of pipelines and on its own."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import resource
import signal
import subprocess
import sys
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoModel, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from torch import Tensor, nn

from slim_core.errors import EnvError, InvalidDatasetError, SecurityError, SlimError, UnsupportedError
from slim_sd.captured import files as record_files
from slim_sd.captured.recorder import Recorder, forward_parameters
from slim_sd.captured.records import open_records, sidecar_file
from slim_sd.pipeline.building import build_pipeline

SETTINGS = {"size": "32*32", "sample_steps": 3}


class Layer(nn.Module):
    """A stand-in for a transformer: any values may be passed, and what comes is changed in place."""

    def forward(self, hidden_states: Tensor, timestep: Any = 1, *, extra: Any = None, **others: Any) -> Tensor:
        return hidden_states.add_(1)


def _recorder(module: nn.Module, path: Path) -> Recorder:
    return Recorder(module, path, fingerprint="model", settings=SETTINGS)


def _records(path: Path) -> list[list[Any]]:
    return torch.load(path, weights_only=True)


def _capture(path: Path, *calls: dict[str, Any], module: nn.Module | None = None) -> list[list[Any]]:
    module = Layer() if module is None else module
    with _recorder(module, path):
        for call in calls:
            module(**call)
    return _records(path)


def _left(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []


def _transformer(seed: int) -> WanTransformer3DModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=8,
            freq_dim=16,
            ffn_dim=24,
            num_layers=1,
            rope_max_seq_len=16,
        ).eval()


def _pipeline(**experts: Any) -> Any:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipeline = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, **experts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _generate(pipeline: Any, steps: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        prompt_embeds=torch.randn(1, 512, 8, generator=generator),
        negative_prompt_embeds=torch.randn(1, 512, 8, generator=generator),
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=steps,
        output_type="latent",
        generator=generator,
    ).frames


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and one == other


def test_the_calls_of_a_pipeline(tmp_path: Path) -> None:
    """Latents are bit-equal with and without, and the file holds what somebody else sees who looks at the calls."""
    transformer = _transformer(0)
    pipeline = _pipeline(transformer=transformer)
    seen: list[dict[str, Any]] = []

    def spy(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert not args
        seen.append({name: value.clone() if isinstance(value, Tensor) else value for name, value in kwargs.items()})

    handle = transformer.register_forward_pre_hook(spy, with_kwargs=True)
    plain = _generate(pipeline)
    handle.remove()
    path = tmp_path / "calib" / "calib_data.pth"
    with _recorder(transformer, path) as recorder:
        captured = _generate(pipeline)
        assert _left(path.parent) == [".calib_data.pth.slim-capture"]
    assert torch.equal(plain, captured)
    assert _left(path.parent) == ["calib_data.json", "calib_data.pth"]
    assert not transformer._forward_pre_hooks
    records = open_records(path, parameters=forward_parameters(transformer), fingerprint="model", settings=SETTINGS)
    assert len(recorder) == len(records) == len(seen) == 6
    for record, call in zip(records, seen, strict=True):
        assert list(record) == list(recorder.parameters)
        assert all(_same(record[name], value) for name, value in call.items())
        assert record["encoder_hidden_states_image"] is None
        with torch.no_grad():
            assert torch.equal(transformer(**record)[0], transformer(**call)[0])
    assert records.steps() == [[0, 1], [2, 3], [4, 5]]


FAMILIES = (
    *("wan2_1_t2v", "wan2_1_i2v", "wan2_2_t2v", "wan2_2_i2v", "wan2_2_ti2v"),
    *("flux", "sd3", "hunyuan_video", "qwen_image", "qwen_image_edit", "qwen_image_edit_plus"),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(
    tmp_path: Path,
    family: str,
    pipeline_folder: Callable[..., Path],
    tiny_pipelines: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Capturing changes nothing, and the recorded calls, run again, compute what they did in the pipeline."""
    assert set(FAMILIES) == set(tiny_pipelines.NAMES)
    for module, rest in ((pipeline_qwenimage_edit, (None,)), (pipeline_qwenimage_edit_plus, ())):
        # they bring every picture to a million pixels
        monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio, rest=rest: (64, 64, *rest))
    folder = pipeline_folder(family)
    modules = {
        name: AutoModel.from_pretrained(str(folder), subfolder=name).eval()
        for name in ("transformer", "transformer_2")
        if (folder / name).is_dir()
    }
    pipeline: Any = build_pipeline(folder, modules)
    pipeline.set_progress_bar_config(disable=True)
    plain = pipeline(**tiny_pipelines.arguments(family), return_dict=False)[0]
    transformer, outputs = modules["transformer"], list[Tensor]()
    handle = transformer.register_forward_hook(lambda module, inputs, output: outputs.append(output[0]))
    path = tmp_path / "calib_data.pth"
    with _recorder(transformer, path):
        captured = pipeline(**tiny_pipelines.arguments(family), return_dict=False)[0]
    handle.remove()
    assert torch.equal(plain, captured)
    names = forward_parameters(transformer)
    records = open_records(path, parameters=names, fingerprint="model", settings=SETTINGS)
    assert len(records) == len(outputs) >= 2
    for record, output in zip(records, outputs, strict=True):
        with torch.no_grad():
            assert torch.equal(transformer(**record)[0], output)
    # as a file from elsewhere it fits its own transformer
    sidecar_file(path).unlink()
    open_records(path, parameters=names, fingerprint=None, settings={}, config=transformer.config)


def test_two_transformers_of_one_pipeline(tmp_path: Path) -> None:
    experts = {"transformer": _transformer(0), "transformer_2": _transformer(1)}
    pipeline = _pipeline(**experts, boundary_ratio=0.875)
    plain = _generate(pipeline)
    with (
        _recorder(experts["transformer"], tmp_path / "calib_data_high_noise_model.pth") as high,
        _recorder(experts["transformer_2"], tmp_path / "calib_data_low_noise_model.pth") as low,
    ):
        assert torch.equal(_generate(pipeline), plain)
    assert (len(high), len(low)) == (2, 4)
    for recorder, boundary in ((high, lambda t: t >= 875), (low, lambda t: t < 875)):
        assert len(_records(recorder.path)) == len(recorder)
        assert all(boundary(record[1].item()) for record in _records(recorder.path))


def test_a_transformer_that_no_step_reaches(tmp_path: Path) -> None:
    experts = {"transformer": _transformer(0), "transformer_2": _transformer(1)}
    pipeline = _pipeline(**experts, boundary_ratio=0.875)
    with (
        pytest.raises(InvalidDatasetError, match="never called"),
        _recorder(experts["transformer"], tmp_path / "high.pth"),
        _recorder(experts["transformer_2"], tmp_path / "low.pth"),
    ):
        _generate(pipeline, steps=1)
    assert _left(tmp_path) == []


def test_what_the_sidecar_says(tmp_path: Path) -> None:
    path = tmp_path / "calib_data.pth"
    settings = {"size": (720, 1280), "folder": Path("a"), "seed": 0}
    module = Layer()
    with Recorder(module, path, fingerprint="model", settings=settings):
        module(torch.zeros(2))
    about = json.loads(sidecar_file(path).read_text(encoding="utf-8"))
    assert about["file"].pop("size") == path.stat().st_size
    assert len(about["file"].pop("digest")) == 64
    assert about == {
        "format_version": 1,
        "class_name": "Layer",
        "parameters": ["hidden_states", "timestep", "extra"],
        "fingerprint": "model",
        "settings": {"size": [720, 1280], "folder": "a", "seed": 0},
        "records": 1,
        "file": {},
    }


def test_a_call_is_recorded_before_it_runs(tmp_path: Path) -> None:
    states = torch.zeros(3)
    (first, *_), (second, *_) = _capture(tmp_path / "a.pth", {"hidden_states": states}, {"hidden_states": states})
    assert first.tolist() == [0, 0, 0]
    assert second.tolist() == [1, 1, 1]


def test_positional_and_keyword_arguments_are_one(tmp_path: Path) -> None:
    module, path = Layer(), tmp_path / "calib_data.pth"
    with _recorder(module, path):
        module(torch.zeros(1), 5)
        module(hidden_states=torch.zeros(1), timestep=5)
        module(timestep=5, hidden_states=torch.zeros(1), extra="e")
        module(torch.zeros(1))
    assert [record[1:] for record in _records(path)] == [[5, None], [5, None], [5, "e"], [1, None]]
    assert forward_parameters(module) == ["hidden_states", "timestep", "extra"]


class Colour(IntEnum):
    RED = 3


@dataclass
class Pair:
    left: Any
    right: Any


Point = namedtuple("Point", ["x", "y"])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([1, (2.5, None), {"a": [True, "b"], 3: ()}], [1, (2.5, None), {"a": [True, "b"], 3: ()}]),
        (Pair(1, Pair("a", [2])), {"left": 1, "right": {"left": "a", "right": [2]}}),
        (Point(1, 2), (1, 2)),
        (torch.Size([3, 4]), (3, 4)),
        (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        ([np.float64(0.5), np.float32(0.25), np.int64(7), np.str_("s"), Colour.RED], [0.5, 0.25, 7, "s", 3]),
    ],
)
def test_containers_and_numbers_become_plain(tmp_path: Path, value: Any, expected: Any) -> None:
    found = _capture(tmp_path / "a.pth", {"hidden_states": torch.zeros(1), "extra": value})[0][2]
    assert found == expected
    assert repr(found) == repr(expected)  # types too


def test_tensors_inside_of_containers(tmp_path: Path) -> None:
    output = Transformer2DModelOutput(sample=torch.arange(4.0))
    value = [output, (torch.ones(2, dtype=torch.bool),), {"p": nn.Parameter(torch.full((2,), 2.0))}]
    found = _capture(tmp_path / "a.pth", {"hidden_states": torch.zeros(1), "extra": value})[0][2]
    assert found[0]["sample"].tolist() == [0, 1, 2, 3]
    assert found[1][0].tolist() == [True, True]
    assert type(found[2]["p"]) is Tensor
    assert not found[2]["p"].requires_grad


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool],
)
def test_types_and_layouts(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.arange(24).reshape(2, 3, 4)
    tensors = [
        (values % 5).to(dtype).transpose(0, 2),
        torch.ones((), dtype=dtype).expand(7),
        torch.ones((), dtype=dtype),
        torch.empty((0, 3), dtype=dtype),
        (values.reshape(6, 4) % 3).to(dtype)[::2, 1:],
    ]
    found = _capture(tmp_path / "a.pth", {"hidden_states": torch.zeros(1), "extra": tensors})[0][2]
    for one, other in zip(found, tensors, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_tensors_made_for_inference(tmp_path: Path) -> None:
    module, path = Layer(), tmp_path / "a.pth"
    with _recorder(module, path), torch.inference_mode():
        module(torch.full((3,), 2.0))
    assert _records(path)[0][0].tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.Generator(), "torch._C.Generator cannot"),
        ({1, 2}, "set cannot"),
        (b"bytes", "bytes cannot"),
        (1j, "complex cannot"),
        (torch.float32, "torch.dtype cannot"),
        (torch.eye(2).to_sparse(), "a sparse tensor"),
        (torch.empty(2, device="meta"), "device meta"),
        (torch.zeros(2).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "a quantized tensor"),
        ({("a", "b"): 1}, "tuple is the key of a dict"),
        ({True: 1}, "bool is the key of a dict"),
    ],
)
def test_what_cannot_be_recorded(tmp_path: Path, value: Any, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason) as caught:
        _capture(
            tmp_path / "a.pth", {"hidden_states": torch.zeros(1)}, {"hidden_states": torch.zeros(1), "extra": [value]}
        )
    assert caught.value.where is not None
    assert caught.value.where.startswith("Layer.forward, call 1, argument extra[0]")
    assert _left(tmp_path) == []


def test_a_container_in_itself(tmp_path: Path) -> None:
    knot: list[Any] = []
    knot.append(knot)
    with pytest.raises(UnsupportedError, match="20 deep"):
        _capture(tmp_path / "a.pth", {"hidden_states": torch.zeros(1), "extra": knot})


def test_arguments_without_a_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"does not name: \{'other': 3\}"):
        _capture(tmp_path / "a.pth", {"hidden_states": torch.zeros(1), "other": 3})


def test_a_call_that_the_forward_refuses_is_its_matter(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="hidden_states"), _recorder(module := Layer(), tmp_path / "a.pth"):
        module()
    assert _left(tmp_path) == []


def test_a_forward_whose_arguments_have_no_names(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, states: Tensor, /) -> Tensor:
            return states

    with pytest.raises(UnsupportedError, match="positional only"):
        _recorder(Odd(), tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("value", "reason"),
    [(float("nan"), "NaN"), (float("inf"), "infinite"), (-float("inf"), "infinite")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_numbers_that_calibrate_nothing(tmp_path: Path, value: float, reason: str, dtype: torch.dtype) -> None:
    states = torch.ones(5, dtype=dtype)
    states[3] = value
    with pytest.raises(InvalidDatasetError, match=reason) as caught:
        _capture(tmp_path / "a.pth", {"hidden_states": states})
    assert "call 0, argument hidden_states" in str(caught.value)
    assert _left(tmp_path) == []


def test_a_failure_ends_the_generation(tmp_path: Path) -> None:
    """Not after hours, when the pipeline has finished."""
    module = Layer()

    def generate(recorder: Recorder) -> None:
        module(torch.full((2,), float("nan")))
        recorder._jobs.drain()  # pyright: ignore
        with pytest.raises(InvalidDatasetError, match="NaN"):
            module(torch.zeros(2))

    with pytest.raises(InvalidDatasetError, match="NaN"), _recorder(module, tmp_path / "a.pth") as recorder:
        generate(recorder)


def test_masks_may_be_infinite(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
            return hidden_states

    mask = torch.tensor([0.0, -float("inf")])
    path = tmp_path / "a.pth"
    record = _capture(path, {"hidden_states": torch.zeros(1), "attention_mask": mask}, module=Masked())[0]
    assert torch.equal(record[1], mask)
    names = ["hidden_states", "attention_mask"]
    assert torch.equal(open_records(path, parameters=names, fingerprint=None, settings=SETTINGS)[0][names[1]], mask)


def test_equal_tensors_are_stored_once(tmp_path: Path) -> None:
    prompt = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0))
    calls = [{"hidden_states": torch.full((8,), float(i)), "extra": prompt.clone()} for i in range(20)]
    calls.append({"hidden_states": prompt.clone().reshape(512, 512), "extra": prompt.view(torch.int32)})
    path = tmp_path / "a.pth"
    records = _capture(path, *calls)
    assert 2 * prompt.nbytes < path.stat().st_size < 2.1 * prompt.nbytes  # as floats and as integers
    assert len({record[2].data_ptr() for record in records[:-1]} | {records[-1][0].data_ptr()}) == 1
    assert all(torch.equal(record[2], prompt) for record in records[:-1])
    assert torch.equal(records[-1][0], prompt.reshape(512, 512))
    assert torch.equal(records[-1][2], prompt.view(torch.int32))


def test_no_tensors_at_all(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, value: Any) -> None: ...

    assert _capture(tmp_path / "a.pth", {"value": 1}, {"value": torch.empty(0)}, module=Odd())[0] == [1]


def test_a_module_that_is_moved_between_devices(tmp_path: Path) -> None:
    """Offloading replaces the forward of the instance, also while calls are recorded."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    module, path = Layer(), tmp_path / "a.pth"
    add_hook_to_module(module, ModelHook())
    with _recorder(module, path):
        module(torch.zeros(1), timestep=2)
        remove_hook_from_module(module)
        add_hook_to_module(module, ModelHook())
        module(torch.zeros(1), timestep=3)
    assert [record[1] for record in _records(path)] == [2, 3]


def test_an_error_of_the_pipeline_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "calib_data.pth"
    _capture(path, {"hidden_states": torch.zeros(1)})
    before = path.read_bytes(), sidecar_file(path).read_bytes()
    with pytest.raises(AttributeError, match="add_"):
        _capture(path, {"hidden_states": torch.ones(1)}, {"hidden_states": "no tensor"})
    assert (path.read_bytes(), sidecar_file(path).read_bytes()) == before
    assert _left(tmp_path) == ["calib_data.json", "calib_data.pth"]
    _capture(path, {"hidden_states": torch.full((1,), 2.0)})
    assert _records(path)[0][0].item() == 2


def test_a_second_capture_to_the_same_file_at_the_same_time(tmp_path: Path) -> None:
    path = tmp_path / "calib_data.pth"
    with _recorder(module := Layer(), path):
        module(torch.zeros(1))
        with pytest.raises(EnvError, match="another run is capturing"), _recorder(Layer(), path):
            pass
        module(torch.zeros(1))
    assert len(_records(path)) == 2


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING, logger="slim"):
        assert len(_capture(tmp_path / "calib_data.pth", {"hidden_states": torch.zeros(1)})) == 1
    assert "cannot be locked (No locks available)" in caplog.text
    assert _left(tmp_path) == ["calib_data.json", "calib_data.pth"]


def test_a_target_that_is_no_file(tmp_path: Path) -> None:
    path = tmp_path / "calib_data.pth"
    path.mkdir()
    with pytest.raises(SecurityError, match="is not a file"), _recorder(Layer(), path):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(EnvError, match="cannot be written"), _recorder(Layer(), tmp_path / "file" / "a.pth"):
        pass


def _run_and_be_killed(code: str, *arguments: str) -> None:
    """Run code in another process; it must end by SIGKILL."""
    lines = (
        "import os, signal, sys, torch",
        "from pathlib import Path",
        "from torch import nn",
        "from slim_sd.captured import files as record_files",
        "from slim_sd.captured.recorder import Recorder",
        "class Layer(nn.Module):",
        "    def forward(self, hidden_states, timestep=1, *, extra=None): return hidden_states",
        "module, path = Layer(), Path(sys.argv[1])",
        "def kill(*_): os.kill(os.getpid(), signal.SIGKILL)",
    )
    script = "\n".join((*lines, code))
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == -signal.SIGKILL, result.stderr


def test_a_killed_capture(tmp_path: Path) -> None:
    """It leaves nothing that looks finished, and the next capture clears away what it left."""
    path = tmp_path / "calib_data.pth"
    _run_and_be_killed(
        "with Recorder(module, path, fingerprint='model', settings={}) as recorder:\n"
        "    for i in range(20): module(torch.full((100_000,), float(i)))\n"
        "    recorder._jobs.drain()\n"
        "    kill()",
        str(path),
    )
    assert _left(tmp_path) == [".calib_data.pth.slim-capture"]
    assert (tmp_path / ".calib_data.pth.slim-capture" / "tensors").stat().st_size > 1_000_000
    assert record_files.find_records(tmp_path) is None
    _capture(path, {"hidden_states": torch.zeros(1)})
    assert _left(tmp_path) == ["calib_data.json", "calib_data.pth"]


def test_killed_between_the_two_files(tmp_path: Path) -> None:
    """The sidecar of the new file lies beside the old one: noticed."""
    path = tmp_path / "calib_data.pth"
    _capture(path, {"hidden_states": torch.zeros(1)})
    _run_and_be_killed(
        "replace, count = os.replace, iter(range(9))\n"
        "record_files.os.replace = lambda *a: kill() if next(count) else replace(*a)\n"
        f"with Recorder(module, path, fingerprint='model', settings={SETTINGS!r}): module(torch.ones(1))",
        str(path),
    )
    names = forward_parameters(Layer())
    with pytest.raises(InvalidDatasetError, match="its sidecar belongs to another file"):
        open_records(path, parameters=names, fingerprint="model", settings=SETTINGS)
    _capture(path, {"hidden_states": torch.ones(1)})
    assert len(open_records(path, parameters=names, fingerprint="model", settings=SETTINGS)) == 1
    assert _left(tmp_path) == ["calib_data.json", "calib_data.pth"]


@contextmanager
def _files_up_to(size: int) -> Iterator[None]:
    """The system refuses to write more to any file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [500_000, 1_500_000, 2_000_100], ids=["first call", "later", "only the archive"])
def test_no_room_for_a_file(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "calib_data.pth"
    _capture(path, {"hidden_states": torch.zeros(1)})
    before = path.read_bytes()
    calls = [{"hidden_states": torch.full((250_000,), float(i))} for i in range(2)]
    with pytest.raises(EnvError, match="File too large") as caught, _files_up_to(limit):
        _capture(path, *calls)
    assert caught.value.where == str(path)
    assert path.read_bytes() == before
    assert _left(tmp_path) == ["calib_data.json", "calib_data.pth"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(record_files.os, call, full)
    with pytest.raises(EnvError, match="No space left on device"):
        _capture(tmp_path / "calib_data.pth", {"hidden_states": torch.zeros(1)})
    assert _left(tmp_path) == []


def test_a_bug_in_the_background_is_not_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(record_files.RecordWriter, "add", broken)
    with pytest.raises(RuntimeError, match="recording a call failed") as caught:
        _capture(tmp_path / "a.pth", {"hidden_states": torch.zeros(1)})
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert not isinstance(caught.value, SlimError)


def test_memory_does_not_follow_the_file(tmp_path: Path) -> None:
    """Captured, assembled, opened and read: 32 calls of 8 MiB, 256 MiB."""
    script = "\n".join(
        (
            "import sys, torch",
            "from pathlib import Path",
            "from torch import nn",
            "from slim_core.memory import peak_memory, resident_memory",
            "from slim_sd.captured import recorder as capture, files as record_files",
            "from slim_sd.captured.records import open_records",
            "capture._WAITING_BYTES, record_files._RELEASE_AFTER = 16 << 20, 16 << 20",
            "class Layer(nn.Module):",
            "    def forward(self, hidden_states, prompt): return None",
            "module, path, names = Layer(), Path(sys.argv[1]), ['hidden_states', 'prompt']",
            "small = path.with_name('small.pth')",
            "def run(path, count):",
            "    with capture.Recorder(module, path, fingerprint='', settings={}):",
            "        for i in range(count):",
            "            module(torch.full((2 << 20,), float(i)), torch.ones(1 << 18))",
            "    for call in open_records(path, parameters=names, fingerprint='', settings={}):",
            "        assert call['prompt'].sum() == 1 << 18",
            "run(small, 2)",
            "before = peak_memory()",
            "run(path, 32)",
            "print((peak_memory() - before) >> 20)",
        )
    )
    path = tmp_path / "calib_data.pth"
    result = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert 256 << 20 < path.stat().st_size < 258 << 20
    assert int(result.stdout) < 96
