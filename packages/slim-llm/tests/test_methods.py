"""ssz, gptq and histogram from the recipe to the written files, judged by a forward of transformers' own."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from slim_core.evaluation.verify import verify_folder
from slim_core.progress import SilentProgress
from slim_core.recipe import recipe_from_dict
from slim_core.runners.run import RunResult
from slim_core.service import QuantRequest
from slim_llm.service import LlmService

SAMPLES, BLOCKS = 5, 3
ModelFolder = Callable[..., Path]
TOKEN = {"dtype": "int8", "scope": "per_token", "symmetric": True, "method": "minmax"}
GROUPS = {"scope": "per_group"}
FORMS: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "W8A16": (None, {"dtype": "int8"}),
    "W8A16 groups": (None, {"dtype": "int8", "symmetric": False, **GROUPS}),
    "W8A8": ({"dtype": "int8", "scope": "per_tensor", "symmetric": False}, {"dtype": "int8"}),
    "W4A8": (TOKEN, {"dtype": "int4"}),
    "W4A8 groups": (TOKEN, {"dtype": "int4", **GROUPS}),
}


def quantize(
    model: Path, save_path: Path, form: str, dataset: Path, method: str, act_method: str = "minmax", **ext: Any
) -> RunResult:
    act, weight = FORMS[form]
    if weight.get("scope") == "per_group":
        ext["group_size"] = 16
    qconfig: dict[str, Any] = {"weight": weight | {"method": method, "ext": ext}}
    if act is not None:
        qconfig["act"] = act if act["scope"] == "per_token" else act | {"method": act_method}
    spec = {
        "process": [{"type": "linear_quant", "qconfig": qconfig}],
        "save": [{"type": "ascendv1_saver"}],
        "dataset": str(dataset),
    }
    return LlmService().quantize(
        QuantRequest(model_path=model, save_path=save_path, model_type="tiny", device="cpu", force=True),
        recipe_from_dict({"apiversion": "modelslim_v1", "spec": spec}),
        SilentProgress(),
    )


def second_moments(model: Any, modules: list[str], token_ids: list[list[int]]) -> dict[str, Tensor]:
    """``sum x x^T`` of the inputs of linears, in float64, from plain forwards."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def add(_module: Any, args: tuple[Tensor, ...]) -> None:
            x = args[0].double().reshape(-1, args[0].shape[-1])
            found[name] = found.get(name, 0) + x.T @ x

        return add

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in modules]
    with torch.no_grad():
        for ids in token_ids:
            model(input_ids=torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def written_weight(written: Any, naive: ModuleType, module: str) -> Tensor:
    """The float64 weight that the files stand for, by the description of the format."""
    parts = {
        name.removeprefix(f"{module}."): tensor
        for name, tensor in written.tensors.items()
        if name.rpartition(".")[0] == module
    }
    codes = parts["weight"].to(torch.int64)
    kind = written.kind(module)
    if kind == "W8A8":
        scale = torch.from_numpy(naive.decoded(parts["deq_scale"]).copy()).double() / parts["input_scale"].double()
        return codes.double() * scale.unsqueeze(1)
    scale, offset = parts["weight_scale"].double(), parts["weight_offset"].double()
    if kind == "W4A8_DYNAMIC":
        low, high = codes & 15, (codes >> 4) & 15
        codes = torch.stack([low, high], 1).reshape(-1, codes.shape[1])
        codes = torch.where(codes > 7, codes - 16, codes)
        if "weight_scale_second" in parts:
            scale, offset = scale * parts["weight_scale_second"].double(), parts["weight_offset_second"].double()
    repeat = codes.shape[1] // scale.shape[1]
    return (codes - offset.repeat_interleave(repeat, 1)) * scale.repeat_interleave(repeat, 1)


@pytest.fixture(scope="module")
def reference(model_folder: ModelFolder, token_ids: list[list[int]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and second moments of the inputs of all linears of the blocks."""
    model = AutoModelForCausalLM.from_pretrained(model_folder("qwen2"), dtype=torch.bfloat16)
    linears = {
        name: module.weight.detach().double()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }
    return linears, second_moments(model, list(linears), token_ids)


@pytest.fixture(scope="module")
def errors(
    naive: ModuleType, reference: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> Callable[[Path], dict[str, float]]:
    """Squared error of the outputs of every written linear on the calibration set, relative to the outputs."""
    weights, moments = reference

    def of(folder: Path) -> dict[str, float]:
        written = naive.read(folder)
        assert sorted(written.quantized()) == sorted(weights)
        found: dict[str, float] = {}
        for name, weight in weights.items():
            error = written_weight(written, naive, name) - weight
            found[name] = float(((error @ moments[name]) * error).sum() / ((weight @ moments[name]) * weight).sum())
        return found

    return of


Runs = Callable[..., tuple[Path, RunResult]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model_folder: ModelFolder, dataset: Path) -> Runs:
    """``run(form, method, ...)``: the folder that it wrote and what the run told; each is made once."""
    made: dict[tuple[Any, ...], tuple[Path, RunResult]] = {}

    def once(form: str, method: str, **options: Any) -> tuple[Path, RunResult]:
        key = (form, method, *sorted(options.items()))
        if key not in made:
            path = tmp_path_factory.mktemp("methods") / "out"
            made[key] = path, quantize(model_folder("qwen2"), path, form, dataset, method, **options)
        return made[key]

    return once


@pytest.mark.parametrize("form", list(FORMS))
def test_gptq_lowers_the_output_error_in_one_forward(
    form: str, run: Runs, errors: Callable[[Path], dict[str, float]], model_folder: ModelFolder
) -> None:
    folder, result = run(form, "gptq")
    plain, _ = run(form, "minmax")
    gptq, minmax = errors(folder), errors(plain)
    assert result.block_forwards == BLOCKS * SAMPLES
    for name, error in gptq.items():
        assert error < 0.9 * minmax[name], name
    assert sum(gptq.values()) < 0.5 * sum(minmax.values())
    assert not any("rounded to nearest" in warning for warning in result.warnings)
    assert not verify_folder(folder, model_folder("qwen2")).problems


@pytest.mark.parametrize("form", ["W8A16", "W4A8 groups"])
def test_ssz_lowers_the_error_of_the_weights(
    form: str, run: Runs, reference: tuple[dict[str, Tensor], dict[str, Tensor]], naive: ModuleType
) -> None:
    weights, moments = reference
    plain, ssz, weighted = (
        naive.read(run(form, method, **ext)[0])
        for method, ext in (("minmax", {}), ("ssz", {}), ("ssz", {"weighted": True}))
    )
    totals = dict.fromkeys(("minmax", "ssz", "plain weighted", "weighted"), 0.0)
    for name, weight in weights.items():
        importance = moments[name].diagonal()
        squares = [(written_weight(one, naive, name) - weight).square() for one in (plain, ssz, weighted)]
        assert float(squares[1].sum()) <= float(squares[0].sum())
        assert float((squares[2] * importance).sum()) <= float((squares[0] * importance).sum())
        totals["minmax"] += float(squares[0].sum())
        totals["ssz"] += float(squares[1].sum())
        totals["plain weighted"] += float((squares[1] * importance).sum())
        totals["weighted"] += float((squares[2] * importance).sum())
    assert totals["ssz"] < totals["minmax"] * (0.9 if form.startswith("W4") else 0.99)
    assert totals["weighted"] < totals["plain weighted"]


def test_forwards_are_only_made_where_inputs_count(run: Runs) -> None:
    assert run("W4A8 groups", "ssz")[1].block_forwards == 0
    assert run("W4A8 groups", "ssz", weighted=True)[1].block_forwards == BLOCKS * SAMPLES
    assert run("W8A8", "ssz", act_method="histogram", weighted=True)[1].block_forwards == BLOCKS * SAMPLES


def test_histogram_clips_and_saturates(
    run: Runs, naive: ModuleType, model_folder: ModelFolder, token_ids: list[list[int]]
) -> None:
    """On the inputs themselves, clipped scales give no more error than those of the extremes."""
    clipped, plain = (naive.read(run("W8A8", "minmax", act_method=act)[0]) for act in ("histogram", "minmax"))
    model = AutoModelForCausalLM.from_pretrained(model_folder("qwen2"), dtype=torch.bfloat16)
    seen: dict[str, list[Tensor]] = {name: [] for name in clipped.quantized()}
    for name, parts in seen.items():
        model.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, parts=parts: parts.append(args[0].double())
        )
    with torch.no_grad():
        for ids in token_ids:
            model(input_ids=torch.tensor([ids]), use_cache=False)
    totals, smaller = [0.0, 0.0], 0
    for name, parts in seen.items():
        x = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
        scales: list[float] = []
        for i, written in enumerate((clipped, plain)):
            scale, offset = (written.tensors[f"{name}.{part}"].double() for part in ("input_scale", "input_offset"))
            assert torch.equal(scale.to(torch.bfloat16).double(), scale)
            codes = torch.clamp(torch.round(x / scale + offset), -128, 127)
            totals[i] += float((((codes - offset) * scale - x) ** 2).sum() / x.square().sum())
            scales.append(float(scale))
        smaller += scales[0] < scales[1]
    assert totals[0] < 0.995 * totals[1]
    assert smaller > len(seen) // 2


@pytest.mark.parametrize(
    ("form", "method", "options"),
    [
        ("W4A8 groups", "ssz", {"weighted": True}),
        ("W8A8", "ssz", {"act_method": "histogram", "weighted": True}),
        ("W4A8", "gptq", {}),
        ("W8A16 groups", "gptq", {"actorder": False}),
    ],
)
def test_order_of_samples_does_not_matter(
    form: str,
    method: str,
    options: dict[str, Any],
    run: Runs,
    errors: Callable[[Path], dict[str, float]],
    naive: ModuleType,
    model_folder: ModelFolder,
    dataset: Path,
    tmp_path: Path,
) -> None:
    backwards = tmp_path / "backwards.jsonl"
    lines = dataset.read_text().splitlines()
    backwards.write_text("".join(line + "\n" for line in reversed(lines)))
    assert json.loads(lines[0]) != json.loads(lines[-1])
    quantize(model_folder("qwen2"), tmp_path / "out", form, backwards, method, **options)
    folder, _ = run(form, method, **options)
    one, other = naive.read(folder), naive.read(tmp_path / "out")
    if method != "gptq":  # sums of float32 products depend on their order in the last bits
        assert one.tensors.keys() == other.tensors.keys()
        assert all(naive.bits(one.tensors[name]) == naive.bits(other.tensors[name]) for name in one.tensors)
        return
    before, after = errors(folder), errors(tmp_path / "out")
    assert sum(after.values()) == pytest.approx(sum(before.values()), rel=0.05)
    for name in before:
        assert after[name] == pytest.approx(before[name], rel=0.3)


def test_same_bytes_again(
    run: Runs, naive: ModuleType, model_folder: ModelFolder, dataset: Path, tmp_path: Path
) -> None:
    quantize(model_folder("qwen2"), tmp_path / "out", "W4A8 groups", dataset, "gptq")
    one, other = naive.read(run("W4A8 groups", "gptq")[0]), naive.read(tmp_path / "out")
    assert all(naive.bits(one.tensors[name]) == naive.bits(other.tensors[name]) for name in one.tensors)


@pytest.mark.parametrize("process", [["gptq"], ["flex", "gptq"], ["sparse"]], ids="+".join)
def test_hessians_are_given_back_with_their_block(
    model_folder: ModelFolder, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process: list[str]
) -> None:
    """At once, not when the garbage collector comes by; those of the last linear when that is done."""
    from slim_core.quantization.statistics import Hessian
    from slim_core.runners import run as running
    from slim_core.savers.ascendv1 import AscendV1Saver

    kinds: dict[str, dict[str, Any]] = {
        "gptq": {"type": "linear_quant", "qconfig": {"act": TOKEN, "weight": {"dtype": "int8", "method": "gptq"}}},
        "flex": {"type": "flex_smooth_quant", "alpha": 0.5, "beta": 0.5},
        "sparse": {"type": "float_sparse"},
    }
    seen: list[weakref.ref[Tensor]] = []
    update, rescaled, write = Hessian.update, Hessian.rescaled, AscendV1Saver.write_layer
    alive: list[int] = []

    def watched(self: Hessian, x: Tensor) -> None:
        update(self, x)
        assert self.total is not None
        if not any(one() is self.total for one in seen):
            seen.append(weakref.ref(self.total))

    def watched_too(self: Hessian, *given: Any) -> Hessian:
        made = rescaled(self, *given)
        if made.total is not None:
            seen.append(weakref.ref(made.total))
        return made

    def count(*given: Any) -> None:
        alive.append(sum(one() is not None for one in seen))
        write(*given)

    def check() -> None:
        assert not any(one() is not None for one in seen)

    monkeypatch.setattr(Hessian, "update", watched)
    monkeypatch.setattr(Hessian, "rescaled", watched_too)
    monkeypatch.setattr(AscendV1Saver, "write_layer", count)
    monkeypatch.setattr(running, "give_back_freed_memory", check)
    spec = {
        "process": [kinds[name] for name in process],
        "save": [{"type": "ascendv1_saver"}],
        "dataset": str(dataset),
    }
    gc.disable()
    try:
        LlmService().quantize(
            QuantRequest(
                model_path=model_folder("qwen2"), save_path=tmp_path / "o", model_type="tiny", device="cpu", force=True
            ),
            recipe_from_dict({"apiversion": "modelslim_v1", "spec": spec}),
            SilentProgress(),
        )
    finally:
        gc.enable()
    # q, k and v have one input, and so have gate and up: 4, 4, 4, 3, 2, 2, 1 are alive when a layer is written.
    assert alive == [4, 4, 4, 3, 2, 2, 1] * BLOCKS
