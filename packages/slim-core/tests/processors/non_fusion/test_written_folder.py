"""The files of a model whose inputs are scaled: read back, verified, listed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from slim_core.evaluation.inspect import inspect_folder
from slim_core.evaluation.verify import verify_folder
from slim_core.model.units import LinearInfo
from slim_core.quantization.kinds import LayerKind
from slim_core.quantization.layers import QuantizedLinear, ScaledInput
from slim_core.savers.mindie_folder import MindieFolder
from slim_core.savers.mindie_format import MindieSaver

Made = Any  # of conftest.py
Quant = Callable[..., dict[str, Any]]
ITER: dict[str, Any] = {"type": "iter_smooth", "alpha": 0.7}
KINDS = {
    LayerKind.W8A8_DYNAMIC: ("per_token",),
    LayerKind.W8A8: ("per_tensor",),
    LayerKind.W8A8_MXFP8: ("per_block", "mxfp8"),
    LayerKind.W4A4_MXFP4: ("per_block", "mxfp4"),
}
Q, DOWN = "blocks.1.attn1.to_q", "blocks.0.ffn.net.2"


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_layers_are_read_back(
    made: Made, quant: Quant, tmp_path: Path, kind: LayerKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished: dict[str, QuantizedLinear] = {}
    write = MindieSaver.write_layer

    def noting(self: MindieSaver, writer: Any, info: LinearInfo, layer: QuantizedLinear) -> None:
        finished[info.prefix] = layer
        write(self, writer, info, layer)

    monkeypatch.setattr(MindieSaver, "write_layer", noting)
    made.written(tmp_path / "out", ITER, quant(*KINDS[kind], exclude=["*attn1.to_out.0"]))
    folder = MindieFolder(tmp_path / "out")
    assert dict(folder.layers()) == dict.fromkeys(finished, str(kind))
    assert len(finished) == 18
    for prefix, layer in finished.items():
        read = folder.layer(prefix)
        assert isinstance(read, ScaledInput)
        assert isinstance(layer, ScaledInput)
        assert read.kind == kind
        assert type(read.layer) is type(layer.layer)
        assert torch.equal(read.mul_scale, layer.mul_scale)
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(5, layer.weight.shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
            assert torch.equal(read.simulate(x), layer.simulate(x))
        weight = made.state[f"{prefix}.weight"]
        off = float((read.dequantized() - weight).norm() / weight.norm())
        assert off < (0.4 if kind is LayerKind.W4A4_MXFP4 else 0.05)  # it stands for the weight of the unscaled input
    assert folder.layer("blocks.0.attn1.to_out.0") is None
    assert verify_folder(tmp_path / "out", made.folder, "mindie-sd").problems == []


@pytest.fixture
def out(made: Made, quant: Quant, tmp_path: Path) -> Path:
    made.written(tmp_path / "out", ITER, quant())
    return tmp_path / "out"


def change(out: Path, tensors: Callable[[dict[str, Tensor]], None], types: Callable[[dict[str, str]], None]) -> None:
    (file,), (description,) = out.glob("*.safetensors"), out.glob("quant_model_description*.json")
    state, told = load_file(file), json.loads(description.read_text())
    tensors(state)
    types(told)
    save_file(state, file)
    description.write_text(json.dumps(told))


def test_a_sound_folder(made: Made, out: Path) -> None:
    found = verify_folder(out, made.folder)
    assert (found.problems, found.warnings) == ([], [])
    assert found.compared
    assert found.checked == 110
    leaves = inspect_folder(out).leaves
    assert leaves["to_q", "W8A8_DYNAMIC"].modules == 4
    assert leaves["to_q", "W8A8_DYNAMIC"].tensors == 4 * 5
    assert {leaf for leaf, kind in leaves if kind == "FLOAT"} == {"patch", "norm2", "head", "0", "1"}


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda m: m.mul_(2), f"{Q}.linear.weight: its relative error against the original is"),
        (lambda m: m[3].fill_(0.0), f"{Q}.div.mul_scale: holds numbers that are not positive"),
        (lambda m: m[3].fill_(float("nan")), f"{Q}.div.mul_scale: holds numbers that are not positive"),
    ],
)
def test_wrong_scales(made: Made, out: Path, spoil: Callable[[Tensor], Any], problem: str) -> None:
    change(out, lambda state: spoil(state[f"{Q}.div.mul_scale"]), lambda _: None)
    found = verify_folder(out, made.folder)
    assert any(text.startswith(problem) for text in [*found.problems, *found.warnings])


def test_a_scale_of_another_width(out: Path) -> None:
    change(out, lambda state: state.update({f"{DOWN}.div.mul_scale": torch.ones(3)}), lambda _: None)
    assert f"{DOWN}.div.mul_scale: is float32 [3], expected float32 [128]" in verify_folder(out).problems


def test_a_scale_of_a_linear_that_is_not_quantized(out: Path) -> None:
    name = "blocks.0.norm2.div.mul_scale"
    change(out, lambda state: state.update({name: torch.ones(64)}), lambda told: told.update({name: "FLOAT"}))
    assert verify_folder(out).problems == [
        f"{name}: scales the input of a linear that is not quantized: expected blocks.0.norm2.linear.weight"
    ]
