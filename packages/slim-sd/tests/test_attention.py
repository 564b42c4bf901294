"""Attentions of diffusers transformers: which there are, what is seen of them, quantized and rotated ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from slim_core.devices import resolve_devices
from slim_core.errors import SpecError, UnsupportedError, VerificationError
from slim_core.evaluation.verify import verify_folder
from slim_core.model.streamed import StreamedModel
from slim_core.progress import SilentProgress
from slim_core.recipe import recipe_from_dict
from slim_core.runners.plan import Plan, make_plan
from slim_core.runners.run import run_plan
from slim_core.savers.mindie_folder import MindieFolder
from slim_sd.examples import example_call
from slim_sd.loading import Names, open_transformer, open_written

PipelineFolder = Callable[..., Path]

SELF = {  # by the model: the attentions that count, and what they are called in files
    "wan2_1_t2v": {f"blocks.{i}.attn1": f"blocks.{i}.self_attn" for i in range(2)},
    "wan2_1_i2v": {f"blocks.{i}.attn1": f"blocks.{i}.self_attn" for i in range(2)},
    "wan2_2_ti2v": {f"blocks.{i}.attn1": f"blocks.{i}.self_attn" for i in range(2)},
    "flux": {f"{kind}transformer_blocks.{i}.attn": "" for kind in ("", "single_") for i in range(2)},
    "hunyuan_video": {f"{kind}transformer_blocks.{i}.attn": "" for kind in ("", "single_") for i in range(2)},
    "qwen_image": {f"transformer_blocks.{i}.attn": f"transformer_blocks.{i}" for i in range(2)},
    "sd3": dict.fromkeys(("transformer_blocks.0.attn", "transformer_blocks.0.attn2", "transformer_blocks.1.attn"), ""),
}
RUN = ("wan2_1_t2v", "wan2_2_ti2v", "flux", "hunyuan_video", "qwen_image", "sd3")
HEADS, DIM = 4, 16
LINEAR = {
    "type": "linear_quant",
    "qconfig": {
        "act": {"scope": "per_token", "dtype": "int8", "symmetric": True, "method": "minmax"},
        "weight": {"scope": "per_channel", "dtype": "int8", "symmetric": True, "method": "minmax"},
    },
}
KERNEL: dict[str, Any] = {"type": "fa3_quant"}
FP8 = KERNEL | {"qconfig": {"dtype": "fp8_e4m3", "scope": "per_token"}}
ROTATION: dict[str, Any] = {"type": "online_quarot"}


def opened(folder: Path, names: Names = "original") -> StreamedModel:
    return open_transformer(folder, "transformer", names)


def calls_of(model: StreamedModel, count: int = 2) -> list[dict[str, Any]]:
    """Small calls that differ from each other, each with another number of text tokens."""
    generator, calls = torch.Generator().manual_seed(5), list[dict[str, Any]]()
    for _ in range(count):
        call = example_call(model.module, model.config, torch.float32)
        assert call is not None
        call["hidden_states"] = torch.randn(call["hidden_states"].shape, generator=generator)
        calls.append(call | {"return_dict": False})
    return calls


@contextmanager
def whole(model: StreamedModel) -> Iterator[nn.Module]:
    names = [name for unit in model.units for name in unit.parameters]
    model.load(names, torch.device("cpu"))
    try:
        with torch.no_grad():
            yield model.module
    finally:
        model.unload(names)


@contextmanager
def kernel_calls() -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """Query, key and value of every call of torch's attention function, in order."""
    seen, real = list[tuple[Tensor, Tensor, Tensor]](), torch.nn.functional.scaled_dot_product_attention

    def record(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((query, key, value))
        return real(query, key, value, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
        yield seen


def states_of(model: StreamedModel, calls: list[dict[str, Any]]) -> dict[str, list[tuple[Tensor, Tensor, Tensor]]]:
    """What each attention hands to the kernel in a float run, found without taps: the kernel call that follows its
    beginning."""
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    assert model.attention is not None
    names = [info.name for info in model.attention.attentions]
    with whole(model) as module, kernel_calls() as seen:
        at: dict[str, list[int]] = {}
        handles = [
            module.get_submodule(name).register_forward_pre_hook(
                lambda *_, name=name: at.setdefault(name, []).append(len(seen))
            )
            for name in names
        ]
        for call in calls:
            module(**call)
        for handle in handles:
            handle.remove()
        for name, places in at.items():
            found[name] = [seen[place] for place in places]
    return found


def plan_of(model: StreamedModel, *process: dict[str, Any], **spec: Any) -> Plan:
    whole_spec = {"process": list(process), "save": [{"type": "mindie_format_saver"}], **spec}
    parsed = recipe_from_dict({"apiversion": "modelslim_v1", "spec": whole_spec}).spec()
    return make_plan(model, parsed, resolve_devices("cpu", explicit=True), example=lambda: calls_of(model)[0])


def quantized(model: StreamedModel, calls: list[dict[str, Any]], out: Path, *process: dict[str, Any]) -> Plan:
    plan = plan_of(model, *process)
    run_plan(plan, out, fingerprint="", progress=SilentProgress(), calibration=lambda: calls)
    return plan


def content(out: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    (weights,), (description,) = out.glob("*.safetensors"), out.glob("quant_model_description*.json")
    return load_file(weights), json.loads(description.read_text())


@pytest.mark.parametrize("name", SELF)
def test_attentions_of_tokens_to_themselves_are_found(name: str, pipeline_folder: PipelineFolder) -> None:
    model = opened(pipeline_folder(name))
    found = {info.name: info for unit in model.units for info in unit.attentions}
    assert {name: info.prefix for name, info in found.items()} == {
        name: prefix or name for name, prefix in SELF[name].items()
    }
    for info in found.values():
        assert (info.heads, info.kv_heads, info.key_dim, info.value_dim) == (HEADS, HEADS, DIM, DIM)
        assert not info.problem
        assert info.sees_query


@pytest.mark.parametrize("name", RUN)
def test_taps_see_what_the_kernel_is_given_and_change_nothing(name: str, pipeline_folder: PipelineFolder) -> None:
    model = opened(pipeline_folder(name))
    (call,) = calls_of(model, 1)
    expected = states_of(model, [call])
    assert model.attention is not None
    seen: dict[str, list[tuple[Tensor | None, Tensor, Tensor]]] = {}

    def tap_of(name: str) -> Callable[[Tensor | None, Tensor, Tensor], None]:
        return lambda query, key, value: seen.setdefault(name, []).append((query, key, value))

    with whole(model) as module:
        (before,) = module(**call)
        with model.attention.tapped({info.name: tap_of(info.name) for info in model.attention.attentions}):
            (during,) = module(**call)
        count = {name: len(states) for name, states in seen.items()}
        (after,) = module(**call)
    assert torch.equal(before, during)
    assert torch.equal(before, after)
    assert count == dict.fromkeys(expected, 1)
    assert {name: len(states) for name, states in seen.items()} == count
    for name, ((query, key, value),) in seen.items():
        assert query is not None
        assert query.shape[1] == key.shape[1] == HEADS
        for found, real in zip((query, key, value), expected[name][0], strict=True):
            assert torch.equal(found, real)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_states_of_wan_come_after_norm_and_rotary_embedding(pipeline_folder: PipelineFolder) -> None:
    model = opened(pipeline_folder("wan2_1_t2v"))
    (call,) = calls_of(model, 1)
    inputs: list[Tensor] = []
    angles: list[tuple[Tensor, Tensor]] = []
    ((query, key, value),) = states_of(model, [call])["blocks.1.attn1"]
    with whole(model) as module:
        attention: Any = module.get_submodule("blocks.1.attn1")
        handle = attention.to_q.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
        rope: Any = module.get_submodule("rope")
        other = rope.register_forward_hook(lambda _module, _args, output: angles.append(output))
        module(**call)
        handle.remove()
        other.remove()
        (x,), ((cos, sin),) = inputs, angles
        turn = torch.complex(cos[0, :, 0, 0::2].double(), sin[0, :, 0, 1::2].double())  # (tokens, pairs)
        for projection, norm, seen in (
            (attention.to_q, attention.norm_q, query),
            (attention.to_k, attention.norm_k, key),
        ):
            y = x.double() @ projection.weight.double().T + projection.bias.double()
            y = y / (y.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()
            pairs = torch.view_as_complex(y.view(1, -1, HEADS, DIM // 2, 2))
            turned = torch.view_as_real(pairs * turn[None, :, None]).flatten(3)
            assert torch.allclose(seen.double(), turned.transpose(1, 2), atol=1e-5)
            assert not torch.allclose(seen.double(), y.view(1, -1, HEADS, DIM).transpose(1, 2), atol=1e-2)
        plain = x.double() @ attention.to_v.weight.double().T + attention.to_v.bias.double()
        assert torch.allclose(value.double(), plain.view(1, -1, HEADS, DIM).transpose(1, 2), atol=1e-5)


@pytest.mark.parametrize("name", RUN)
def test_what_a_tap_returns_is_what_is_attended(name: str, pipeline_folder: PipelineFolder) -> None:
    """A value that is the same for all tokens comes out of the softmax unchanged, whatever the scores."""
    model = opened(pipeline_folder(name))
    (call,) = calls_of(model, 1)
    attention = next(iter(SELF[name]))
    constant = torch.randn(1, HEADS, 1, DIM, generator=torch.Generator().manual_seed(3))
    outputs: list[Any] = []
    assert model.attention is not None
    with whole(model) as module:
        part: Any = module.get_submodule(attention)
        handle = part.register_forward_hook(lambda _module, _args, output: outputs.append(output))
        with model.attention.tapped({attention: lambda q, k, v: (q, k, constant.expand_as(v))}):
            module(**call)
        handle.remove()
        projections = [part.to_out[0], *([part.to_add_out] if getattr(part, "to_add_out", None) is not None else [])]
        found = outputs[0] if isinstance(outputs[0], tuple) else (outputs[0],)
        for projection, output in zip(projections, found, strict=False):
            row = projection(constant.flatten())
            assert torch.allclose(output, row.expand_as(output), atol=1e-5)


class Mute:
    """A processor that attends without the kernel."""

    def __call__(self, attn: Any, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return hidden_states


class Twice:
    """One that attends two times."""

    def __call__(self, attn: Any, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        states = [attn.to_q(hidden_states).unflatten(2, (HEADS, -1)).transpose(1, 2) for _ in range(3)]
        for _ in range(2):
            states[0] = torch.nn.functional.scaled_dot_product_attention(*states)
        return states[0].transpose(1, 2).flatten(2)


class Halved:
    """One with half as many heads of twice the size."""

    def __call__(self, attn: Any, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        states = [attn.to_q(hidden_states).unflatten(2, (HEADS // 2, -1)).transpose(1, 2) for _ in range(3)]
        return torch.nn.functional.scaled_dot_product_attention(*states).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("processor", "text"),
    [
        (Mute, "blocks.0.attn1.*without handing its query, key and value to scaled_dot_product_attention"),
        (Twice, "blocks.0.attn1.*attends more than once"),
        (Halved, r"blocks.0.attn1.*shape \[1, 2, 32, 32\], where 4 heads of 16 channels were expected"),
    ],
)
def test_attentions_that_cannot_be_seen_are_an_error(
    pipeline_folder: PipelineFolder, processor: type[Any], text: str
) -> None:
    model = opened(pipeline_folder("wan2_1_t2v"))
    (call,) = calls_of(model, 1)
    assert model.attention is not None
    with whole(model) as module:
        part: Any = module.get_submodule("blocks.0.attn1")
        (expected,) = module(**call)
        own, part.processor = part.processor, processor()
        with pytest.raises(SpecError, match=text), model.attention.tapped({"blocks.0.attn1": lambda q, k, v: None}):
            module(**call)
        part.processor = own
        (after,) = module(**call)
    assert torch.equal(after, expected)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_an_error_inside_an_attention_comes_out_as_it_is(pipeline_folder: PipelineFolder) -> None:
    model = opened(pipeline_folder("flux"))
    (call,) = calls_of(model, 1)

    def fail(_query: Any, _key: Any, _value: Any) -> None:
        raise ZeroDivisionError("inside")

    assert model.attention is not None
    with whole(model) as module:
        failing = model.attention.tapped({"transformer_blocks.1.attn": fail})
        with pytest.raises(ZeroDivisionError, match="inside"), failing:
            module(**call)
        seen: list[Any] = []
        with model.attention.tapped({"transformer_blocks.1.attn": lambda *states: seen.append(states)}):
            module(**call)
        assert len(seen) == 1


def test_threads_see_their_own_models_only(pipeline_folder: PipelineFolder) -> None:
    folders = [pipeline_folder("sd3"), pipeline_folder("sd3", seed=1)]
    models = [opened(folder) for folder in folders]
    call = calls_of(models[0], 1)[0]
    expected = [states_of(model, [call])["transformer_blocks.0.attn"][0] for model in models]
    seen: list[list[Any]] = [[], []]

    def work(index: int) -> None:
        access = models[index].attention
        assert access is not None
        with whole(models[index]) as module:
            for _ in range(5):
                with access.tapped({"transformer_blocks.0.attn": lambda *states: seen[index].append(states)}):
                    module(**call)

    threads = [Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found, states in zip(seen, expected, strict=True):
        assert len(found) == 5
        assert all(torch.equal(x, y) for run in found for x, y in zip(run, states, strict=True))
    assert not torch.equal(expected[0][0], expected[1][0])


def scale_of(values: list[Tensor], share: float = 1.0) -> Tensor:
    """The int8 scale of each head, by sorting: of the smallest symmetric range that holds this share of its values."""
    heads = torch.cat([x.transpose(0, 1).reshape(HEADS, -1) for x in values], 1)
    count = heads.shape[1]
    inside = next(n for n in range(1, count + 1) if n * 10_000 >= round(share * 10_000) * count)
    bound = heads.abs().sort(1).values[:, inside - 1]
    return (bound.float() / 127).bfloat16().float()  # a number of the dtype that MindIE-SD keeps it in


@pytest.mark.parametrize("name", RUN)
def test_static_scales_are_those_of_all_calls(name: str, pipeline_folder: PipelineFolder, tmp_path: Path) -> None:
    """Also where text and pictures are joined inside of a block, so that attentions see more tokens than come in."""
    model = opened(pipeline_folder(name))
    calls = calls_of(model, 3)
    expected = states_of(model, calls)
    plan = quantized(model, calls, tmp_path / "out", LINEAR, KERNEL)
    assert plan.attention_counts() == {"FAQuant int8 per_head": len(SELF[name])}
    tensors, description = content(tmp_path / "out")
    assert description["fa_quant_type"] == "FAKQuant"
    for attention, prefix in SELF[name].items():
        prefix = prefix or attention
        assert description[f"{prefix}.quant_type"] == "INT8"
        for index, (letter, share) in enumerate({"q": 0.9999, "k": 0.9999, "v": 1.0}.items()):
            scale, offset = tensors[f"{prefix}.fa_{letter}.scale"], tensors[f"{prefix}.fa_{letter}.offset"]
            assert (scale.dtype, scale.shape) == (torch.float32, (HEADS, 1))
            assert (offset.dtype, offset.shape) == (torch.int8, (HEADS, 1))
            assert not offset.any()
            assert description[f"{prefix}.fa_{letter}.scale"] == "FAQuant"
            want = scale_of([states[index] for states in expected[attention]], share)
            assert torch.equal(scale.flatten(), want)
    assert not verify_folder(tmp_path / "out").problems


def test_names_of_both_projects_may_be_used(pipeline_folder: PipelineFolder) -> None:
    for names in ("original", "diffusers"):
        model = opened(pipeline_folder("wan2_1_t2v"), names)
        for pattern in ("*.self_attn", "*.attn1", "blocks.1.*"):
            plan = plan_of(model, LINEAR, KERNEL | {"include": [pattern]})
            assert len(plan.attentions) == (1 if "1.*" in pattern else 2)
            assert not [text for text in plan.warnings if "matches no attention" in text]
        plan = plan_of(model, LINEAR, KERNEL | {"include": ["*.self_attn", "*cross_attn*"]})
        assert any("pattern '*cross_attn*' matches no attention" in text for text in plan.warnings)
    written = [info.prefix for unit in model.units for info in unit.attentions]
    assert written == ["blocks.0.attn1", "blocks.1.attn1"]


def test_blocks_behind_see_the_quantized_states(pipeline_folder: PipelineFolder, tmp_path: Path) -> None:
    model = opened(pipeline_folder("wan2_1_t2v"))
    calls = calls_of(model, 2)
    scales: dict[str, dict[str, Tensor]] = {}
    for propagate in ("float", "quantized"):
        plan = plan_of(model, KERNEL, propagate=propagate)
        run_plan(
            plan,
            tmp_path / propagate,
            fingerprint="",
            progress=SilentProgress(),
            calibration=lambda: calls,
            propagate=propagate,
        )
        scales[propagate] = content(tmp_path / propagate)[0]
    names = [[f"blocks.{i}.self_attn.fa_{letter}.scale" for letter in "qkv"] for i in range(2)]
    assert all(torch.equal(scales["float"][name], scales["quantized"][name]) for name in names[0])

    def simulated(query: Tensor | None, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert query is not None
        found: list[Tensor] = []
        for letter, x in zip("qkv", (query, key, value), strict=True):
            scale = scales["quantized"][f"blocks.0.self_attn.fa_{letter}.scale"].view(1, HEADS, 1, 1)
            found.append((x / scale).round().clamp(-128, 127) * scale)
        return found[0], found[1], found[2]

    assert model.attention is not None
    with model.attention.tapped({"blocks.0.attn1": simulated}):
        states = states_of(model, calls)["blocks.1.attn1"]
    for index, (name, share) in enumerate(zip(names[1], (0.9999, 0.9999, 1.0), strict=True)):
        want = scale_of([one[index] for one in states], share)
        assert torch.equal(scales["quantized"][name].flatten(), want)
    assert not all(torch.equal(scales["float"][name], scales["quantized"][name]) for name in names[1])


@pytest.mark.parametrize("name", ["wan2_1_t2v", "qwen_image"])
def test_rotations_are_written_as_the_engine_reads_them(
    name: str, pipeline_folder: PipelineFolder, tmp_path: Path
) -> None:
    """The recipe of the published practices: dynamic FP8, rotated, all but the first block."""
    model = opened(pipeline_folder(name))
    some = {"exclude": ["*blocks.0.*"]}
    plan = quantized(model, [], tmp_path / "out", LINEAR, ROTATION | some, FP8 | some)
    assert not plan.needs_data
    assert "query and key of 1 attention are rotated at run time, heads of 16 channels" in plan.processors[1].summary()
    tensors, description = content(tmp_path / "out")
    first, prefix = SELF[name].values()
    assert description[f"{prefix}.quant_type"] == "FP8_DYNAMIC"
    rotation = tensors[f"{prefix}.q_rot"]
    assert (rotation.dtype, rotation.shape) == (torch.bfloat16, (DIM, DIM))
    assert torch.equal(rotation, tensors[f"{prefix}.k_rot"])
    assert set(rotation.abs().flatten().tolist()) == {0.25}
    assert torch.equal(rotation.float() @ rotation.float().T, torch.eye(DIM))
    assert description[f"{prefix}.q_rot"] == description[f"{prefix}.k_rot"] == "FLOAT"
    assert not [key for key in description if key.startswith(f"{first}.") and key.endswith(("_rot", ".quant_type"))]
    assert "fa_quant_type" not in description
    assert not verify_folder(tmp_path / "out").problems


def test_rotated_states_are_those_that_are_quantized(pipeline_folder: PipelineFolder, tmp_path: Path) -> None:
    model = opened(pipeline_folder("wan2_1_t2v"))
    calls = calls_of(model, 2)
    expected = states_of(model, calls)["blocks.0.attn1"]
    static = {"type": "fa3_quant", "qconfig": {"ext": {"ratio": 1.0}}}
    plan = plan_of(model, static, ROTATION | {"include": ["*.self_attn.*"]})
    assert any("does not rotate query and key of FAKQuant attention" in text for text in plan.warnings) or plan.refusal
    plan.refusal = None
    run_plan(plan, tmp_path / "out", fingerprint="", progress=SilentProgress(), calibration=lambda: calls)
    tensors, _ = content(tmp_path / "out")
    rotation = tensors["blocks.0.self_attn.q_rot"].double()
    for index, letter in enumerate("qkv"):
        states = [one[index].double() @ rotation if letter != "v" else one[index].double() for one in expected]
        want = scale_of(states)
        assert torch.equal(tensors[f"blocks.0.self_attn.fa_{letter}.scale"].flatten(), want)
    plain = scale_of([query for query, _, _ in expected])
    assert not torch.allclose(tensors["blocks.0.self_attn.fa_q.scale"].flatten(), plain, rtol=1e-2)


@pytest.mark.parametrize("name", RUN)
def test_rotations_leave_the_model_as_it_is(name: str, pipeline_folder: PipelineFolder, tmp_path: Path) -> None:
    model = opened(pipeline_folder(name))
    (call,) = calls_of(model, 1)
    quantized(model, [call], tmp_path / "out", LINEAR, ROTATION | {"block_size": 4}, FP8)
    folder = MindieFolder(tmp_path / "out")
    written = open_written(model, model.source, tmp_path, frozenset())
    both: Any = _Both(model.source, folder.source)
    rotated = open_written(model, both, tmp_path, frozenset())
    assert all(info.rotated for unit in rotated.units for info in unit.attentions)
    assert not any(info.rotated for unit in written.units for info in unit.attentions)
    access, scores = rotated.attention, list[tuple[Tensor, Tensor]]()
    assert access is not None

    def through(query: Tensor | None, key: Tensor, value: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        assert query is not None
        scores.append((query, key))
        return query, key, value

    with whole(rotated) as module:
        (expected,) = module(**call)
        with access.tapped({info.name: through for info in access.attentions if info.name in SELF[name]}):
            (found,) = module(**call)
    plain = states_of(written, [call])
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.equal(found, expected)
    (query, key, _), (turned_query, turned_key) = plain[next(iter(SELF[name]))][0], scores[0]
    assert not torch.allclose(query, turned_query, atol=1e-2)
    assert torch.allclose(turned_query @ turned_key.mT, query @ key.mT, atol=1e-4)


class _Both(Mapping[str, Any]):
    """The tensors of one source, and the rotations of another."""

    def __init__(self, first: Any, second: Any) -> None:
        self._first, self._second = first, second
        self._names = [*first, *(name for name in second if name.endswith("_rot"))]

    def __getitem__(self, name: str) -> Any:
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def meta(self, name: str) -> Any:
        return (self._second if name.endswith("_rot") else self._first).meta(name)

    def load(self, name: str) -> Tensor:
        return (self._second if name.endswith("_rot") else self._first).load(name)

    def release(self, names: Any) -> None:
        self._first.release([name for name in names if not name.endswith("_rot")])


def test_half_a_rotation_is_refused(pipeline_folder: PipelineFolder, tmp_path: Path) -> None:
    model = opened(pipeline_folder("wan2_1_t2v"))
    quantized(model, [], tmp_path / "out", LINEAR, ROTATION, FP8)
    both: Any = _Both(model.source, MindieFolder(tmp_path / "out").source)
    both._names.remove("blocks.1.self_attn.k_rot")
    with pytest.raises(VerificationError, match=r"blocks\.1\.self_attn\.k_rot: the tensor is missing"):
        open_written(model, both, tmp_path, frozenset())


def test_what_the_engine_cannot_load_is_refused(pipeline_folder: PipelineFolder) -> None:
    model = opened(pipeline_folder("wan2_1_t2v"))
    assert plan_of(model, LINEAR, KERNEL).refusal is None
    assert plan_of(model, LINEAR, ROTATION, FP8).refusal is None
    bare = plan_of(model, LINEAR, FP8).refusal
    assert bare is not None
    assert "loads FP8_DYNAMIC attention only with rotations of query and key" in bare.what
    token = plan_of(model, LINEAR, KERNEL | {"qconfig": {"scope": "per_token"}}).refusal
    assert token is not None
    assert "has no class for standard attention that is INT8_DYNAMIC" in token.what
    for dtype in ("mxfp4", "mxfp8"):
        assert plan_of(model, LINEAR, ROTATION, KERNEL | {"qconfig": {"dtype": dtype}}).refusal is None
    idle = plan_of(model, LINEAR, ROTATION)
    assert any("query and key of 2 attentions are rotated but not quantized" in text for text in idle.warnings)


def test_rotations_that_make_no_sense_are_refused(pipeline_folder: PipelineFolder) -> None:
    model = opened(pipeline_folder("wan2_1_t2v"))
    with pytest.raises(UnsupportedError, match=r"blocks\.0\.attn1: its heads of 16 channels .*block size of 32"):
        plan_of(model, LINEAR, ROTATION | {"block_size": 32}, FP8)
    with pytest.raises(UnsupportedError, match="another online_quarot rotates it already"):
        plan_of(model, LINEAR, ROTATION, ROTATION, FP8)
    with pytest.raises(UnsupportedError, match="no place for rotations of query and key"):
        plan_of(model, LINEAR, ROTATION, save=[{"type": "ascendv1_saver"}])
    with pytest.raises(UnsupportedError, match="no name for attention in mxfp8"):
        plan_of(model, LINEAR, KERNEL | {"qconfig": {"dtype": "mxfp8"}}, save=[{"type": "ascendv1_saver"}])
    with pytest.raises(UnsupportedError, match=r"cannot become C8: it keeps no keys and values .*use fa3_quant"):
        plan_of(model, LINEAR, {"type": "dynamic_cache"}, save=[{"type": "ascendv1_saver"}])
    none = plan_of(model, LINEAR, ROTATION | {"include": ["*.cross_attn.*"]})
    assert any("spec.process[1] rotates no attention" in text for text in none.warnings)
    assert any("'*.cross_attn.*' matches no attention" in text for text in none.warnings)
