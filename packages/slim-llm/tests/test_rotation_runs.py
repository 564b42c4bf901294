"""``quarot`` on real architectures: what is written computes the same, from files that a stranger reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from slim_core.checkpoint.reader import Checkpoint
from slim_core.errors import UnsupportedError
from slim_core.evaluation.verify import verify_folder
from slim_core.processors.linear_quant import LinearQuant
from slim_core.progress import SilentProgress
from slim_core.recipe import recipe_from_dict
from slim_core.service import EvalRequest, QuantRequest
from slim_llm.service import LlmService

ModelFolder = Callable[..., Path]
Quantize = Callable[..., Any]
EXAMPLE = Path(__file__).parents[3] / "examples" / "tiny-qwen3"
QUAROT: dict[str, Any] = {"type": "quarot"}
WEIGHT = {"dtype": "int8", "scope": "per_channel", "symmetric": True, "method": "minmax"}
DYNAMIC = {
    "type": "linear_quant",
    "qconfig": {
        "act": {"dtype": "int8", "scope": "per_token", "symmetric": True, "method": "minmax"},
        "weight": WEIGHT,
    },
}
STATIC = {
    "type": "linear_quant",
    "qconfig": {
        "act": {"dtype": "int8", "scope": "per_tensor", "symmetric": False, "method": "minmax"},
        "weight": WEIGHT,
    },
}
UNDESCRIBED = ("heads_rotation", "kronecker_rotation_m", "kronecker_rotation_n")
IDS = torch.arange(40)[None] * 61 % 3000
# Dense with and without biases, tied heads, fused projections, qk norms, mixtures with routers and shared experts, and
# low ranks. The last two have blocks of several kinds, one of them without attention heads that could be rotated.
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "phi3", "qwen3_moe", "deepseek_v3"]
MORE = ["qwen2_moe", "glm4_moe", "mixtral", "qwen3_next", "nemotron_h"]


def content(folder: Path) -> dict[str, bytes]:
    """All files but those that tell of time."""
    skipped = ("report.json", "report.html")
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in skipped)
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def reopened(naive: ModuleType, written: Path, folder: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    """The float model that was written, opened by transformers, and the tensors that it has no place for."""
    tensors = naive.read(written).tensors
    apart = {name: tensors.pop(name) for name in list(tensors) if name.endswith(UNDESCRIBED)}
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    shutil.copyfile(written / "config.json", folder / "config.json")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), apart


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def original_logits(folder: Path) -> Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


@pytest.mark.parametrize(
    ("family", "block_size"), [*((one, -1) for one in [*FAMILIES, *MORE]), *((one, 8) for one in FAMILIES)]
)
def test_the_rotated_model_computes_the_same(
    naive: ModuleType, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path, family: str, block_size: int
) -> None:
    folder = model_folder(family, torch.float32)
    quantize(folder, tmp_path / "out", process=[QUAROT | {"block_size": block_size}])
    rotated, _ = reopened(naive, tmp_path / "out", tmp_path / "again")
    assert relative(logits(rotated), original_logits(folder)) < 1e-4
    written, before = naive.read(tmp_path / "out"), naive.read_tensors(folder)[0]
    rotation = load_file(tmp_path / "out" / "optional" / "quarot.safetensors")["global_rotation"]
    description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    assert description["optional"] == {"quarot": {"rotation_map": {"global_rotation": "optional/quarot.safetensors"}}}
    assert description["metadata"] == {}
    assert rotation.dtype == torch.float32
    assert torch.allclose(rotation.double() @ rotation.double().T, torch.eye(32).double(), atol=1e-6)
    embedding = next(name for name in before if name.endswith(("embed_tokens.weight", "embeddings.weight")))
    assert torch.allclose(written.tensors[embedding], before[embedding] @ rotation, atol=1e-5)
    assert bool((written.tensors[embedding] - before[embedding]).abs().max() > 0.1)
    used = int((rotation != 0).sum(1).max())
    assert used == (32 if block_size == -1 else block_size)


def scored(model: Path, written: Path, folder: Path, **options: Any) -> Any:
    """The written files held against the model, by Slim's own evaluation."""
    text = folder / "text.txt"
    text.write_text((EXAMPLE.parent / "heldout.txt").read_text()[:1500])
    request = EvalRequest(model_path=model, quantized=written, text=text, device="cpu", **options)
    return LlmService().evaluate(request, SilentProgress())


def test_stacked_experts_with_biases(model_folder: ModelFolder, quantize: Quantize, tmp_path: Path) -> None:
    """A family that is written with other names than transformers loads; routers, experts and heads have biases."""
    folder = model_folder("gpt_oss", torch.float32)
    quantize(folder, tmp_path / "out", process=[QUAROT])
    result = scored(folder, tmp_path / "out", tmp_path, sequence_length=32)
    assert result.kl_divergence < 1e-6
    assert result.top1_agreement > 0.999


def test_a_tied_head_is_untied(
    naive: ModuleType, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    folder = model_folder("qwen2", torch.float32)
    assert "lm_head.weight" not in naive.read_tensors(folder)[0]
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    quantize(folder, tmp_path / "out", process=[QUAROT])
    tensors = naive.read(tmp_path / "out").tensors
    before = naive.read_tensors(folder)[0]
    rotation = load_file(tmp_path / "out" / "optional" / "quarot.safetensors")["global_rotation"]
    expected = before["model.embed_tokens.weight"] * before["model.norm.weight"] @ rotation
    assert torch.allclose(tensors["lm_head.weight"], expected, atol=1e-5)
    assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(tensors["model.norm.weight"], torch.ones(32))
    verification = verify_folder(tmp_path / "out", folder)
    assert verification.ok, verification.text()
    assert not [text for text in verification.warnings if "lm_head" in text]


def test_low_ranks_and_value_heads_are_rotated(
    naive: ModuleType, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    """Not only the residual stream: with multi-head latent attention there are three more spaces."""
    folder = model_folder("deepseek_v3", torch.float32)
    quantize(folder, tmp_path / "out", process=[QUAROT])
    written, before = naive.read(tmp_path / "out").tensors, naive.read_tensors(folder)[0]
    rotation = load_file(tmp_path / "out" / "optional" / "quarot.safetensors")["global_rotation"].double()
    at = "model.layers.0.self_attn."

    def turned_from_left(name: str, norm: str) -> Tensor:
        """What has happened to a weight from the left."""
        only_right = before[name].double() * before[norm].double() @ rotation
        return torch.linalg.lstsq(only_right.T, written[name].double().T).solution.T

    for name, rank in ((at + "q_a_proj.weight", 16), (at + "kv_a_proj_with_mqa.weight", 16)):
        left = turned_from_left(name, "model.layers.0.input_layernorm.weight")
        assert torch.allclose(left @ left.T, torch.eye(len(left)).double(), atol=1e-4)
        assert torch.allclose(left[:rank, :rank].abs(), torch.full((rank, rank), 0.25).double(), atol=1e-4)
        assert torch.allclose(left[rank:, rank:], torch.eye(len(left) - rank).double(), atol=1e-4)
    for norm in ("q_a_layernorm", "kv_a_layernorm"):
        assert torch.equal(written[f"{at}{norm}.weight"], torch.ones(16))
    # Heads of kv_b_proj are [key | value]: rotations keep the length of what they turn, and keys are left alone.
    keys, values = (written[at + "kv_b_proj.weight"].view(4, 16, 16)[:, part] for part in (slice(0, 8), slice(8, 16)))
    gain = before[at + "kv_a_layernorm.weight"]
    old = (before[at + "kv_b_proj.weight"] * gain).view(4, 16, 16)
    assert torch.allclose(keys.norm(dim=2), old[:, :8].norm(dim=2), rtol=1e-4)
    assert torch.allclose(values.norm(dim=(1, 2)), old[:, 8:].norm(dim=(1, 2)), rtol=1e-4)
    assert not torch.allclose(values.norm(dim=2), old[:, 8:].norm(dim=2), rtol=1e-2)


REFUSED = {
    "gemma3": "its output passes a norm",
    "olmo2": "its output passes a norm",
    "glm4": "its output passes a norm",
    "phimoe": "subtracts the mean",
    "longcat": "something besides its linears changes the hidden states",
    "llama4": "something besides .* reads its output",
}


@pytest.mark.parametrize("family", REFUSED)
def test_models_that_cannot_be_rotated_are_refused(
    model_folder: ModelFolder, quantize: Quantize, tmp_path: Path, family: str
) -> None:
    with pytest.raises(UnsupportedError, match=REFUSED[family]) as caught:
        quantize(model_folder(family, torch.float32), tmp_path / "out", process=[QUAROT, DYNAMIC])
    assert caught.value.where is not None
    assert "layers.0" in caught.value.where
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "options", "reason"),
    [
        ("GPTNeoXConfig", {}, "subtracts the mean"),
        ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}, "subtracts the mean"),
        ("OlmoConfig", {}, "with rotated weights the block would compute something else"),
    ],
)
def test_models_with_layer_norm_are_refused(
    quantize: Quantize, tmp_path: Path, config: str, options: dict[str, Any], reason: str
) -> None:
    import transformers

    settings = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, config)(**settings, **options))
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedError, match=reason):
        quantize(tmp_path / "model", tmp_path / "out", process=[QUAROT])


@pytest.mark.parametrize(
    ("family", "size", "what"),
    [
        ("llama", 64, "the 32 channels of the hidden states"),
        ("llama", 16, "the 8 channels of a head of model.layers.0.self_attn.v_proj"),
        ("deepseek_v3", 16, "the 8 channels of a head of model.layers.0.self_attn.kv_b_proj"),
    ],
)
def test_a_block_size_that_does_not_divide(
    model_folder: ModelFolder, quantize: Quantize, tmp_path: Path, family: str, size: int, what: str
) -> None:
    with pytest.raises(UnsupportedError, match=f"block_size {size} does not divide {what}") as caught:
        quantize(model_folder(family, torch.float32), tmp_path / "out", process=[QUAROT | {"block_size": size}])
    assert caught.value.where == "spec.process[0]"


def test_unknown_tensors_that_may_belong_to_the_stream_are_refused(
    model_folder: ModelFolder, quantize: Quantize, naive: ModuleType, tmp_path: Path
) -> None:
    shutil.copytree(model_folder("llama", torch.float32), tmp_path / "model")
    tensors, _ = naive.read_tensors(tmp_path / "model")
    for name, shape, refused in (("rotary.table", (7, 9), False), ("visual.merger.weight", (32, 20), True)):
        more = tensors | {name: torch.zeros(shape)}
        save_file(more, tmp_path / "model" / "model.safetensors", {"format": "pt"})
        if refused:
            with pytest.raises(UnsupportedError, match=r"visual\.merger\.weight: the model class does not use"):
                quantize(tmp_path / "model", tmp_path / "out", process=[QUAROT], overwrite=True)
        else:
            quantize(tmp_path / "model", tmp_path / "out", process=[QUAROT])
            assert torch.equal(naive.read(tmp_path / "out").tensors[name], torch.zeros(shape))


def test_without_the_extra_information(model_folder: ModelFolder, quantize: Quantize, tmp_path: Path) -> None:
    quantize(model_folder("llama"), tmp_path / "out", process=[QUAROT | {"export_extra_info": False}, DYNAMIC])
    assert not (tmp_path / "out" / "optional").exists()
    assert json.loads((tmp_path / "out" / "quant_model_description.json").read_text())["optional"] == {}


def test_outliers_are_gone(naive: ModuleType, quantize: Quantize, tmp_path: Path) -> None:
    """The shipped model has outlier channels. Its largest hidden values, in units of their token, shrink."""
    quantize(EXAMPLE, tmp_path / "out", process=[QUAROT])
    rotated, _ = reopened(naive, tmp_path / "out", tmp_path / "again")
    original = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32).eval()

    def tails(model: nn.Module) -> Tensor:
        with torch.no_grad():
            states = model(input_ids=IDS, use_cache=False, output_hidden_states=True).hidden_states[1:-1]
        return torch.stack(
            [torch.quantile((x / x.square().mean(-1, keepdim=True).sqrt()).abs(), 0.9999) for x in states]
        )

    assert bool((tails(rotated) < 0.65 * tails(original)).all())


@pytest.mark.parametrize("rule", [DYNAMIC, STATIC])
def test_quantization_gains(quantize: Quantize, tmp_path: Path, rule: dict[str, Any]) -> None:
    losses: list[float] = []
    for name, process in (("plain", [rule]), ("rotated", [QUAROT, rule])):
        quantize(EXAMPLE, tmp_path / name, process=process)
        losses.append(scored(EXAMPLE, tmp_path / name, tmp_path).kl_divergence)
    assert losses[1] < 0.2 * losses[0]


def test_rotation_then_smoothing_then_quantization(
    naive: ModuleType, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    """The whole chain: exact in float, one forward of each block for every sample once it is quantized."""
    folder = model_folder("qwen2", torch.float32)
    smooth = {"type": "iter_smooth", "alpha": 0.5}
    quantize(folder, tmp_path / "float", process=[QUAROT, smooth])
    smoothed, _ = reopened(naive, tmp_path / "float", tmp_path / "again")
    assert relative(logits(smoothed), original_logits(folder)) < 1e-4
    norm = naive.read(tmp_path / "float").tensors["model.layers.0.input_layernorm.weight"]
    assert not torch.allclose(norm, torch.ones(32), atol=0.01)
    result = quantize(folder, tmp_path / "out", process=[QUAROT, smooth, STATIC])
    assert result.block_forwards == 3 * 5
    assert verify_folder(tmp_path / "out", folder).ok
    seen = naive.read(tmp_path / "out")
    for module in seen.quantized():  # what was calibrated is what the smoothed and rotated model shows
        assert seen.kind(module) == "W8A8"
    names = [name for name in seen.quantized() if ".layers.1." in name]
    tokens = [[int(i) for i in row] for row in IDS]
    low, high = naive.ranges(smoothed, names, tokens)[names[0]]
    scale = float(seen.tensors[f"{names[0]}.input_scale"])
    assert 0.2 < (high - low) / (255 * scale) < 5


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
    naive: ModuleType, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path, family: str
) -> None:
    folder = model_folder(family, torch.float32)
    result = quantize(folder, tmp_path / "out", process=[ONLINE])
    assert any("no engine that is known here" in warning for warning in result.warnings)
    rotated, beside = reopened(naive, tmp_path / "out", tmp_path / "again")
    exact = original_logits(folder)
    assert relative(logits(rotated), exact) > 1e-2  # without the rotations at run time it is another model
    with_rotated_inputs(rotated, beside)
    assert relative(logits(rotated), exact) < 1e-4
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
    folder, text = model_folder("llama", dtype), (EXAMPLE.parent / "heldout.txt").read_text()[:1500]
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": text}) + "\n")
    smoothing = [{"type": "iter_smooth"}] * smoothed
    quantize(
        folder,
        tmp_path / "out",
        process=[ONLINE, *smoothing, {"static": STATIC, "dynamic": DYNAMIC}[rule]],
        propagate="quantized",
        dataset={"path": str(tmp_path / "one.jsonl"), "max_length": 32},
    )
    simulated = dict(last)
    scored(folder, tmp_path / "out", tmp_path, sequence_length=32, max_windows=1)
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
        model, beside = reopened(naive, tmp_path / "float", tmp_path / f"again{turned}")
        naive.deploy(model, naive.read(tmp_path / "out"))
        if turned:
            with_rotated_inputs(model, beside)
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        seen.append(last[2])
    assert relative(seen[0], simulated[2]) < 0.02
    assert relative(seen[1], simulated[2]) > 0.2


@pytest.mark.parametrize("propagate", ["float", "quantized"])
def test_run_time_rotations_are_calibrated_and_scored(
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
    quantize(folder, tmp_path / "out", process=[ONLINE, STATIC], propagate=propagate)
    written = naive.read(tmp_path / "out")
    model, beside = reopened(naive, tmp_path / "float", tmp_path / "again")
    model.to(torch.bfloat16)
    with_rotated_inputs(model, {name: tensor.bfloat16() for name, tensor in beside.items()})
    names = ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"]
    for name, (low, high) in naive.ranges(model, names, token_ids).items():
        scale, offset = naive.input_parameters(low, high, False, torch.bfloat16)
        assert float(written.tensors[f"{name}.input_scale"]) == pytest.approx(float(scale), rel=0.02)
        assert abs(float(written.tensors[f"{name}.input_offset"]) - float(offset)) <= 3
    assert scored(folder, tmp_path / "out", tmp_path, sequence_length=32).kl_divergence < 0.5
    for part in UNDESCRIBED:  # a reader who does not know of the rotations has another model
        assert any(name.endswith(part) for name in written.tensors)


def test_ranks_that_could_not_rotate_their_share(model_folder: ModelFolder, quantize: Quantize, tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedError, match=r"with 2 ranks there are 2 heads per rank, which is no multiple .* block of 4"
    ) as caught:
        quantize(model_folder("llama"), tmp_path / "out", process=[ONLINE | {"max_tp_size": 4}])
    assert caught.value.where == "spec.process[0].max_tp_size"


def test_layers_of_online_rotation(model_folder: ModelFolder, quantize: Quantize, tmp_path: Path) -> None:
    rotate = ONLINE | {"down_proj_online_layers": [-1, 1, 7]}
    result = quantize(model_folder("llama"), tmp_path / "out", process=[rotate])
    assert any("the model has no layers -1, 7" in warning for warning in result.warnings)
    with pytest.raises(UnsupportedError, match=r"model\.layers\.0: it has 4 down projections"):
        quantize(model_folder("qwen3_moe"), tmp_path / "moe", process=[ONLINE | {"down_proj_online_layers": [0]}])
    idle = QUAROT | {"max_tp_size": 2, "down_proj_online_layers": [0]}
    warnings = quantize(model_folder("llama"), tmp_path / "idle", process=[idle]).warnings
    assert sum("has no effect without online: true" in warning for warning in warnings) == 2


def test_always_the_same_and_nobody_elses_random_numbers(
    model_folder: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    state = torch.get_rng_state()
    for name in ("a", "b"):
        quantize(model_folder("qwen3_moe"), tmp_path / name, process=[QUAROT, DYNAMIC])
        torch.rand(1)
        state_now = torch.get_rng_state()
    torch.set_rng_state(state)
    torch.rand(1)
    torch.rand(1)
    assert torch.equal(torch.get_rng_state(), state_now)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_without_data_there_is_no_forward_but_the_proof_and_weights_are_read_once(
    naive: ModuleType, model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    folder = model_folder("llama")
    rows: dict[str, list[int]] = {}
    forwards: list[str] = []
    read, forward = Checkpoint.rows, LlamaDecoderLayer.forward

    def counted(self: Checkpoint, name: str, start: int, stop: int) -> Tensor:
        rows.setdefault(name, []).extend(range(start, min(stop, self.meta(name).shape[0])))
        return read(self, name, start, stop)

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("must not be called")

    monkeypatch.setattr(Checkpoint, "rows", counted)
    monkeypatch.setattr(
        LlamaDecoderLayer, "forward", lambda self, *a, **k: (forwards.append(""), forward(self, *a, **k))[1]
    )
    monkeypatch.setattr("slim_llm.quantize.open_tokenizer", refused)

    def planned(_plan: Any) -> None:
        assert 0 < len(forwards) < 60  # a few of one block, the three being alike
        forwards.clear()
        rows.clear()

    LlmService().quantize(
        QuantRequest(model_path=folder, save_path=tmp_path / "out", model_type="tiny", device="cpu"),
        recipe_from_dict(
            {"apiversion": "modelslim_v1", "spec": {"process": [QUAROT, DYNAMIC], "dataset": "none.jsonl"}}
        ),
        SilentProgress(),
        planned,
    )
    assert forwards == []
    written = naive.read(tmp_path / "out")
    linears = [f"{module}.weight" for module in written.quantized()]
    assert set(linears) <= set(rows)
    for name in linears:
        assert sorted(rows[name]) == list(range(len(written.tensors[name])))


@pytest.mark.parametrize("rule", [DYNAMIC, STATIC])
def test_a_run_that_was_killed_is_resumed(
    model_folder: ModelFolder, quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: dict[str, Any]
) -> None:
    model, process = model_folder("qwen2"), [QUAROT, rule]
    quantize(model, tmp_path / "whole", process=process)
    work = LinearQuant.process

    def failing(self: LinearQuant, bench: Any) -> None:
        work(self, bench)
        if bench.name == "model.layers.1":
            raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(LinearQuant, "process", failing)
        with pytest.raises(RuntimeError, match="killed"):
            quantize(model, tmp_path / "out", process=process)
    assert quantize(model, tmp_path / "out", process=process, resume=True).resumed_units >= 1
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_the_plan_says_what_is_rotated(model_folder: ModelFolder, dataset: Path, tmp_path: Path) -> None:
    from slim_core.runners.plan_text import render_summary

    request = QuantRequest(
        model_path=model_folder("deepseek_v3"), save_path=tmp_path / "out", model_type="tiny", device="cpu"
    )
    spec = {"process": [QUAROT, DYNAMIC], "dataset": str(dataset)}
    plan = LlmService().plan(request, recipe_from_dict({"apiversion": "modelslim_v1", "spec": spec}))
    text = render_summary(plan)
    assert "quarot: hidden states of 32 channels rotated, 3 value paths, 6 low ranks" in text
    assert "no calibration data needed" in text


class Drafting(nn.Module):
    """A drafting layer as its family computes it, around a decoder layer of the library."""

    def __init__(self, model: nn.Module, tensors: dict[str, Tensor], prefix: str) -> None:
        super().__init__()
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        self.own = own
        self.block = model.model.layers[-1]  # pyright: ignore
        names = {f"model.layers.2.{name}": tensor for name, tensor in own.items()}
        self.names = names

    @staticmethod
    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight

    def joined(self, ids: Tensor, state: Tensor) -> Tensor:
        embedded = self.norm(self.own["embed_tokens.weight"][ids], self.own["enorm.weight"])
        both = torch.cat([embedded, self.norm(state, self.own["hnorm.weight"])], -1)
        return both @ self.own["eh_proj.weight"].T

    def logits(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden, self.own["shared_head.norm.weight"]) @ self.own["shared_head.head.weight"].T


def test_a_drafting_layer_is_rotated_with_its_model(
    naive: ModuleType, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    """Multi-token prediction: a further layer with its own embedding, head and the join of two states."""
    shutil.copytree(model_folder("deepseek_v3", torch.float32), tmp_path / "model")
    tensors, _ = naive.read_tensors(tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    draft = {
        name.replace(".layers.2.", ".layers.3."): tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in tensors.items()
        if ".layers.2." in name
    }
    own = {"embed_tokens": (3072, 32), "eh_proj": (32, 64), "shared_head.head": (3072, 32)}
    draft |= {
        f"model.layers.3.{name}.weight": 0.2 * torch.randn(shape, generator=generator) for name, shape in own.items()
    }
    draft |= {
        f"model.layers.3.{name}.weight": 1 + 0.3 * torch.randn(32, generator=generator)
        for name in ("enorm", "hnorm", "shared_head.norm")
    }
    save_file(tensors | draft, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    result = quantize(tmp_path / "model", tmp_path / "out", process=[QUAROT])
    assert any("model.layers.3, a drafting layer, is rotated by its names" in warning for warning in result.warnings)
    written = naive.read(tmp_path / "out")
    turned = written.tensors
    rotation = load_file(tmp_path / "out" / "optional" / "quarot.safetensors")["global_rotation"]
    state, ids = torch.randn(1, 12, 32, generator=generator), torch.arange(12)[None]
    normed = Drafting.norm(state, torch.ones(32))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    before, after = (Drafting(model, held, "model.layers.3.") for held in (tensors | draft, turned))
    exact = before.joined(ids, normed * tensors["model.norm.weight"])
    found = after.joined(ids, normed @ rotation @ turned["rot.weight"])
    assert relative(found, exact @ rotation) < 1e-4
    assert relative(after.logits(exact @ rotation), before.logits(exact)) < 1e-4
    # The block of the layer, run in the place of the last one of the model.
    outputs: list[Tensor] = []
    for held, hidden in ((tensors | draft, exact), (turned, found)):
        swapped = {n.replace(".layers.3.", ".layers.2."): t for n, t in held.items() if ".layers.3." in n}
        folder = tmp_path / f"swapped{len(outputs)}"
        shutil.copytree(tmp_path / "model", folder)
        places = {n: t for n, t in swapped.items() if n in tensors}
        save_file(tensors | places, folder / "model.safetensors", {"format": "pt"})
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            positions = whole.model.rotary_emb(hidden, torch.arange(12)[None])
            outputs.append(whole.model.layers[2](hidden, position_embeddings=positions, attention_mask=None))
    assert relative(outputs[1], outputs[0] @ rotation) < 1e-4
    assert written.description["is_rot_used"] is True
    assert written.place["rot.weight"] == "rot.safetensors"
    index = json.loads((tmp_path / "out" / "quant_model_weights.safetensors.index.json").read_text())
    assert index["weight_map"]["rot.weight"] == "rot.safetensors"
    verification = verify_folder(tmp_path / "out", tmp_path / "model")
    assert verification.ok, verification.text()


def test_a_drafting_layer_that_is_not_understood_is_refused(
    naive: ModuleType, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    shutil.copytree(model_folder("llama", torch.float32), tmp_path / "model")
    tensors, _ = naive.read_tensors(tmp_path / "model")
    more = {name.replace(".layers.2.", ".layers.3."): t.clone() for name, t in tensors.items() if ".layers.2." in name}
    save_file(tensors | more, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedError, match=r"model\.layers\.3\..*does not use this tensor"):
        quantize(tmp_path / "model", tmp_path / "out", process=[QUAROT])
