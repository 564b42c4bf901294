"""``autoround_quant`` from recipe to files, on tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from slim_core.checkpoint.source import LazyTensor
from slim_core.errors import UnsupportedError
from slim_core.memory import KEPT_BY_THE_HEAP
from slim_core.processors.autoround_quant import AutoroundQuant
from slim_core.quantization.layers import DynamicInt
from slim_core.quantization.methods.minmax import minmax_weight
from slim_core.quantization.methods.ssz import ssz_weight
from slim_core.quantization.weights import InMemory, QuantizedWeight
from slim_core.recipe import recipe_from_dict
from slim_core.savers.ascendv1_folder import AscendV1Folder
from slim_core.service import QuantRequest
from slim_llm.service import LlmService

ModelFolder = Callable[..., Path]
Quantize = Callable[..., Any]
BLOCKS = [f"model.layers.{i}" for i in range(3)]
GROUP = 16


def strategy(act: str, weight: str, group_size: int = 0, symmetric: bool = True, **filters: Any) -> dict[str, Any]:
    """Activations per token, weights per channel or per group."""
    return {
        "qconfig": {
            "act": {"dtype": act, "scope": "per_token", "symmetric": True, "method": "minmax"},
            "weight": {
                "dtype": weight,
                "scope": "per_group" if group_size else "per_channel",
                "symmetric": symmetric,
                "method": "autoround",
                "ext": {"group_size": group_size} if group_size else {},
            },
        },
        **filters,
    }


def recipe(*strategies: dict[str, Any], iters: int = 12, **fields: Any) -> dict[str, Any]:
    rule = {"type": "autoround_quant", "strategies": list(strategies), "iters": iters, "batch_size": 2, **fields}
    return {"process": [rule]}


SCHEMES: dict[str, dict[str, Any]] = {
    "w4a8": strategy("int8", "int4", GROUP),
    "w4a4": strategy("int4", "int4", symmetric=False),
}


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, model_folder: ModelFolder, quantize: Quantize
) -> Callable[[str, str], Path]:
    """``runs(scheme, propagate)``: the folder of a run on the qwen2 model, which has biases. Only to be read."""
    made: dict[tuple[str, str], Path] = {}

    def folder(scheme: str, propagate: str) -> Path:
        if (scheme, propagate) not in made:
            path = tmp_path_factory.mktemp("autoround") / f"{scheme}-{propagate}"
            quantize(model_folder("qwen2"), path, **recipe(SCHEMES[scheme]), propagate=propagate)
            made[scheme, propagate] = path
        return made[scheme, propagate]

    return folder


class Naive(nn.Module):
    """A written linear, from the tensors of the file alone, in float64."""

    def __init__(self, parts: dict[str, np.ndarray], kind: str) -> None:
        super().__init__()
        codes = parts["weight"].astype(np.int64)
        scale = parts["weight_scale"].astype(np.float64)
        if kind == "W4A8_DYNAMIC":  # two rows in a byte, the first in its low half
            halves = np.stack([codes & 15, (codes >> 4) & 15], axis=1).reshape(-1, codes.shape[1])
            codes = np.where(halves > 7, halves - 16, halves)
            scale = scale * parts["weight_scale_second"].astype(np.float64)
        offset = parts["weight_offset"] if kind == "W4A4_DYNAMIC" else np.zeros_like(scale)
        width = codes.shape[1] // scale.shape[1]
        self.codes = codes
        self.weight = (codes - offset.repeat(width, 1)) * scale.repeat(width, 1)
        self.most = 7 if kind == "W4A4_DYNAMIC" else 127
        self.bias = parts.get("bias", np.zeros(1)).astype(np.float64)

    def forward(self, x: Tensor) -> Tensor:
        exact = x.double().numpy()
        scale = np.maximum(np.abs(exact).max(-1, keepdims=True) / self.most, 2.0**-23)
        # Codes are decided in float32, as the engine does.
        codes = np.round(exact.astype(np.float32) / scale.astype(np.float32)).astype(np.float64)
        return torch.from_numpy((codes * scale) @ self.weight.T + self.bias).to(x.dtype)


def naive_linears(naive: ModuleType, folder: Path) -> dict[str, Naive]:
    written = naive.read(folder)
    found: dict[str, Naive] = {}
    for module in written.quantized():
        parts = {
            name.removeprefix(f"{module}."): tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
            for name, tensor in written.tensors.items()
            if name.rpartition(".")[0] == module
        }
        found[module] = Naive(parts, written.kind(module))
    return found


class Calls:
    """The calls of the blocks of the float model and their outputs, and the float model itself."""

    def __init__(self, folder: Path, token_ids: list[list[int]], dtype: torch.dtype = torch.bfloat16) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.calls: dict[str, list[Any]] = {name: [] for name in BLOCKS}
        self.outputs: dict[str, list[Tensor]] = {name: [] for name in BLOCKS}
        handles = [self._watch(name) for name in BLOCKS]
        with torch.no_grad():
            for ids in token_ids:
                self.model(input_ids=torch.tensor([ids]), use_cache=False)
        for handle in [handle for pair in handles for handle in pair]:
            handle.remove()

    def _watch(self, name: str) -> tuple[Any, Any]:
        block = self.model.get_submodule(name)
        return (
            block.register_forward_pre_hook(
                lambda _m, args, kwargs: self.calls[name].append((args, kwargs)), with_kwargs=True
            ),
            block.register_forward_hook(lambda _m, _args, output: self.outputs[name].append(output)),
        )

    def errors(self, linears: dict[str, nn.Module]) -> list[float]:
        """Squared output error of every block with these linears in place, given what the float model gives it."""
        found: list[float] = []
        for name in BLOCKS:
            own = {module: linear for module, linear in linears.items() if module.startswith(f"{name}.")}
            originals = {module: self.model.get_submodule(module) for module in own}
            for module, linear in own.items():
                self.model.set_submodule(module, linear)
            block = self.model.get_submodule(name)
            with torch.no_grad():
                outputs = [block(*args, **kwargs) for args, kwargs in self.calls[name]]
            for module, original in originals.items():
                self.model.set_submodule(module, original)
            pairs = zip(outputs, self.outputs[name], strict=True)
            found.append(sum(float((a.double() - b.double()).square().sum()) for a, b in pairs))
        return found

    def final_error(self, linears: dict[str, nn.Module], token_ids: list[list[int]]) -> float:
        """Squared error of what the last block hands on if all linears are in place together."""
        kept: list[Tensor] = []
        for module, linear in linears.items():
            self.model.set_submodule(module, linear)
        handle = self.model.get_submodule(BLOCKS[-1]).register_forward_hook(lambda _m, _a, output: kept.append(output))
        with torch.no_grad():
            for ids in token_ids:
                self.model(input_ids=torch.tensor([ids]), use_cache=False)
        handle.remove()
        return sum(
            float((a.double() - b.double()).square().sum()) for a, b in zip(kept, self.outputs[BLOCKS[-1]], strict=True)
        )


class Simulated(nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer.simulate(x)


def by_method(calls: Calls, scheme: str, method: str) -> dict[str, nn.Module]:
    """The same kind of layers with weights by another method."""
    group_size, bits = (GROUP, 8) if scheme == "w4a8" else (0, 4)
    found: dict[str, nn.Module] = {}
    for name, module in calls.model.named_modules():
        if not isinstance(module, nn.Linear) or not name.startswith("model.layers."):
            continue
        rows: Any = InMemory(module.weight.data)
        weight: QuantizedWeight
        if method == "ssz":
            weight = ssz_weight(rows, bits=4, group_size=group_size, name=name)
        else:
            weight = minmax_weight(rows, bits=4, symmetric=scheme == "w4a8", group_size=group_size, name=name)
        layer = DynamicInt(weight.codes, weight.scale, weight.offset, module.bias, weight_bits=4, act_bits=bits)
        found[name] = Simulated(layer)
    return found


@pytest.mark.parametrize("scheme", ["w4a8", "w4a4"])
@pytest.mark.parametrize("propagate", ["float", "quantized"])
def test_files_are_what_they_should_be(
    naive: ModuleType, runs: Callable[[str, str], Path], scheme: str, propagate: str
) -> None:
    """Read back by Slim and by an independent reader: the same codes, scales and outputs."""
    path = runs(scheme, propagate)
    folder, linears = AscendV1Folder(path), naive_linears(naive, path)
    assert len(linears) == 21
    generator = torch.Generator().manual_seed(0)
    for name, other in linears.items():
        layer = folder.layer(name)
        assert isinstance(layer, DynamicInt)
        assert layer.kind == {"w4a8": "W4A8_DYNAMIC", "w4a4": "W4A4_DYNAMIC"}[scheme]
        assert np.array_equal(layer.weight.numpy(), other.codes)
        assert -8 <= other.codes.min() < 0 < other.codes.max() <= 7
        assert np.allclose(layer.dequantized().numpy(), other.weight, rtol=1e-5, atol=1e-7)
        if scheme == "w4a4":
            assert torch.equal(layer.weight_scale.bfloat16().float(), layer.weight_scale)
            assert bool(layer.weight_offset.any())
        else:
            assert layer.scale.shape == (layer.weight.shape[0], layer.weight.shape[1] // GROUP)
        x = torch.randn(4, layer.weight.shape[1], generator=generator)
        assert torch.allclose(layer.simulate(x), other(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", ["w4a8", "w4a4"])
def test_every_block_is_better_than_by_rounding_and_than_by_ssz(
    naive: ModuleType,
    runs: Callable[[str, str], Path],
    model_folder: ModelFolder,
    token_ids: list[list[int]],
    scheme: str,
) -> None:
    calls = Calls(model_folder("qwen2"), token_ids)
    found = calls.errors(dict(naive_linears(naive, runs(scheme, "float"))))
    nearest = calls.errors(by_method(calls, scheme, "minmax"))
    ssz = calls.errors(by_method(calls, scheme, "ssz"))
    for ours, plain, searched in zip(found, nearest, ssz, strict=True):
        assert 0 < ours < 0.9 * plain
        assert ours < 0.9 * searched


@pytest.mark.parametrize("scheme", ["w4a8", "w4a4"])
def test_quantized_inputs_make_up_for_earlier_blocks(
    naive: ModuleType,
    runs: Callable[[str, str], Path],
    model_folder: ModelFolder,
    quantize: Quantize,
    token_ids: list[list[int]],
    tmp_path: Path,
    scheme: str,
) -> None:
    """Trained towards the float model, later blocks repair some of what earlier ones did."""
    model = model_folder("qwen2")
    ends = {
        propagate: Calls(model, token_ids).final_error(dict(naive_linears(naive, runs(scheme, propagate))), token_ids)
        for propagate in ("float", "quantized")
    }
    plain = Calls(model, token_ids)
    assert ends["quantized"] < ends["float"] < plain.final_error(by_method(plain, scheme, "minmax"), token_ids)
    own = recipe(SCHEMES[scheme], float_targets=False)
    result = quantize(model, tmp_path / "own", **own, propagate="quantized")
    end = Calls(model, token_ids).final_error(dict(naive_linears(naive, tmp_path / "own")), token_ids)
    assert ends["quantized"] < end
    assert result.samples == len(token_ids)
    # The first block is given the same in all three.
    first = [naive.read(path).tensors for path in (runs(scheme, "float"), runs(scheme, "quantized"), tmp_path / "own")]
    for name, tensor in first[0].items():
        if name.startswith("model.layers.0."):
            assert all(naive.bits(other[name]) == naive.bits(tensor) for other in first[1:])
    assert any(naive.bits(first[1][name]) != naive.bits(tensor) for name, tensor in first[0].items())


@pytest.mark.parametrize("propagate", ["float", "quantized"])
def test_a_run_that_was_killed_is_resumed(
    killed: Any,
    content: Any,
    model_folder: ModelFolder,
    runs: Callable[[str, str], Path],
    quantize: Quantize,
    tmp_path: Path,
    propagate: str,
) -> None:
    """To the same bytes, whatever the state of the global generator of random numbers."""
    options = recipe(SCHEMES["w4a8"]) | {"propagate": propagate}
    with killed(AutoroundQuant, "model.layers.2"):
        quantize(model_folder("qwen2"), tmp_path / "out", **options)
    torch.manual_seed(propagate == "float")
    before = torch.get_rng_state()
    result = quantize(model_folder("qwen2"), tmp_path / "out", resume=True, **options)
    assert torch.equal(torch.get_rng_state(), before)
    assert result.resumed_units >= 2
    assert content(tmp_path / "out") == content(runs("w4a8", propagate))


def test_the_recipe_of_laos_and_its_plan(
    naive: ModuleType, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    """W8A8 for attention, down projections and the first block, W4A4 for the other gates and ups."""
    model = model_folder("qwen3")
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    process = recipe(
        strategy("int8", "int8", include=["*self_attn*", "*down_proj*", "*layers.0.mlp*"]),
        strategy("int4", "int4", include=["*mlp*"]),
    )
    request = QuantRequest(model_path=model, save_path=tmp_path / "out", model_type="tiny", device="cpu", force=True)
    data = tmp_path / "calib.jsonl"
    data.write_text('"A generator is a function that returns an iterator."\n')
    parsed = recipe_from_dict({"apiversion": "modelslim_v1", "spec": process | {"dataset": str(data)}})
    plan = LlmService().plan(request, parsed)
    assert plan.counts() == {"FLOAT": 1, "W8A8_DYNAMIC": 17, "W4A4_DYNAMIC": 4}
    assert plan.assignments["model.layers.1.mlp.up_proj"].reason == "spec.process[0].strategies[1]"
    assert (
        "spec.process[0].strategies[1] names 5 linears that spec.process[0].strategies[0] has taken (first wins), "
        "e.g. model.layers.0.mlp.gate_proj"
    ) in plan.warnings
    weights = 32 * 32 * 2 + 16 * 32 * 2 + 3 * 32 * 48
    work = next(share for share in plan.memory.shares if share.what.startswith("the work of processors"))
    assert work.nbytes == 13 * weights + KEPT_BY_THE_HEAP
    result = quantize(model, tmp_path / "out", **process)
    written = naive.read(tmp_path / "out")
    assert written.description["model_quant_type"] == "W4A4_DYNAMIC"
    assert written.kind("model.layers.2.mlp.gate_proj") == "W4A4_DYNAMIC"
    assert written.kind("model.layers.2.mlp.down_proj") == "W8A8_DYNAMIC"
    assert {record.name: record.tokens for record in result.linears}["model.layers.0.mlp.up_proj"] is None
    assert all(10 < record.weight_sqnr_db < 60 for record in result.linears)
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_and_runners(
    content: Any,
    naive: ModuleType,
    model_folder: ModelFolder,
    quantize: Quantize,
    token_ids: list[list[int]],
    tmp_path: Path,
    dtype: torch.dtype,
) -> None:
    """Weight-only layers beside those of another processor, whole model in memory or block by block."""
    weight = {"dtype": "int4", "scope": "per_group", "method": "autoround", "ext": {"group_size": GROUP}}
    dynamic = {"act": {"scope": "per_token"}, "weight": {}}
    process = [
        {"type": "linear_quant", "qconfig": dynamic, "include": ["*.q_proj", "*.k_proj", "*.v_proj"]},
        {"type": "autoround_quant", "strategies": [{"qconfig": {"weight": weight}}], "iters": 6},
    ]
    model = model_folder("llama", dtype)
    for runner in ("layer_wise", "model_wise"):
        quantize(model, tmp_path / runner, process=process, runner=runner)
    recipe_file = "tiny_best_practice.yaml"
    assert content(tmp_path / "layer_wise", recipe_file) == content(tmp_path / "model_wise", recipe_file)
    folder = AscendV1Folder(tmp_path / "layer_wise")
    layers = {name: Simulated(folder.layer(name)) for name, _ in folder.layers()}
    assert {str(layer.layer.kind) for layer in layers.values()} == {"W4A16", "W8A8_DYNAMIC"}
    calls = Calls(model, token_ids, dtype)
    plain = dict(layers)
    for name, layer in layers.items():
        if layer.layer.kind == "W4A16":
            rows: Any = InMemory(calls.model.get_submodule(name).weight.data)
            nearest = minmax_weight(rows, bits=4, symmetric=True, group_size=GROUP, name=name)
            plain[name] = Simulated(type(layer.layer)(nearest.codes, nearest.scale, nearest.offset, bits=4))
    found, want = calls.errors(dict(layers)), calls.errors(dict(plain))
    assert all(ours < 0.9 * other for ours, other in zip(found, want, strict=True))


def test_a_group_size_that_does_not_divide(
    model_folder: ModelFolder, quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before any weight is read."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("must not be called")

    monkeypatch.setattr(LazyTensor, "rows", refuse)
    with pytest.raises(
        UnsupportedError, match=r"^model\.layers\.0\.mlp\.down_proj: ext\.group_size 32 does not divide"
    ):
        quantize(model_folder("qwen2"), tmp_path / "out", **recipe(strategy("int8", "int4", 32)))
    assert not (tmp_path / "out").exists()
