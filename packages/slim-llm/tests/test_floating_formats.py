"""FP8 and the microscaling formats from recipe to written files, which a naive numpy reader then computes with."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from slim_core.errors import InvalidModelError, SchemaValidateError, UnsupportedError
from slim_core.evaluation.verify import verify_folder
from slim_core.progress import SilentProgress
from slim_core.recipe import recipe_from_dict
from slim_core.savers.ascendv1_folder import AscendV1Folder
from slim_core.service import EvalRequest, QuantRequest
from slim_llm.service import LlmService

FAMILY = "qwen2"  # its q, k and v have biases
TOKENIZER = Path(__file__).parents[3] / "examples" / "tiny-qwen3"
ModelFolder = Callable[..., Path]
Array = np.ndarray[Any, Any]

FP8 = {"act": {"dtype": "fp8_e4m3", "scope": "per_token"}, "weight": {"dtype": "fp8_e4m3"}}
EXT = {"ext": {"dual_block_size": 32}}
DUAL = {"dtype": "mxfp4", "scope": "dual_scale", "method": "dualscale"} | EXT


def mx(act: str, weight: str, method: str = "minmax", **ext: Any) -> dict[str, Any]:
    return {
        "act": {"dtype": act, "scope": "per_block"},
        "weight": {"dtype": weight, "scope": "per_block", "method": method, "ext": ext},
    }


RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8": ("WFP8AFP8_DYNAMIC", FP8),
    "mxfp8": ("W8A8_MXFP8", mx("mxfp8", "mxfp8", axes=-1)),
    "mxfp8 mse_round": ("W8A8_MXFP8", mx("mxfp8", "mxfp8", "mse_round")),
    "w4a8": ("W4A8_MXFP", mx("mxfp8", "mxfp4")),
    "w4a8 ceil_x": ("W4A8_MXFP", mx("mxfp8", "mxfp4", "ceil_x")),
    "w4a8 ceil_x search": ("W4A8_MXFP", mx("mxfp8", "mxfp4", "ceil_x", enable_search=True)),
    "mxfp4": ("W4A4_MXFP4", mx("mxfp4", "mxfp4")),
    "mxfp4 fouroversix": ("W4A4_MXFP4", mx("mxfp4", "mxfp4", "fouroversix")),
    "dualscale": ("W4A4_MXFP4_DUALSCALE", {"act": DUAL, "weight": DUAL}),
}
every_recipe = pytest.mark.parametrize("name", list(RECIPES))


def quantize(model: Path, save_path: Path, qconfig: dict[str, Any], **options: Any) -> None:
    rule = {"type": "linear_quant", "qconfig": qconfig, "exclude": options.pop("exclude", [])}
    saver = {"type": "ascendv1_saver"} | options
    recipe = recipe_from_dict({"apiversion": "modelslim_v1", "spec": {"process": [rule], "save": [saver]}})
    request = QuantRequest(model_path=model, save_path=save_path, model_type="tiny", device="cpu", force=True)
    LlmService().quantize(request, recipe, SilentProgress())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model_folder: ModelFolder) -> Callable[[str], Path]:
    """The folder that a recipe wrote; a linear 48 wide has no outer blocks of 32 and stays out of that recipe."""
    made: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("floating") / "out"
            exclude = ["*.down_proj"] if name == "dualscale" else []
            quantize(model_folder(FAMILY), made[name], RECIPES[name][1], exclude=exclude)
        return made[name]

    return run


def e4m3(x: Array) -> Array:
    """The nearest E4M3 numbers, halves to even, saturating: steps of 2^(e - 3), and 2^-9 below 2^-6."""
    step = np.exp2(np.maximum(np.frexp(x)[1] - 1, -6) - 3.0)
    return np.clip(np.round(x / step) * step, -448, 448)


def e2m1(x: Array, ties: str = "away") -> Array:
    """The nearest E2M1 numbers, saturating: steps of 0.5 below 2, 1 below 4, 2 above."""
    step = np.exp2(np.clip(np.frexp(x)[1] - 1, 0, 2) - 1.0)
    steps = np.abs(x) / step
    whole = np.floor(steps + 0.5) if ties == "away" else np.round(steps)
    return np.copysign(np.minimum(whole * step, 6), x)


def e4m3_numbers(weight: Tensor) -> Array:
    """From the bits: sign, four bits of exponent with bias 7, three of mantissa."""
    code = weight.view(torch.uint8).numpy().astype(np.int64)
    exponent, mantissa = (code >> 3) & 15, code & 7
    magnitude = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * np.exp2(exponent - 7.0))
    return np.where(code >> 7, -magnitude, magnitude)


def e2m1_numbers(packed: Tensor) -> Array:
    """The first column of a byte is its low half."""
    assert packed.dtype == torch.uint8
    code = packed.numpy()
    both = np.stack([code & 15, code >> 4], axis=2).reshape(len(code), -1)
    magnitude = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[both & 7]
    return np.where(both >> 3, -magnitude, magnitude)


def spread(per_block: Array, size: int, width: int) -> Array:
    return np.repeat(per_block, size, axis=1)[:, :width]


def maxima(x: Array, size: int) -> Array:
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % size)))
    return np.abs(padded).reshape(len(x), -1, size).max(2) if len(x) else np.zeros((0, padded.shape[1] // size))


def blockwise(x: Array, emax: int, rounded: Callable[[Array], Array]) -> Array:
    m = maxima(x, 32)
    scale = spread(np.exp2(np.where(m > 0, np.frexp(m)[1] - 1.0 - emax, -127)), 32, x.shape[1])
    return rounded(x / scale) * scale


class Stored:
    """A written linear, from its tensors alone."""

    def __init__(self, tensors: dict[str, Tensor], module: str, kind: str) -> None:
        self.kind = kind
        self.part = {
            name.removeprefix(f"{module}."): tensor
            for name, tensor in tensors.items()
            if name.rpartition(".")[0] == module
        }
        weight = self.part["weight"]
        self.elements = e2m1_numbers(weight) if kind.startswith("W4") else e4m3_numbers(weight)
        self.scale = self.part["weight_scale"].numpy()
        width = self.elements.shape[1]
        if kind == "WFP8AFP8_DYNAMIC":
            self.weight = self.elements * self.scale.astype(np.float64)
            return
        assert self.scale.dtype == np.uint8
        self.weight = self.elements * spread(np.exp2(self.scale - 127.0), 32, width)
        if kind == "W4A4_MXFP4_DUALSCALE":
            self.weight = self.weight * spread(self.part["weight_dual_scale"][..., 0].double().numpy(), 32, width)

    def inputs(self, x: Tensor) -> Array:
        """Activations ``(tokens, in)`` as the target has them, in float64."""
        rows = x.double().numpy()
        if self.kind == "WFP8AFP8_DYNAMIC":
            scale = x.float().abs().amax(1, keepdim=True) / 448
            return e4m3((x.float() / scale).double().numpy()) * scale.double().numpy()
        if self.kind == "W4A4_MXFP4_DUALSCALE":
            outer = (torch.from_numpy(maxima(rows, 32)).float() / 6).repeat_interleave(32, 1)
            inner = (x.float() / outer).to(x.dtype).double().numpy()
            return blockwise(inner, 2, lambda y: e2m1(y, "even")) * outer.double().numpy()
        return blockwise(rows, 2, e2m1) if self.kind == "W4A4_MXFP4" else blockwise(rows, 8, e4m3)

    def forward(self, x: Tensor) -> Array:
        y = self.inputs(x) @ self.weight.T
        return y if "bias" not in self.part else y + self.part["bias"].double().numpy()


class Deployed(nn.Module):
    def __init__(self, stored: Stored) -> None:
        super().__init__()
        self.stored = stored

    def forward(self, x: Tensor) -> Tensor:
        y = self.stored.forward(x.reshape(-1, x.shape[-1]))
        return torch.from_numpy(y).to(x.dtype).reshape(*x.shape[:-1], y.shape[1])


@every_recipe
def test_what_is_written(
    naive: ModuleType, folder: Callable[[str], Path], model_folder: ModelFolder, name: str
) -> None:
    kind, _ = RECIPES[name]
    written = naive.read(folder(name))
    source, _ = naive.read_tensors(model_folder(FAMILY))
    quantized = written.quantized()
    assert len(quantized) == 3 * (6 if name == "dualscale" else 7)
    assert {written.kind(module) for module in quantized} == {kind}
    assert written.description["model_quant_type"] == kind
    assert written.description["group_size"] == (0 if name == "fp8" else 32)
    for module in quantized:
        out, width = source[f"{module}.weight"].shape
        parts = Stored(written.tensors, module, kind).part
        bias = parts.pop("bias", None)
        assert (bias is not None) == (f"{module}.bias" in source)
        if bias is not None:
            assert torch.equal(bias, source[f"{module}.bias"].float())
            assert written.description[f"{module}.bias"] == "FLOAT"
        exponents = (torch.uint8, (out, -(-width // 32)))
        wide, packed = (torch.float8_e4m3fn, (out, width)), (torch.uint8, (out, width // 2))
        per_row = (torch.float32, (out, 1))
        assert {suffix: (t.dtype, tuple(t.shape)) for suffix, t in parts.items()} == {
            "WFP8AFP8_DYNAMIC": {"weight": wide, "weight_scale": per_row, "weight_offset": per_row},
            "W8A8_MXFP8": {"weight": wide, "weight_scale": exponents},
            "W4A8_MXFP": {"weight": packed, "weight_scale": exponents},
            "W4A4_MXFP4": {"weight": packed, "weight_scale": exponents},
            "W4A4_MXFP4_DUALSCALE": {
                "weight": packed,
                "weight_scale": exponents,
                "weight_dual_scale": (torch.float32, (out, width // 32, 1)),
            },
        }[kind]


def candidates(name: str, w: Array) -> list[Array]:
    """Exponents that the formulas of the protocol give for every block, in float64."""
    m = maxima(w, 32)
    down = np.frexp(m)[1] - 1.0
    return {
        "mxfp8": [down - 8],
        "mxfp8 mse_round": [down - 8, np.ceil(np.log2(m)) - 8],
        "w4a8": [np.floor(np.log2(m / 0.875)) - 2],
        "mxfp4": [np.floor(np.log2(m / 0.875)) - 2],
        "w4a8 ceil_x": [np.ceil(np.log2(m / 7.25))],
        "mxfp4 fouroversix": [np.round(np.log2(m / 6)), np.round(np.log2(m / 4))],
    }[name]


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in ("fp8", "dualscale", "w4a8 ceil_x search")])
def test_weights_are_those_of_the_formulas(
    naive: ModuleType, folder: Callable[[str], Path], model_folder: ModelFolder, name: str
) -> None:
    kind, _ = RECIPES[name]
    written = naive.read(folder(name))
    source, _ = naive.read_tensors(model_folder(FAMILY))
    rounded = e4m3 if kind == "W8A8_MXFP8" else e2m1
    for module in written.quantized():
        stored = Stored(written.tensors, module, kind)
        w = source[f"{module}.weight"].double().numpy()
        best = np.full(stored.scale.shape, np.inf)
        weight = np.zeros_like(w)
        for exponent in candidates(name, w):
            scale = spread(np.exp2(exponent), 32, w.shape[1])
            values = rounded(w / scale) * scale
            square = np.pad((values - w) ** 2, ((0, 0), (0, -w.shape[1] % 32)))
            error = square.reshape(len(w), -1, 32).sum(2)
            weight = np.where(spread(error < best * (1 - 1e-9), 32, w.shape[1]), values, weight)
            best = np.minimum(error, best)
        assert np.array_equal(stored.weight, weight)


def test_fp8_and_dualscale_weights(naive: ModuleType, folder: Callable[[str], Path], model_folder: ModelFolder) -> None:
    source, _ = naive.read_tensors(model_folder(FAMILY))
    for name in ("fp8", "dualscale"):
        written = naive.read(folder(name))
        for module in written.quantized():
            stored = Stored(written.tensors, module, RECIPES[name][0])
            w = source[f"{module}.weight"].float()
            if name == "fp8":
                scale = w.abs().amax(1, keepdim=True) / 448
                assert torch.equal(stored.part["weight_scale"], scale)
                assert not stored.part["weight_offset"].any()
                assert np.array_equal(stored.elements, e4m3((w / scale).double().numpy()))
                continue
            outer = torch.from_numpy(maxima(w.numpy(), 32)) / 6
            assert torch.equal(stored.part["weight_dual_scale"][..., 0], outer)
            inner = (w / outer.repeat_interleave(32, 1)).double().numpy()
            exponent = np.floor(np.log2(maxima(inner, 32) / 0.875)) - 2
            assert np.array_equal(stored.scale, exponent + 127)
            assert np.array_equal(stored.elements, e2m1(inner / spread(np.exp2(exponent), 32, w.shape[1])))


def test_searches_lower_the_error(naive: ModuleType, folder: Callable[[str], Path], model_folder: ModelFolder) -> None:
    source, _ = naive.read_tensors(model_folder(FAMILY))

    def error(name: str) -> float:
        written = naive.read(folder(name))
        return sum(
            float(
                (
                    (Stored(written.tensors, m, RECIPES[name][0]).weight - source[f"{m}.weight"].double().numpy()) ** 2
                ).sum()
            )
            for m in written.quantized()
        )

    assert error("mxfp8 mse_round") < error("mxfp8")
    assert error("mxfp4 fouroversix") < error("mxfp4")
    assert error("w4a8 ceil_x search") <= error("w4a8") == error("mxfp4")


@every_recipe
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layers_compute_what_the_files_say(
    naive: ModuleType, folder: Callable[[str], Path], name: str, dtype: torch.dtype
) -> None:
    written = naive.read(folder(name))
    read = AscendV1Folder(folder(name))
    generator = torch.Generator().manual_seed(4)
    for module in written.quantized():
        stored, layer = Stored(written.tensors, module, RECIPES[name][0]), read.layer(module)
        assert layer is not None
        assert np.allclose(layer.dequantized().double().numpy(), stored.weight, rtol=1e-7, atol=0)
        x = torch.randn(11, stored.weight.shape[1], generator=generator).to(dtype)
        y = layer.simulate(x)
        exact = stored.forward(x)
        size = np.abs(stored.inputs(x)) @ np.abs(stored.weight).T
        room = size * x.shape[1] * 2**-24 + np.abs(exact) * (torch.finfo(dtype).eps / 2 + 2**-22) + 1e-7
        assert y.dtype == dtype
        assert (np.abs(y.double().numpy() - exact) <= room).all()


@pytest.mark.parametrize("name", ["fp8", "mxfp8", "w4a8", "mxfp4", "dualscale"])
def test_perplexity_is_that_of_the_naive_model(
    naive: ModuleType, folder: Callable[[str], Path], model_folder: ModelFolder, name: str, tmp_path: Path
) -> None:
    text = "A generator is a function that returns an iterator. The with statement wraps the execution of a block.\n"
    (tmp_path / "text.txt").write_text(text)
    request = EvalRequest(
        model_path=model_folder(FAMILY),
        text=tmp_path / "text.txt",
        quantized=folder(name),
        device="cpu",
        sequence_length=32,
    )
    result = LlmService().evaluate(request, SilentProgress())
    model = AutoModelForCausalLM.from_pretrained(model_folder(FAMILY), dtype=torch.bfloat16)
    written = naive.read(folder(name))
    for module in written.quantized():
        model.set_submodule(module, Deployed(Stored(written.tensors, module, RECIPES[name][0])))
    ids = AutoTokenizer.from_pretrained(TOKENIZER)(text)["input_ids"][:32]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].double()
    loss = float(functional.cross_entropy(logits, torch.tensor(ids[1:])))
    assert result.tokens == len(ids) - 1
    assert result.quantized_perplexity is not None
    assert result.quantized_perplexity == pytest.approx(math.exp(loss), rel=5e-3)


def test_the_label_of_the_engine(naive: ModuleType, model_folder: ModelFolder, tmp_path: Path) -> None:
    quantize(model_folder(FAMILY), tmp_path / "out", FP8, fp8_label="W8A8FP8_DYNAMIC")
    written = naive.read(tmp_path / "out")
    module = written.quantized()[0]
    assert written.kind(module) == "W8A8FP8_DYNAMIC"
    layer = AscendV1Folder(tmp_path / "out").layer(module)
    assert layer is not None
    assert layer.kind == "WFP8AFP8_DYNAMIC"


def test_an_outer_block_that_does_not_fit_is_refused_before_the_run(model_folder: ModelFolder, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"down_proj: ext\.dual_block_size 32 does not divide its 48 input"):
        quantize(model_folder(FAMILY), tmp_path / "out", RECIPES["dualscale"][1])
    assert not (tmp_path / "out").exists()


def test_axes_are_checked_when_the_recipe_is_read(model_folder: ModelFolder, tmp_path: Path) -> None:
    with pytest.raises(
        SchemaValidateError, match=r"spec\.process\[0\].*ext\.axes is 0, but the blocks of a linear run"
    ):
        quantize(model_folder(FAMILY), tmp_path / "out", mx("mxfp8", "mxfp8", axes=0))


@pytest.mark.parametrize("name", ["fp8", "mxfp4", "dualscale"])
def test_nan_in_a_weight_names_tensor_and_row(model_folder: ModelFolder, tmp_path: Path, name: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model_folder(FAMILY), broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][5, 7] = float("nan")
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(InvalidModelError, match=r"^model\.layers\.1\.self_attn\.k_proj\.weight: .* in row 5 "):
        quantize(broken, tmp_path / "out", RECIPES[name][1], exclude=["*.down_proj"])


@every_recipe
def test_the_verifier_finds_no_problem(folder: Callable[[str], Path], model_folder: ModelFolder, name: str) -> None:
    assert verify_folder(folder(name), model_folder(FAMILY)).problems == []
