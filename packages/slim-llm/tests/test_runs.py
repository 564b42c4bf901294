"""Runs: the same output whatever the runner or the interruptions, at the price that was promised."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from slim_core.checkpoint.reader import Checkpoint
from slim_core.errors import InvalidDatasetError, InvalidModelError, SecurityError, UnsupportedError
from slim_core.processors.linear_quant import LinearQuant
from slim_core.runners.unit_run import UnitRun
from slim_core.service import QuantRequest

SAMPLES = 5
BLOCKS = 3
RECIPE = "tiny_best_practice.yaml"
ModelFolder = Callable[..., Path]
Quantize = Callable[..., Any]


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
@pytest.mark.parametrize("runner", ["layer_wise", "model_wise", "auto"])
def test_runners_agree(
    content: Any,
    model_folder: ModelFolder,
    output: ModelFolder,
    quantize: Quantize,
    tmp_path: Path,
    scheme: str,
    runner: str,
) -> None:
    """``auto`` is what ``output`` used, so the third case is also a second run of the same."""
    result = quantize(model_folder("mistral"), tmp_path / "out", scheme, runner=runner)
    assert content(tmp_path / "out", RECIPE) == content(output("mistral", scheme), RECIPE)
    assert [unit.name for unit in result.units] == ["prologue", *(f"model.layers.{i}" for i in range(3)), "epilogue"]
    assert [record.name for record in result.linears] == [record.name for record in dict.fromkeys(result.linears)]


def test_recipe_written_is_the_recipe_as_run(quantize: Quantize, model_folder: ModelFolder, tmp_path: Path) -> None:
    for name in ("a", "b"):
        quantize(model_folder("mistral"), tmp_path / name, "dynamic")
    recipe = (tmp_path / "a" / RECIPE).read_text()
    assert recipe == (tmp_path / "b" / RECIPE).read_text()
    assert "scope: per_token" in recipe
    assert "runner: auto" in recipe


def test_every_block_runs_once_for_every_sample(
    model_folder: ModelFolder, quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

    calls: list[str] = []
    for module in (LlamaDecoderLayer, LlamaMLP):
        original = module.forward
        monkeypatch.setattr(
            module,
            "forward",
            lambda self, *a, original=original, name=module.__name__, **k: (
                calls.append(name),
                original(self, *a, **k),
            )[1],
        )
    result = quantize(model_folder("llama"), tmp_path / "out", "static")
    assert result.block_forwards == BLOCKS * SAMPLES
    along = BLOCKS - 1  # a short sample passes all but the last, to see what of the others is to be kept
    tried = 4  # whether it may be given some tokens at a time: on a few made-up ones, once for all blocks
    assert calls.count("LlamaDecoderLayer") == calls.count("LlamaMLP") - tried == BLOCKS * SAMPLES + along
    assert result.samples == SAMPLES


@pytest.mark.parametrize("propagate", ["float", "quantized"])
def test_a_layer_is_done_before_the_next_one_begins(
    model_folder: ModelFolder, quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, propagate: str
) -> None:
    """All processors see a layer, in their order and once, then its storage goes, then the next layer runs."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    from slim_core.processors import linear_quant
    from slim_core.processors.iter_smooth import IterSmooth

    events: list[tuple[str, str]] = []
    quantized: list[str] = []
    layers: dict[int, Any] = {}
    forward, quantize_weight = LlamaDecoderLayer.forward, linear_quant.quantize_weight

    def running(self: Any, *args: Any, **kwargs: Any) -> Any:
        layers[self.self_attn.layer_idx] = self
        events.append((f"model.layers.{self.self_attn.layer_idx}", "forward"))
        for index, layer in layers.items():
            storage = [tensor.is_meta for tensor in layer.parameters()]
            assert all(storage) if index != self.self_attn.layer_idx else not any(storage)
        return forward(self, *args, **kwargs)

    def watched(kind: Any, name: str) -> None:
        process = kind.process

        def watching(self: Any, work: Any) -> None:
            events.append((work.name, f"{name} {self.config.include[0]}" if self.config.include else name))
            process(self, work)

        monkeypatch.setattr(kind, "process", watching)

    def once(*args: Any, linear: str, **kwargs: Any) -> Any:
        quantized.append(linear)
        return quantize_weight(*args, linear=linear, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", running)
    monkeypatch.setattr(linear_quant, "quantize_weight", once)
    watched(IterSmooth, "smooth")
    watched(LinearQuant, "quantize")
    weight = {"dtype": "int8", "scope": "per_channel", "symmetric": True, "method": "minmax"}
    rules = [
        {"type": "linear_quant", "qconfig": {"act": {}, "weight": weight}, "include": [pattern]}
        for pattern in ("*.self_attn.*", "*.mlp.*")
    ]
    process = [{"type": "iter_smooth", "enable_subgraph_type": ["norm-linear"]}, *rules]
    quantize(model_folder("llama"), tmp_path / "out", process=process, propagate=propagate, runner="layer_wise")
    quantizing = [("quantize *.self_attn.*", 1), ("quantize *.mlp.*", 1)]
    after = [("forward", SAMPLES)] if propagate == "quantized" else []
    wanted = [("prologue", *step) for step in quantizing]
    for block in range(BLOCKS):
        along = block < BLOCKS - 1  # the short sample that runs along, up to the last block
        steps = [("forward", SAMPLES + along), ("smooth", 1), *quantizing, *after]
        wanted += [(f"model.layers.{block}", *step) for step in steps]
    wanted += [("epilogue", *step) for step in quantizing]
    # What comes before are the forwards that find out how the model is made.
    found = [(*event, len(list(same))) for event, same in itertools.groupby(events)]
    assert found[found.index(wanted[0]) :] == wanted
    assert len(quantized) == len(set(quantized)) == 7 * BLOCKS
    assert all(tensor.is_meta for layer in layers.values() for tensor in layer.parameters())


@pytest.mark.parametrize("scheme", ["dynamic", "w8a16"])
def test_recipes_without_data_read_none_and_run_nothing(
    model_folder: ModelFolder, quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("must not be called")

    monkeypatch.setattr(LlamaForCausalLM, "forward", refuse)
    monkeypatch.setattr("slim_llm.quantize.open_tokenizer", refuse)
    result = quantize(model_folder("llama"), tmp_path / "out", scheme, dataset=str(tmp_path / "nothing.jsonl"))
    assert result.block_forwards == result.samples == 0
    with pytest.raises(InvalidDatasetError, match=r"spec\.dataset: there is no calibration set"):
        quantize(model_folder("llama"), tmp_path / "other", "static", dataset=str(tmp_path / "nothing.jsonl"))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("scheme", ["dynamic", "w8a16-asymmetric"])
def test_without_data_every_weight_is_read_once(
    naive: ModuleType,
    model_folder: ModelFolder,
    quantize: Quantize,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
) -> None:
    rows: dict[str, list[int]] = {}
    loads: list[str] = []
    read_rows, load = Checkpoint.rows, Checkpoint.load

    def counted_rows(self: Checkpoint, name: str, start: int, stop: int) -> torch.Tensor:
        if self.folder == folder:
            rows.setdefault(name, []).extend(range(start, stop))
        return read_rows(self, name, start, stop)

    def counted_load(self: Checkpoint, name: str) -> torch.Tensor:
        if self.folder == folder:
            loads.append(name)
        return load(self, name)

    folder = model_folder("qwen2")
    monkeypatch.setattr(Checkpoint, "rows", counted_rows)
    monkeypatch.setattr(Checkpoint, "load", counted_load)
    quantize(folder, tmp_path / "out", scheme)
    written = naive.read(tmp_path / "out")
    assert set(rows) == {f"{module}.weight" for module in written.quantized()}
    for name, read in rows.items():
        assert sorted(read) == list(range(len(written.tensors[name])))
    assert sorted(loads) == sorted(f"{m}.bias" for m in written.quantized() if f"{m}.bias" in written.tensors)


@pytest.mark.parametrize(("propagate", "there"), [("float", False), ("quantized", True)])
def test_a_block_is_in_memory_while_it_is_quantized_only_if_it_runs_again(
    model_folder: ModelFolder,
    quantize: Quantize,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    propagate: str,
    there: bool,
) -> None:
    found: set[bool] = set()
    quantized = UnitRun._quantize  # pyright: ignore[reportPrivateUsage]

    def looked_at(self: Any, work: Any) -> None:
        if self._unit.block is not None:
            module = self._bench.model.module.get_submodule(self._unit.name)
            found.update(not parameter.is_meta for parameter in module.parameters())
        quantized(self, work)

    monkeypatch.setattr(UnitRun, "_quantize", looked_at)
    quantize(model_folder("qwen2"), tmp_path / "out", "static", propagate=propagate)
    assert found == {there}


@pytest.mark.parametrize("unit", ["model.layers.1", "model.layers.2", "epilogue"])
@pytest.mark.parametrize(
    ("scheme", "options"), [("static", {}), ("static", {"propagate": "quantized"}), ("dynamic", {})]
)
def test_a_run_that_was_killed_is_resumed(
    killed: Any,
    content: Any,
    model_folder: ModelFolder,
    quantize: Quantize,
    tmp_path: Path,
    unit: str,
    scheme: str,
    options: dict[str, Any],
) -> None:
    model = model_folder("qwen2")
    whole = quantize(model, tmp_path / "whole", scheme, **options)
    with killed(LinearQuant, unit):
        quantize(model, tmp_path / "out", scheme, **options)
    assert not (tmp_path / "out").exists()
    result = quantize(model, tmp_path / "out", scheme, resume=True, **options)
    assert result.resumed_units >= 1
    assert [record.name for record in result.units] == [record.name for record in whole.units]
    assert [replace(record, seconds=0.0) for record in result.linears] == [
        replace(record, seconds=0.0) for record in whole.linears
    ]
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_run_killed_in_its_first_unit_leaves_nothing(
    killed: Any, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    with killed(LinearQuant, "prologue"):
        quantize(model_folder("llama"), tmp_path / "out", "dynamic")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UnsupportedError, match="there is no interrupted run to resume"):
        quantize(model_folder("llama"), tmp_path / "out", "dynamic", resume=True)


def test_resuming_with_another_recipe_is_refused(
    killed: Any, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    with killed(LinearQuant, "model.layers.2"):
        quantize(model_folder("llama"), tmp_path / "out", "dynamic")
    with pytest.raises(UnsupportedError, match="another recipe, model, data set or version"):
        quantize(model_folder("llama"), tmp_path / "out", "w8a16", resume=True)
    quantize(model_folder("llama"), tmp_path / "out", "dynamic", resume=True)


def test_an_existing_output_survives_a_failure(
    killed: Any, content: Any, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    quantize(model_folder("llama"), tmp_path / "out", "dynamic")
    before, parts = (content(tmp_path / "out", *skipped) for skipped in ((), (RECIPE,)))
    with pytest.raises(SecurityError, match="not empty"):
        quantize(model_folder("llama"), tmp_path / "out", "static")
    with killed(LinearQuant, "model.layers.2"):
        quantize(model_folder("llama"), tmp_path / "out", "static", overwrite=True)
    assert content(tmp_path / "out") == before
    quantize(model_folder("llama"), tmp_path / "out", "static", overwrite=True)
    assert content(tmp_path / "out", RECIPE) != parts
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_rules_are_applied_in_order_and_a_group_is_its_members(
    content: Any, naive: ModuleType, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    weight = {"dtype": "int8", "scope": "per_channel", "symmetric": True, "method": "minmax"}
    static = {"type": "linear_quant", "qconfig": {"act": {}, "weight": weight}, "include": ["*.q_proj", "*.o_proj"]}
    dynamic = {
        "type": "linear_quant",
        "qconfig": {"act": {"scope": "per_token"}, "weight": weight},
        "exclude": ["*.down_proj"],
    }
    model = model_folder("llama")
    first = quantize(model, tmp_path / "list", process=[static, dynamic])
    second = quantize(model, tmp_path / "group", process=[{"type": "group", "configs": [static, dynamic]}])
    assert content(tmp_path / "list", RECIPE) == content(tmp_path / "group", RECIPE)
    assert first.block_forwards == second.block_forwards == BLOCKS * SAMPLES
    written = naive.read(tmp_path / "list")
    kinds = {module.rpartition(".")[2]: written.kind(module) for module in written.quantized()}
    assert kinds == dict.fromkeys(["q_proj", "o_proj"], "W8A8") | dict.fromkeys(
        ["k_proj", "v_proj", "gate_proj", "up_proj"], "W8A8_DYNAMIC"
    )
    assert written.description["model.layers.0.mlp.down_proj.weight"] == "FLOAT"
    assert written.description["model_quant_type"] == "W8A8"
    assert any("first wins" in warning for warning in first.warnings)
    assert any("engines fuse these linears" in warning for warning in first.warnings)


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_nan_in_a_weight_names_the_tensor(
    naive: ModuleType, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path, scheme: str
) -> None:
    import shutil

    from safetensors.torch import save_file

    tensors, _ = naive.read_tensors(model_folder("llama"))
    tensors["model.layers.1.mlp.up_proj.weight"][5, 3] = float("nan")
    shutil.copytree(model_folder("llama"), tmp_path / "model")
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(InvalidModelError, match=r"model\.layers\.1\.mlp\.(up|down)_proj.* NaN or infinity"):
        quantize(tmp_path / "model", tmp_path / "out", scheme)
    assert not (tmp_path / "out").exists()


def test_a_plan_reads_no_weights(
    model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: Path
) -> None:
    from slim_core.recipe import recipe_from_dict
    from slim_llm.service import LlmService

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("must not be called")

    for name in ("rows", "load"):
        monkeypatch.setattr(Checkpoint, name, refuse)
    request = QuantRequest(
        model_path=model_folder("llama"), save_path=tmp_path / "o", model_type="tiny", device="cpu", force=True
    )
    spec = {
        "process": [{"type": "linear_quant", "qconfig": {"act": {}, "weight": {}}}],
        "save": [{"type": "ascendv1_saver"}],
        "dataset": str(dataset),
    }
    plan = LlmService().plan(request, recipe_from_dict({"apiversion": "modelslim_v1", "spec": spec}))
    assert plan.counts() == {"FLOAT": 1, "W8A8": 21}
    assert plan.forwards == 1
    assert not (tmp_path / "o").exists()
