"""Rotations at run time: carried out as the format describes them, the model is the original again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from slim_core.errors import UnsupportedError
from slim_core.evaluation.verify import verify_folder

ModelFolder = Callable[..., Path]
Quantize = Callable[..., Any]
Stranger = Any  # of conftest.py
EXAMPLE = Path(__file__).parents[4] / "examples" / "tiny-qwen3"
HELDOUT = (EXAMPLE.parent / "heldout.txt").read_text()[:1500]
QUAROT: dict[str, Any] = {"type": "quarot"}
UNDESCRIBED = ("heads_rotation", "kronecker_rotation_m", "kronecker_rotation_n")
IDS = [[61 * i % 3000 for i in range(40)]]


def beside_of(stranger: Stranger, written: Path) -> dict[str, Tensor]:
    """The tensors that an engine needs to rotate at run time."""
    return {name: tensor for name, tensor in stranger.tensors(written).items() if name.endswith(UNDESCRIBED)}


def with_rotated_inputs(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Rotate inputs as the format describes it, from the tensors alone."""
    for name, matrix in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind == "heads_rotation":

            def turn(_m: nn.Module, args: tuple[Tensor, ...], matrix: Tensor = matrix) -> tuple[Tensor]:
                heads = args[0].unflatten(-1, (len(matrix), -1))
                return (torch.einsum("hg,...hd->...gd", matrix, heads).flatten(-2),)
        elif kind == "kronecker_rotation_m":
            inner = tensors[f"{module}.kronecker_rotation_n"]

            def turn(
                _m: nn.Module, args: tuple[Tensor, ...], matrix: Tensor = matrix, inner: Tensor = inner
            ) -> tuple[Tensor]:
                x = args[0].unflatten(-1, (len(matrix), len(inner)))
                return ((matrix.T @ x @ inner).flatten(-2),)
        else:
            continue
        model.get_submodule(module).register_forward_pre_hook(turn)


ONLINE = QUAROT | {"online": True, "max_tp_size": 2, "down_proj_online_layers": [0, 2]}


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_rotations_at_run_time(
    stranger: Stranger, naive: ModuleType, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path, family: str
) -> None:
    folder = model_folder(family, torch.float32)
    result = quantize(folder, tmp_path / "out", process=[ONLINE])
    assert any("no engine that is known here" in warning for warning in result.warnings)
    rotated, beside = stranger.opened(tmp_path / "out"), beside_of(stranger, tmp_path / "out")
    exact = stranger.logits(stranger.opened(folder), IDS)
    assert (
        stranger.far(exact, stranger.logits(rotated, IDS)) > 1e-2
    )  # without the rotations at run time it is another model
    with_rotated_inputs(rotated, beside)
    assert stranger.far(exact, stranger.logits(rotated, IDS)) < 1e-4
    description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    heads = [f"model.layers.{i}.self_attn.o_proj" for i in range(3)]
    downs = [f"model.layers.{i}.mlp.down_proj" for i in (0, 2)]
    assert description["metadata"]["quarot"] == {
        "max_tp_size": 2,
        "heads_rotation": {"layers": heads},
        "kronecker_rotation": {"layers": downs},
    }
    expected = {f"{name}.heads_rotation" for name in heads}
    expected |= {f"{name}.kronecker_rotation_{part}" for name in downs for part in "mn"}
    assert set(beside) == expected
    assert not [name for name in description if name.endswith(UNDESCRIBED)]
    assert beside[f"{heads[0]}.heads_rotation"].shape == (4, 4)
    assert bool((beside[f"{heads[0]}.heads_rotation"][:2, 2:] == 0).all())  # blocks of max_tp_size
    assert [len(beside[f"{downs[0]}.kronecker_rotation_{part}"]) for part in "mn"] == [4, 12]
    assert verify_folder(tmp_path / "out", folder).ok
    for matrix in beside.values():
        square = matrix.double().T @ matrix.double()
        assert float((square - torch.eye(len(square)).double()).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rule", "smoothed"), [("static", False), ("static", True), ("dynamic", True)])
def test_run_time_rotations_of_the_simulation_are_those_of_the_written_files(
    rules: Any,
    stranger: Stranger,
    naive: ModuleType,
    model_folder: ModelFolder,
    quantize: Quantize,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    rule: str,
    smoothed: bool,
) -> None:
    """What a run hands on from its quantized blocks is bit by bit what a block made of the written files gives."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    last: dict[int, Tensor] = {}
    forward = LlamaDecoderLayer.forward

    def recording(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        last[self.self_attn.layer_idx] = output[0] if isinstance(output, tuple) else output
        return output

    monkeypatch.setattr(LlamaDecoderLayer, "forward", recording)
    folder, text = model_folder("llama", dtype), HELDOUT
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": text}) + "\n")
    smoothing = [{"type": "iter_smooth"}] * smoothed
    quantize(
        folder,
        tmp_path / "out",
        process=[ONLINE, *smoothing, rules[rule]],
        propagate="quantized",
        dataset={"path": str(tmp_path / "one.jsonl"), "max_length": 32},
    )
    simulated = dict(last)
    stranger.scores(folder, tmp_path / "out", HELDOUT, sequence_length=32, max_windows=1)
    assert sorted(simulated) == sorted(last) == [0, 1, 2]
    for index, output in simulated.items():
        assert output.shape[-2:] == (32, 32)
        assert torch.equal(output, last[index]), index
    if smoothed or dtype != torch.float32:
        return
    # A stranger's model of the same files, and one that leaves out the rotations at run time.
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"][:, :32]
    quantize(folder, tmp_path / "float", process=[ONLINE])
    seen: list[Tensor] = []
    for turned in (True, False):
        model, beside = stranger.opened(tmp_path / "float"), beside_of(stranger, tmp_path / "float")
        naive.deploy(model, naive.read(tmp_path / "out"))
        if turned:
            with_rotated_inputs(model, beside)
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        seen.append(last[2])
    assert stranger.far([simulated[2]], [seen[0]]) < 0.02
    assert stranger.far([simulated[2]], [seen[1]]) > 0.2


@pytest.mark.parametrize("propagate", ["float", "quantized"])
def test_run_time_rotations_are_calibrated_and_scored(
    rules: Any,
    stranger: Stranger,
    naive: ModuleType,
    model_folder: ModelFolder,
    quantize: Quantize,
    token_ids: list[list[int]],
    tmp_path: Path,
    propagate: str,
) -> None:
    """Ranges are those of the rotated inputs; the evaluation rotates them too."""
    folder = model_folder("llama")
    quantize(folder, tmp_path / "float", process=[ONLINE])
    quantize(folder, tmp_path / "out", process=[ONLINE, rules["static"]], propagate=propagate)
    written = naive.read(tmp_path / "out")
    model, beside = stranger.opened(tmp_path / "float"), beside_of(stranger, tmp_path / "float")
    model.to(torch.bfloat16)
    with_rotated_inputs(model, {name: tensor.bfloat16() for name, tensor in beside.items()})
    names = ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"]
    for name, (low, high) in naive.ranges(model, names, token_ids).items():
        scale, offset = naive.input_parameters(low, high, False, torch.bfloat16)
        assert float(written.tensors[f"{name}.input_scale"]) == pytest.approx(float(scale), rel=0.02)
        assert abs(float(written.tensors[f"{name}.input_offset"]) - float(offset)) <= 3
    assert stranger.scores(folder, tmp_path / "out", HELDOUT, sequence_length=32).kl_divergence < 0.5
    for part in UNDESCRIBED:  # a reader who does not know of the rotations has another model
        assert any(name.endswith(part) for name in written.tensors)


def test_ranks_that_could_not_rotate_their_share(model_folder: ModelFolder, quantize: Quantize, tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedError, match=r"with 2 ranks there are 2 heads per rank, which is no multiple .* block of 4"
    ) as caught:
        quantize(model_folder("llama"), tmp_path / "out", process=[ONLINE | {"max_tp_size": 4}])
    assert (caught.value.where, caught.value.remedy) == ("spec.process[0].max_tp_size", "use max_tp_size 2")


def test_layers_of_online_rotation(model_folder: ModelFolder, quantize: Quantize, tmp_path: Path) -> None:
    rotate = ONLINE | {"down_proj_online_layers": [-1, 1, 7]}
    result = quantize(model_folder("llama"), tmp_path / "out", process=[rotate])
    assert any("the model has no layers -1, 7" in warning for warning in result.warnings)
    with pytest.raises(UnsupportedError, match=r"model\.layers\.0: it has 4 down projections"):
        quantize(model_folder("qwen3_moe"), tmp_path / "moe", process=[ONLINE | {"down_proj_online_layers": [0]}])
    idle = QUAROT | {"max_tp_size": 2, "down_proj_online_layers": [0]}
    warnings = quantize(model_folder("llama"), tmp_path / "idle", process=[idle]).warnings
    assert sum("has no effect without online: true" in warning for warning in warnings) == 2
