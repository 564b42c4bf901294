"""Recording the calls of a transformer, of pipelines and on its own."""

from __future__ import annotations

import json
from collections import OrderedDict, namedtuple
from collections.abc import Callable
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

from slim_core.errors import InvalidDatasetError, UnsupportedError
from slim_sd.captured.recorder import Recorder, forward_parameters
from slim_sd.captured.records import open_records, sidecar_file
from slim_sd.pipeline.building import build_pipeline


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


def test_the_calls_of_a_pipeline(recording: Any, tmp_path: Path) -> None:
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
    with recording.recorder(transformer, path) as recorder:
        captured = _generate(pipeline)
        assert recording.left(path.parent) == [".calib_data.pth.slim-capture"]
    assert torch.equal(plain, captured)
    assert recording.left(path.parent) == ["calib_data.json", "calib_data.pth"]
    assert not transformer._forward_pre_hooks
    records = open_records(
        path, parameters=forward_parameters(transformer), fingerprint="model", settings=recording.SETTINGS
    )
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
    recording: Any,
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
    with recording.recorder(transformer, path):
        captured = pipeline(**tiny_pipelines.arguments(family), return_dict=False)[0]
    handle.remove()
    assert torch.equal(plain, captured)
    names = forward_parameters(transformer)
    records = open_records(path, parameters=names, fingerprint="model", settings=recording.SETTINGS)
    assert len(records) == len(outputs) >= 2
    for record, output in zip(records, outputs, strict=True):
        with torch.no_grad():
            assert torch.equal(transformer(**record)[0], output)
    # as a file from elsewhere it fits its own transformer
    sidecar_file(path).unlink()
    open_records(path, parameters=names, fingerprint=None, settings={}, config=transformer.config)


def test_two_transformers_of_one_pipeline(recording: Any, tmp_path: Path) -> None:
    experts = {"transformer": _transformer(0), "transformer_2": _transformer(1)}
    pipeline = _pipeline(**experts, boundary_ratio=0.875)
    plain = _generate(pipeline)
    with (
        recording.recorder(experts["transformer"], tmp_path / "calib_data_high_noise_model.pth") as high,
        recording.recorder(experts["transformer_2"], tmp_path / "calib_data_low_noise_model.pth") as low,
    ):
        assert torch.equal(_generate(pipeline), plain)
    assert (len(high), len(low)) == (2, 4)
    for recorder, boundary in ((high, lambda t: t >= 875), (low, lambda t: t < 875)):
        assert len(recording.records(recorder.path)) == len(recorder)
        assert all(boundary(record[1].item()) for record in recording.records(recorder.path))


def test_a_transformer_that_no_step_reaches(recording: Any, tmp_path: Path) -> None:
    experts = {"transformer": _transformer(0), "transformer_2": _transformer(1)}
    pipeline = _pipeline(**experts, boundary_ratio=0.875)
    with (
        pytest.raises(InvalidDatasetError, match="never called"),
        recording.recorder(experts["transformer"], tmp_path / "high.pth"),
        recording.recorder(experts["transformer_2"], tmp_path / "low.pth"),
    ):
        _generate(pipeline, steps=1)
    assert recording.left(tmp_path) == []


def test_what_the_sidecar_says(recording: Any, tmp_path: Path) -> None:
    path = tmp_path / "calib_data.pth"
    settings = {"size": (720, 1280), "folder": Path("a"), "seed": 0}
    module = recording.Layer()
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


def test_a_call_is_recorded_before_it_runs(recording: Any, tmp_path: Path) -> None:
    states = torch.zeros(3)
    (first, *_), (second, *_) = recording.capture(
        tmp_path / "a.pth", {"hidden_states": states}, {"hidden_states": states}
    )
    assert first.tolist() == [0, 0, 0]
    assert second.tolist() == [1, 1, 1]


def test_positional_and_keyword_arguments_are_one(recording: Any, tmp_path: Path) -> None:
    module, path = recording.Layer(), tmp_path / "calib_data.pth"
    with recording.recorder(module, path):
        module(torch.zeros(1), 5)
        module(hidden_states=torch.zeros(1), timestep=5)
        module(timestep=5, hidden_states=torch.zeros(1), extra="e")
        module(torch.zeros(1))
    assert [record[1:] for record in recording.records(path)] == [[5, None], [5, None], [5, "e"], [1, None]]
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
def test_containers_and_numbers_become_plain(recording: Any, tmp_path: Path, value: Any, expected: Any) -> None:
    found = recording.capture(tmp_path / "a.pth", {"hidden_states": torch.zeros(1), "extra": value})[0][2]
    assert found == expected
    assert repr(found) == repr(expected)  # types too


def test_tensors_inside_of_containers(recording: Any, tmp_path: Path) -> None:
    output = Transformer2DModelOutput(sample=torch.arange(4.0))
    value = [output, (torch.ones(2, dtype=torch.bool),), {"p": nn.Parameter(torch.full((2,), 2.0))}]
    found = recording.capture(tmp_path / "a.pth", {"hidden_states": torch.zeros(1), "extra": value})[0][2]
    assert found[0]["sample"].tolist() == [0, 1, 2, 3]
    assert found[1][0].tolist() == [True, True]
    assert type(found[2]["p"]) is Tensor
    assert not found[2]["p"].requires_grad


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool],
)
def test_types_and_layouts(recording: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.arange(24).reshape(2, 3, 4)
    tensors = [
        (values % 5).to(dtype).transpose(0, 2),
        torch.ones((), dtype=dtype).expand(7),
        torch.ones((), dtype=dtype),
        torch.empty((0, 3), dtype=dtype),
        (values.reshape(6, 4) % 3).to(dtype)[::2, 1:],
    ]
    found = recording.capture(tmp_path / "a.pth", {"hidden_states": torch.zeros(1), "extra": tensors})[0][2]
    for one, other in zip(found, tensors, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_tensors_made_for_inference(recording: Any, tmp_path: Path) -> None:
    module, path = recording.Layer(), tmp_path / "a.pth"
    with recording.recorder(module, path), torch.inference_mode():
        module(torch.full((3,), 2.0))
    assert recording.records(path)[0][0].tolist() == [2, 2, 2]


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
def test_what_cannot_be_recorded(recording: Any, tmp_path: Path, value: Any, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason) as caught:
        recording.capture(
            tmp_path / "a.pth", {"hidden_states": torch.zeros(1)}, {"hidden_states": torch.zeros(1), "extra": [value]}
        )
    assert caught.value.where is not None
    assert caught.value.where.startswith("Layer.forward, call 1, argument extra[0]")
    assert recording.left(tmp_path) == []


def test_a_container_in_itself(recording: Any, tmp_path: Path) -> None:
    knot: list[Any] = []
    knot.append(knot)
    with pytest.raises(UnsupportedError, match="20 deep"):
        recording.capture(tmp_path / "a.pth", {"hidden_states": torch.zeros(1), "extra": knot})


def test_arguments_without_a_name(recording: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"does not name: \{'other': 3\}"):
        recording.capture(tmp_path / "a.pth", {"hidden_states": torch.zeros(1), "other": 3})


def test_a_call_that_the_forward_refuses_is_its_matter(recording: Any, tmp_path: Path) -> None:
    with (
        pytest.raises(TypeError, match="hidden_states"),
        recording.recorder(module := recording.Layer(), tmp_path / "a.pth"),
    ):
        module()
    assert recording.left(tmp_path) == []


def test_a_forward_whose_arguments_have_no_names(recording: Any, tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, states: Tensor, /) -> Tensor:
            return states

    with pytest.raises(UnsupportedError, match="positional only"):
        recording.recorder(Odd(), tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("value", "reason"),
    [(float("nan"), "NaN"), (float("inf"), "infinite"), (-float("inf"), "infinite")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_numbers_that_calibrate_nothing(
    recording: Any, tmp_path: Path, value: float, reason: str, dtype: torch.dtype
) -> None:
    states = torch.ones(5, dtype=dtype)
    states[3] = value
    with pytest.raises(InvalidDatasetError, match=reason) as caught:
        recording.capture(tmp_path / "a.pth", {"hidden_states": states})
    assert "call 0, argument hidden_states" in str(caught.value)
    assert recording.left(tmp_path) == []


def test_a_failure_ends_the_generation(recording: Any, tmp_path: Path) -> None:
    """Not after hours, when the pipeline has finished."""
    module = recording.Layer()

    def generate(recorder: Recorder) -> None:
        module(torch.full((2,), float("nan")))
        recorder._jobs.drain()  # pyright: ignore
        with pytest.raises(InvalidDatasetError, match="NaN"):
            module(torch.zeros(2))

    with pytest.raises(InvalidDatasetError, match="NaN"), recording.recorder(module, tmp_path / "a.pth") as recorder:
        generate(recorder)


def test_masks_may_be_infinite(recording: Any, tmp_path: Path) -> None:
    class Masked(nn.Module):
        def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
            return hidden_states

    mask = torch.tensor([0.0, -float("inf")])
    path = tmp_path / "a.pth"
    record = recording.capture(path, {"hidden_states": torch.zeros(1), "attention_mask": mask}, module=Masked())[0]
    assert torch.equal(record[1], mask)
    names = ["hidden_states", "attention_mask"]
    assert torch.equal(
        open_records(path, parameters=names, fingerprint=None, settings=recording.SETTINGS)[0][names[1]], mask
    )


def test_equal_tensors_are_stored_once(recording: Any, tmp_path: Path) -> None:
    prompt = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0))
    calls = [{"hidden_states": torch.full((8,), float(i)), "extra": prompt.clone()} for i in range(20)]
    calls.append({"hidden_states": prompt.clone().reshape(512, 512), "extra": prompt.view(torch.int32)})
    path = tmp_path / "a.pth"
    records = recording.capture(path, *calls)
    assert 2 * prompt.nbytes < path.stat().st_size < 2.1 * prompt.nbytes  # as floats and as integers
    assert len({record[2].data_ptr() for record in records[:-1]} | {records[-1][0].data_ptr()}) == 1
    assert all(torch.equal(record[2], prompt) for record in records[:-1])
    assert torch.equal(records[-1][0], prompt.reshape(512, 512))
    assert torch.equal(records[-1][2], prompt.view(torch.int32))


def test_no_tensors_at_all(recording: Any, tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, value: Any) -> None: ...

    assert recording.capture(tmp_path / "a.pth", {"value": 1}, {"value": torch.empty(0)}, module=Odd())[0] == [1]


def test_a_module_that_is_moved_between_devices(recording: Any, tmp_path: Path) -> None:
    """Offloading replaces the forward of the instance, also while calls are recorded."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    module, path = recording.Layer(), tmp_path / "a.pth"
    add_hook_to_module(module, ModelHook())
    with recording.recorder(module, path):
        module(torch.zeros(1), timestep=2)
        remove_hook_from_module(module)
        add_hook_to_module(module, ModelHook())
        module(torch.zeros(1), timestep=3)
    assert [record[1] for record in recording.records(path)] == [2, 3]
