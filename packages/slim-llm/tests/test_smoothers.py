"""Smoothing of real architectures: the written model computes what the original does, in one forward of each block."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from slim_core.errors import UnsupportedError
from slim_core.evaluation.verify import verify_folder
from slim_core.model.subgraphs import is_norm
from slim_core.progress import SilentProgress
from slim_core.service import EvalRequest
from slim_llm.service import LlmService

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3", "glm4", "phi3", "olmo2", "qwen3_moe", "deepseek_v3")
BLOCKS, SAMPLES = 3, 5
ITER: dict[str, Any] = {"type": "iter_smooth", "alpha": 0.8}
SHIFT = ITER | {"symmetric": False}
SMOOTH: dict[str, Any] = {"type": "smooth_quant"}
KEYS: dict[str, Any] = {"type": "kv_smooth"}
WEIGHT = {"dtype": "int8", "scope": "per_channel", "symmetric": True, "method": "minmax"}


def linear_quant(**act: Any) -> dict[str, Any]:
    act = {"dtype": "int8", "scope": "per_tensor", "symmetric": False, "method": "minmax"} | act
    return {"type": "linear_quant", "qconfig": {"act": act, "weight": WEIGHT}}


ModelFolder = Callable[..., Path]
Quantize = Callable[..., Any]


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all the rest."""
    monkeypatch.setattr("slim_core.evaluation.report.draw_plots", lambda _data: {})


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def as_model(written: Path) -> Path:
    """A copy of a folder that holds a float model, under the names that transformers looks for."""
    folder = written.with_name(f"{written.name}-model")
    if not folder.exists():
        folder.mkdir()
        for file in written.iterdir():
            if file.suffix in (".json", ".safetensors") and "description" not in file.name:
                name = file.name.replace("quant_model_weights", "model")
                content = file.read_bytes()
                if name.endswith("index.json"):
                    content = content.replace(b"quant_model_weights", b"model")
                (folder / name).write_bytes(content)
    return folder


def loaded(model: Path) -> Any:
    """The model of a folder in float32; biases that its classes do not have are added to the outputs of norms, and
    given to linears."""
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    known = dict(net.named_parameters())
    for name, bias in tensors_of(model).items():
        path = name.removesuffix(".bias")
        if path == name or name in known or not (module := submodule(net, path)):
            continue
        if isinstance(module, nn.Linear):
            module.bias = nn.Parameter(bias)
        else:
            assert is_norm(module)
            module.register_forward_hook(lambda _m, _a, output, bias=bias: output + bias)
    return net


def submodule(net: nn.Module, path: str) -> nn.Module | None:
    return dict(net.named_modules()).get(path)


def logits(net: Any, ids: list[list[int]]) -> list[Tensor]:
    with torch.no_grad():
        return [net(input_ids=torch.tensor([each]), use_cache=False).logits for each in ids]


def far(want: list[Tensor], got: list[Tensor]) -> float:
    """The largest difference, relative to the largest value."""
    return max(float((b - a).abs().max() / a.abs().max()) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("process", [ITER, SHIFT], ids=["symmetric", "shifted"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_smoothed_model_computes_the_same(
    model_folder: ModelFolder,
    quantize: Quantize,
    token_ids: list[list[int]],
    tmp_path: Path,
    family: str,
    process: dict[str, Any],
) -> None:
    model = model_folder(family, torch.float32)
    result = quantize(model, tmp_path / "out", process=[process])
    assert result.block_forwards == BLOCKS * SAMPLES
    assert not result.linears
    before, after = tensors_of(model), tensors_of(tmp_path / "out")
    changed = {name for name in before if name in after and not torch.equal(before[name], after[name])}
    assert len(changed) >= 2 * BLOCKS
    added = {name for name in after if name.endswith("norm.bias") and name not in before}
    # The norms of OLMo 2 stand behind the linears, and there is nothing to shift.
    assert bool(added) == ("symmetric" in process and family != "olmo2")
    want, got = (logits(loaded(folder), token_ids) for folder in (model, as_model(tmp_path / "out")))
    assert far(want, got) <= 1e-4
    report = verify_folder(tmp_path / "out", model)
    assert not report.problems


def two_runs(
    quantize: Quantize, model: Path, folder: Path, smoother: dict[str, Any], rule: dict[str, Any], **options: Any
) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """What one run writes that smooths and quantizes, and what two runs write that do so one after the other."""
    result = quantize(model, folder / "one", process=[smoother, rule], **options)
    quantize(model, folder / "smooth", process=[smoother])
    quantize(as_model(folder / "smooth"), folder / "two", process=[rule], **options)
    return result, tensors_of(folder / "one"), tensors_of(folder / "two")


def check_alike(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    """Equal but for the rounding of float32, which now and then moves a code to its neighbour."""
    assert one.keys() == two.keys()
    for name, value in one.items():
        if value.dtype == torch.int8:
            off = (value.int() - two[name].int()).abs()
            assert int(off.max()) <= 1
            assert float(off.float().mean()) < 0.01
        elif name.endswith(("input_scale", "weight_scale", "kv_cache_scale", ".scale")):
            assert torch.allclose(value, two[name], rtol=2e-5), name
        elif name.endswith("offset"):
            assert float((value - two[name]).abs().max()) <= 1


@pytest.mark.parametrize("family", ["qwen2", "glm4"])
@pytest.mark.parametrize(
    ("rule", "forwards"),
    [
        (linear_quant(), 1),
        (linear_quant(symmetric=True), 1),
        (linear_quant(method="histogram"), 2),
        (linear_quant(ext={"aggregation_type": "mean"}), 2),
    ],
    ids=["minmax", "symmetric", "histogram", "mean"],
)
def test_static_scales_are_those_of_the_smoothed_model(
    model_folder: ModelFolder, quantize: Quantize, tmp_path: Path, family: str, rule: dict[str, Any], forwards: int
) -> None:
    result, one, two = two_runs(quantize, model_folder(family, torch.float32), tmp_path, ITER, rule)
    assert result.block_forwards == forwards * BLOCKS * SAMPLES
    check_alike(one, two)
    assert sum(name.endswith("input_scale") for name in one) >= 4 * BLOCKS


@pytest.mark.parametrize("method", ["minmax", "histogram"])
def test_static_scales_behind_a_shift_are_those_of_the_shifted_model(
    model_folder: ModelFolder,
    quantize: Quantize,
    token_ids: list[list[int]],
    naive: ModuleType,
    tmp_path: Path,
    method: str,
) -> None:
    """With a histogram the block runs again once it is shifted, with biases that the classes of norms do not have."""
    model = model_folder("llama", torch.float32)
    result = quantize(model, tmp_path / "one", process=[SHIFT, linear_quant(method=method)])
    assert result.block_forwards == (1 if method == "minmax" else 2) * BLOCKS * SAMPLES
    quantize(model, tmp_path / "smooth", process=[SHIFT])
    net = loaded(as_model(tmp_path / "smooth"))
    low: dict[str, float] = {}
    high: dict[str, float] = {}

    def see(name: str, x: Tensor) -> None:
        low[name] = min(low.get(name, 0.0), float(x.min()))
        high[name] = max(high.get(name, 0.0), float(x.max()))

    for name, module in net.named_modules():
        if isinstance(module, nn.Linear) and "layers" in name:
            module.register_forward_pre_hook(lambda _m, args, name=name: see(name, args[0]))
    logits(net, token_ids)
    written = tensors_of(tmp_path / "one")
    for name in low:
        scale = float(written[f"{name}.input_scale"])
        whole = (high[name] - low[name]) / 255
        if method == "minmax":
            assert scale == pytest.approx(whole, rel=2e-5)
        else:  # it may cut off, but not much of these few tokens
            assert 0.5 * whole < scale <= 1.001 * whole


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "deepseek_v3"])
def test_shifted_models_are_scored_with_their_biases(
    model_folder: ModelFolder, quantize: Quantize, tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float or in eight bits the model is nearly the original; in eight bits it is not without the biases of norms.

    (Without any of the biases the float model would be the original again: those of norms and linears cancel.)
    """
    model, text = model_folder(family, torch.bfloat16), tmp_path / "text.txt"
    text.write_text("A generator is a function that returns an iterator. " * 4)
    asked = EvalRequest(model_path=model, text=text, device="cpu", sequence_length=24, max_windows=2)

    def score(name: str) -> float:
        given = asked.model_copy(update={"quantized": tmp_path / name})
        return float(LlmService().evaluate(given, SilentProgress()).kl_divergence or 0)

    quantize(model, tmp_path / "float", process=[SHIFT])
    quantize(model, tmp_path / "eight", process=[SHIFT, linear_quant()])
    quantize(model, tmp_path / "quantized", process=[SHIFT, linear_quant()], propagate="quantized")
    assert score("float") < 0.005
    assert score("eight") < 0.1
    assert score("quantized") < 0.1
    for name, dropped in (("float", True), ("eight", False)):
        report = verify_folder(tmp_path / name, model)
        assert not report.problems
        assert any("drops it" in warning for warning in report.warnings) == dropped
    monkeypatch.setattr("slim_llm.quantize.take_stored_biases", lambda *_: None)
    assert score("eight") > 0.3
    biases = {name: value for name, value in tensors_of(tmp_path / "float").items() if name.endswith("norm.bias")}
    assert biases
    assert all(bool(value.any()) for value in biases.values())


def keys_of(net: Any, ids: list[list[int]]) -> dict[int, Tensor]:
    """The keys of all samples as they enter the cache, by layer, ``(kv_heads, tokens, dim)``."""
    found: dict[int, list[Tensor]] = {}
    for each in ids:
        cache = DynamicCache(config=net.config)
        with torch.no_grad():
            net(input_ids=torch.tensor([each]), past_key_values=cache, use_cache=True)
        for number, layer in enumerate(cache.layers):
            found.setdefault(number, []).append(layer.keys[0])  # pyright: ignore
    return {number: torch.cat(parts, 1) for number, parts in found.items()}


HALF, INTERLEAVED_HALF = [0, 1, 2, 3] * 2, [0, 0, 1, 1, 2, 3, 4, 5]
PARTIAL = [0, 1, 0, 1, 2, 3, 4, 5]
PAIRS = {
    "llama": (HALF, False),
    "qwen2": (HALF, False),
    "qwen3": (HALF, True),
    "gemma3": (HALF, True),
    "phi3": (HALF, False),
    "glm4": (INTERLEAVED_HALF, False),
    "glm4_moe": (PARTIAL, False),
    "minimax_m2": (PARTIAL, False),
    "olmo2": (HALF, False),
    "qwen3_moe": (HALF, True),
}


@pytest.mark.parametrize("family", PAIRS)
def test_smoothed_keys_reach_equally_far_and_the_model_computes_the_same(
    model_folder: ModelFolder,
    quantize: Quantize,
    dataset: Path,
    token_ids: list[list[int]],
    tmp_path: Path,
    family: str,
) -> None:
    model = model_folder(family, torch.float32)
    quantize(model, tmp_path / "out", process=[KEYS], dataset={"path": str(dataset), "max_length": 8})
    smooth = loaded(as_model(tmp_path / "out"))
    assert far(logits(loaded(model), token_ids), logits(smooth, token_ids)) <= 1e-4
    pairing, shared = PAIRS[family]
    short = [ids[:8] for ids in token_ids]  # what was calibrated, within every sliding window
    for keys in keys_of(smooth, short).values():
        absmax = keys.abs().amax(1)
        members = [[c for c, one in enumerate(pairing) if one == pair] for pair in range(max(pairing) + 1)]
        largest = torch.stack([absmax[:, channels].amax(1) for channels in members], 1)
        for reach in [largest.amax(0)] if shared else largest:
            assert torch.allclose(reach, reach[0].expand_as(reach), rtol=1e-4)
    assert not verify_folder(tmp_path / "out", model).problems


def test_attentions_of_a_fused_and_partly_rotated_model(
    quantize: Quantize, token_ids: list[list[int]], tmp_path: Path, model_folder: ModelFolder
) -> None:
    """GPT-NeoX: query, key and value of a head side by side in one matrix, a quarter of the head rotated."""
    folder = tmp_path / "model"
    settings = {"vocab_size": 3072, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.GPTNeoXConfig(**settings, num_attention_heads=4, max_position_embeddings=64)
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(float(parameter.dim() == 1), 0.2)
    net.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model_folder("llama", torch.float32) / name).read_bytes())
    result = quantize(folder, tmp_path / "out", process=[KEYS])
    assert result.block_forwards == 2 * SAMPLES
    smooth = loaded(as_model(tmp_path / "out"))
    assert far(logits(loaded(folder), token_ids), logits(smooth, token_ids)) <= 1e-4
    for number, keys in keys_of(smooth, token_ids).items():
        absmax = keys.abs().amax(1)
        absmax[:, :2] = absmax[:, :2].amax(1, keepdim=True)  # the one pair that is rotated
        assert torch.allclose(absmax, absmax[:, :1].expand_as(absmax), rtol=1e-4), number


@pytest.mark.parametrize(
    ("rule", "forwards"),
    [
        ({"type": "dynamic_cache"}, 1),
        ({"type": "dynamic_cache", "qconfig": {"method": "histogram", "ext": {"percentile": 99.5}}}, 1),
        ({"type": "fa3_quant"}, 2),
    ],
    ids=["cache", "clipped cache", "kernel"],
)
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "glm4"])
def test_scales_of_attentions_are_those_of_the_smoothed_model(
    model_folder: ModelFolder, quantize: Quantize, tmp_path: Path, family: str, rule: dict[str, Any], forwards: int
) -> None:
    result, one, two = two_runs(quantize, model_folder(family, torch.float32), tmp_path, KEYS, rule)
    assert result.block_forwards == forwards * BLOCKS * SAMPLES
    check_alike(one, two)
    assert sum("scale" in name for name in one) >= 2 * BLOCKS


def test_latent_attention_has_no_keys_to_smooth(model_folder: ModelFolder, quantize: Quantize, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError) as caught:
        quantize(model_folder("deepseek_v3", torch.float32), tmp_path / "out", process=[KEYS])
    assert caught.value.where == "spec.process[0]"
    assert "model.layers.0.self_attn: it caches a compressed latent that has no keys to scale" in caught.value.what
    assert caught.value.remedy == "leave this processor out"


def test_which_attentions_are_smoothed(model_folder: ModelFolder, quantize: Quantize, tmp_path: Path) -> None:
    model = model_folder("qwen2", torch.float32)
    before = tensors_of(model)
    for name, fields, layers, told in (
        ("one", {"include": ["*.1.self_attn"]}, {1}, []),
        ("but", {"exclude": ["model.layers.1.*", "*.k_proj"]}, {0, 2}, ["exclude: pattern '*.k_proj' matches no"]),
        ("none", {"include": []}, set[int](), ["spec.process[0] smooths nothing"]),
    ):
        result = quantize(model, tmp_path / name, process=[KEYS | fields])
        after = tensors_of(tmp_path / name)
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        parts = [f"{side}_proj.{part}" for side in "qk" for part in ("weight", "bias")]
        assert changed == {f"model.layers.{layer}.self_attn.{part}" for layer in layers for part in parts}
        found = [text for text in result.warnings if "spec.process[0]" in text]
        assert len(found) == len(told)
        assert all(part in text for part, text in zip(told, found, strict=True))
        assert result.block_forwards == (BLOCKS * SAMPLES if layers else 0)
        assert [(note.source, note.targets, note.type) for note in result.smoothed] == [
            (f"model.layers.{layer}.self_attn.k_proj", (f"model.layers.{layer}.self_attn.q_proj",), "query-key")
            for layer in sorted(layers)
        ]
        assert all(note.tokens and note.scale_min < 1 < note.scale_max for note in result.smoothed)
        assert all(note.act_spread_after < note.act_spread_before for note in result.smoothed)


def test_everything_together_computes_the_same(
    model_folder: ModelFolder, quantize: Quantize, token_ids: list[list[int]], tmp_path: Path
) -> None:
    model = model_folder("qwen2", torch.float32)
    group = {"type": "group", "configs": [KEYS | {"smooth_factor": 0.5}, SMOOTH | {"symmetric": False}]}
    result = quantize(model, tmp_path / "out", process=[SHIFT, group, KEYS])
    assert result.block_forwards == BLOCKS * SAMPLES
    smooth = loaded(as_model(tmp_path / "out"))
    assert far(logits(loaded(model), token_ids), logits(smooth, token_ids)) <= 1e-4


def test_static_scales_of_a_latent_follow_its_norm(
    model_folder: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    """The latent is what the norm in front of kv_b_proj makes: scaled with it, and never shifted."""
    model = model_folder("deepseek_v3", torch.float32)
    rule = {"type": "fa3_quant"}
    result, one, two = two_runs(quantize, model, tmp_path, ITER, rule)
    assert result.block_forwards == 2 * BLOCKS * SAMPLES
    check_alike(one, two)
    result = quantize(model, tmp_path / "shifted", process=[SHIFT])
    assert not [
        name for name in tensors_of(tmp_path / "shifted") if "kv_b_proj.bias" in name or "kv_a_layernorm.b" in name
    ]
    assert [text for text in result.warnings if "no place for a bias, e.g. model.layers.0.self_attn.kv_b_proj" in text]


@pytest.fixture(scope="module")
def with_outliers(model_folder: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that computes what the plain one does, with large channels: behind every norm, and in one head's keys."""
    plain, folder = model_folder("llama", torch.float32), tmp_path_factory.mktemp("outliers")
    for file in plain.iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    state = tensors_of(plain)
    for layer in range(BLOCKS):
        block = f"model.layers.{layer}"
        for norm, readers in (
            ("input_layernorm", [f"self_attn.{name}_proj" for name in "qkv"]),
            ("post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"]),
        ):
            state[f"{block}.{norm}.weight"][5] *= 100
            for reader in readers:
                state[f"{block}.{reader}.weight"][:, 5] /= 100
        for channel in (1, 5):  # a pair of the first key head, which the first two query heads look at
            state[f"{block}.self_attn.k_proj.weight"][channel] *= 100
            for head in (0, 1):
                state[f"{block}.self_attn.q_proj.weight"][8 * head + channel] /= 100
    save_file(state, folder / "model.safetensors")
    return folder


def divergence(model: Path, written: Path, text: Path) -> float:
    text.write_text("The with statement wraps the execution of a block with methods. " * 6)
    asked = EvalRequest(model_path=model, quantized=written, text=text, device="cpu", sequence_length=24, max_windows=3)
    return float(LlmService().evaluate(asked, SilentProgress()).kl_divergence or 0)


@pytest.mark.parametrize("smoother", [ITER, SHIFT, SMOOTH], ids=str)
def test_smoothing_wins_back_what_outliers_cost(
    with_outliers: Path, quantize: Quantize, tmp_path: Path, smoother: dict[str, Any]
) -> None:
    rule = linear_quant() | {"exclude": ["*down_proj", "*o_proj"]}
    lost: list[float] = []
    for name, process in (("plain", [rule]), ("smoothed", [smoother, rule])):
        quantize(with_outliers, tmp_path / name, process=process)
        lost.append(divergence(with_outliers, tmp_path / name, tmp_path / "text.txt"))
    assert lost[1] < lost[0] / 5


@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_smoothed_keys_win_back_what_outliers_cost(
    with_outliers: Path, quantize: Quantize, tmp_path: Path, factor: float
) -> None:
    """With one scale for a head; a cache with a scale for every channel does not mind outliers."""
    rule = {"type": "fa3_quant", "details": {"fa_k": {"dtype": "int8", "scope": "per_head"}}}
    lost: list[float] = []
    for name, process in (("plain", [rule]), ("smoothed", [KEYS | {"smooth_factor": factor}, rule])):
        quantize(with_outliers, tmp_path / name, process=process)
        lost.append(divergence(with_outliers, tmp_path / name, tmp_path / "text.txt"))
    assert lost[1] < lost[0] / 5
