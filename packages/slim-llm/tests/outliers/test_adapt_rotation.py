"""``adapt_rotation`` from end to end: a stage ahead that learns, and the main stage that rotates by what it learned."""

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
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from slim_core.errors import InvalidDatasetError, UnsupportedError
from slim_core.evaluation.verify import verify_folder
from slim_core.processors.adapt_rotation import AdaptRotation
from slim_core.processors.linear_quant import LinearQuant
from slim_core.progress import SilentProgress
from slim_core.recipe import recipe_from_dict
from slim_core.rotation.matrices import Hadamard
from slim_core.rotation.procrustes import fake_quantize
from slim_core.runners.plan_text import render_summary
from slim_core.service import QuantRequest
from slim_llm.service import LlmService

ModelFolder = Callable[..., Path]
Quantize = Callable[..., Any]
Stranger = Any  # of conftest.py
EXAMPLE = Path(__file__).parents[4] / "examples" / "tiny-qwen3"
FIRST: dict[str, Any] = {"type": "adapt_rotation", "stage": 1, "steps": 6}
SECOND: dict[str, Any] = {"type": "adapt_rotation", "stage": 2}
DYNAMIC = {
    "type": "linear_quant",
    "qconfig": {
        "act": {"dtype": "int4", "scope": "per_token", "symmetric": True, "method": "minmax"},
        "weight": {"dtype": "int4", "scope": "per_channel", "symmetric": True, "method": "minmax"},
    },
}


def prior(stage: dict[str, Any] | None = None, **options: Any) -> list[dict[str, Any]]:
    return [{"process": [stage or FIRST], **options}]


def exported(folder: Path) -> Tensor:
    return load_file(folder / "optional" / "quarot.safetensors")["global_rotation"].double()


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "deepseek_v3"])
def test_the_model_computes_the_same(
    stranger: Stranger, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path, family: str
) -> None:
    folder = model_folder(family, torch.float32)
    result = quantize(folder, tmp_path / "out", prior=prior(), process=[SECOND])
    assert result.stage_forwards == 3 * 5
    assert result.block_forwards == 0
    rotation = exported(tmp_path / "out")
    assert torch.allclose(rotation @ rotation.T, torch.eye(32).double(), atol=1e-6)
    text = "A generator is a function that returns an iterator. " * 20
    scores = stranger.scores(folder, tmp_path / "out", text, sequence_length=32)
    assert scores.kl_divergence is not None
    assert scores.kl_divergence < 1e-6
    verification = verify_folder(tmp_path / "out", folder)
    assert verification.ok, verification.text()
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith("learned")]


def test_it_learns_from_what_the_linears_read(
    naive: ModuleType,
    model_folder: ModelFolder,
    quantize: Quantize,
    token_ids: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tokens it is shown are those of the model rotated by the Hadamard matrix; R lowers their error in int4."""
    shown: dict[str, Tensor] = {}
    learn = AdaptRotation.learn

    def spying(self: AdaptRotation, seen: Any) -> Any:
        shown.update(seen)
        return learn(self, seen)

    monkeypatch.setattr(AdaptRotation, "learn", spying)
    folder = model_folder("llama", torch.float32)
    stage = FIRST | {"layer_type": ["up_proj", "self_attn.q"], "steps": 20}
    quantize(folder, tmp_path / "out", prior=prior(stage), process=[SECOND])
    at = "model.layers.{}.{}"
    assert list(shown) == [at.format(i, one) for i in range(3) for one in ("self_attn.q_proj", "mlp.gate_proj")]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs: list[Tensor] = []
    norm = model.model.layers[1].post_attention_layernorm
    norm.register_forward_hook(lambda _m, _a, output: inputs.append(output[0] / norm.weight))
    with torch.no_grad():
        for ids in token_ids:
            model(input_ids=torch.tensor([ids]), use_cache=False)
    tokens = torch.cat(inputs).double() @ Hadamard(32).dense()
    for row in shown["model.layers.1.mlp.gate_proj"].double():
        assert float((tokens - row).abs().amax(1).min()) < 1e-4
    learned = Hadamard(32).dense().T @ exported(tmp_path / "out")
    pool = torch.cat(list(shown.values())).double()

    def error(rotated: Tensor) -> float:
        return float((rotated - fake_quantize(rotated.clone(), 4)).square().sum())

    assert error(pool @ learned) < error(pool)


def test_its_own_calibration_set(model_folder: ModelFolder, quantize: Quantize, dataset: Path, tmp_path: Path) -> None:
    folder = model_folder("llama")
    few = {"path": str(dataset), "num_samples": 2}
    result = quantize(folder, tmp_path / "out", prior=prior(dataset=few), process=[SECOND], dataset="nothing.jsonl")
    assert result.stage_forwards == 3 * 2
    assert result.samples == 0
    all_of_them = quantize(folder, tmp_path / "all", prior=prior(), process=[SECOND])
    assert all_of_them.stage_forwards == 3 * 5
    assert not torch.equal(exported(tmp_path / "out"), exported(tmp_path / "all"))
    with pytest.raises(InvalidDatasetError, match="there is no calibration set 'nothing"):
        quantize(folder, tmp_path / "no", prior=prior(dataset="nothing.jsonl"), process=[SECOND])


def test_both_stages_have_their_own_calibration_set(
    rules: Any, naive: ModuleType, model_folder: ModelFolder, quantize: Quantize, dataset: Path, tmp_path: Path
) -> None:
    """What is learned ahead comes from one set, and the ranges of the main stage from the other."""
    folder, ahead = model_folder("qwen2", torch.float32), tmp_path / "ahead.jsonl"
    texts = ["Seven red apples, and a pear.", "x = [i * i for i in range(12)]"]
    ahead.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    main = [tokenizer(json.loads(line)["text"])["input_ids"] for line in dataset.read_text().splitlines()]
    learning = prior(dataset=str(ahead))
    quantize(folder, tmp_path / "float", prior=learning, process=[SECOND])
    made = quantize(folder, tmp_path / "out", prior=learning, process=[SECOND, rules["static"]], dataset=str(dataset))
    assert (made.stage_forwards, made.block_forwards, made.samples) == (3 * len(texts), 3 * len(main), len(main))
    assert torch.equal(exported(tmp_path / "out"), exported(tmp_path / "float"))
    quantize(folder, tmp_path / "other", prior=prior(), process=[SECOND])
    assert not torch.equal(exported(tmp_path / "out"), exported(tmp_path / "other"))

    written = naive.read(tmp_path / "out")
    (tmp_path / "again").mkdir()
    save_file(naive.read(tmp_path / "float").tensors, tmp_path / "again" / "model.safetensors")
    shutil.copyfile(tmp_path / "float" / "config.json", tmp_path / "again" / "config.json")
    rotated = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32).eval()
    wanted, wrong = (
        {
            name: [float(one) for one in naive.input_parameters(*span, False, torch.float32)]
            for name, span in naive.ranges(rotated, written.quantized(), inputs).items()
        }
        for inputs in (main, [tokenizer(text)["input_ids"] for text in texts])
    )
    found = {name: float(written.tensors[f"{name}.input_scale"]) for name in written.quantized()}
    assert found == {name: pytest.approx(scale, rel=1e-3) for name, (scale, _) in wanted.items()}
    assert sum(abs(found[name] / scale - 1) > 1e-2 for name, (scale, _) in wrong.items()) > len(found) / 2


def test_the_same_rotation_every_time(
    content: Any, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    folder, state = model_folder("qwen2"), torch.get_rng_state()
    for name in ("a", "b"):
        quantize(folder, tmp_path / name, prior=prior(), process=[SECOND, DYNAMIC])
    assert torch.equal(torch.get_rng_state(), state)
    assert content(tmp_path / "a") == content(tmp_path / "b")


@pytest.mark.parametrize("unit", ["prologue", "model.layers.1"])
def test_what_was_learned_is_not_learned_again(
    killed: Any,
    content: Any,
    model_folder: ModelFolder,
    quantize: Quantize,
    tmp_path: Path,
    unit: str,
) -> None:
    model, recipe = model_folder("qwen2"), {"prior": prior(), "process": [SECOND, DYNAMIC]}
    quantize(model, tmp_path / "whole", **recipe)
    with killed(LinearQuant, unit):
        quantize(model, tmp_path / "out", **recipe)
    result = quantize(model, tmp_path / "out", resume=True, **recipe)
    assert result.stage_forwards == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_broken_note_of_what_was_learned(
    killed: Any, content: Any, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    model, recipe = model_folder("qwen2"), {"prior": prior(), "process": [SECOND, DYNAMIC]}
    quantize(model, tmp_path / "whole", **recipe)
    with killed(LinearQuant, "model.layers.1"):
        quantize(model, tmp_path / "out", **recipe)
    (note,) = tmp_path.glob(".out*/learned.safetensors")
    note.write_bytes(note.read_bytes()[:100])
    assert quantize(model, tmp_path / "out", resume=True, **recipe).stage_forwards == 15
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_other_data_is_another_run(
    killed: Any, model_folder: ModelFolder, quantize: Quantize, dataset: Path, tmp_path: Path
) -> None:
    with killed(LinearQuant, "model.layers.1"):
        quantize(model_folder("qwen2"), tmp_path / "out", prior=prior(), process=[SECOND, DYNAMIC])
    dataset.write_text(dataset.read_text().replace("iterator", "iterators"))
    try:
        with pytest.raises(UnsupportedError, match="another recipe, model, data set or version"):
            quantize(model_folder("qwen2"), tmp_path / "out", prior=prior(), process=[SECOND, DYNAMIC], resume=True)
    finally:
        dataset.write_text(dataset.read_text().replace("iterators", "iterator"))


@pytest.mark.parametrize(
    ("layers", "where", "message"),
    [
        (["down_proj"], "model.layers.0.mlp.down_proj", "its input is not the hidden states"),
        (["up_proj", "o_proj"], "model.layers.0.self_attn.o_proj", "its input is not the hidden states"),
        (["layers"], "spec.prior[0].process[0].layer_type", "no linear has 'layers' in its name"),
        (["lm_head"], "spec.prior[0].process[0].layer_type", "no linear has 'lm_head' in its name"),
    ],
)
def test_layers_that_say_nothing_of_the_hidden_states(
    model_folder: ModelFolder, quantize: Quantize, tmp_path: Path, layers: list[str], where: str, message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message) as caught:
        quantize(model_folder("llama"), tmp_path / "out", prior=prior(FIRST | {"layer_type": layers}), process=[SECOND])
    assert caught.value.where == where


def test_processors_that_have_no_business_ahead(model_folder: ModelFolder, quantize: Quantize, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="linear_quant learns nothing that the main stage could use") as caught:
        quantize(model_folder("llama"), tmp_path / "out", prior=[{"process": [DYNAMIC]}], process=[DYNAMIC])
    assert caught.value.where == "spec.prior[0].process[0]"


def test_the_plan_tells_of_the_stage(model_folder: ModelFolder, dataset: Path, tmp_path: Path) -> None:
    request = QuantRequest(
        model_path=model_folder("qwen3_moe"), save_path=tmp_path / "o", model_type="t", device="cpu", force=True
    )
    spec = {"prior": prior(FIRST | {"max_samples": 100}), "process": [SECOND, DYNAMIC], "dataset": str(dataset)}
    plan = LlmService().plan(request, recipe_from_dict({"apiversion": "modelslim_v1", "spec": spec}))
    text = render_summary(plan)
    line = "prior[0]   adapt_rotation learns a rotation from up to 100 tokens at each of 3 places (up_proj), for int4; "
    assert line + f"one forward of each block for every sample of {dataset}" in text
    assert "adapt_rotation: hidden states of 32 channels rotated, 3 value paths" in text
    assert not (tmp_path / "o").exists()


def test_the_recipe_as_run_can_be_run_again(
    content: Any, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    """The effective recipe spells out the fields of each stage and of no other."""
    import yaml

    quantize(model_folder("llama"), tmp_path / "out", prior=prior(), process=[SECOND, DYNAMIC])
    recipe = yaml.safe_load((tmp_path / "out" / "tiny_best_practice.yaml").read_text())
    (stage,) = recipe["spec"]["prior"]
    assert stage["process"] == [
        {"type": "adapt_rotation", "stage": 1, "block_size": -1, "steps": 6, "quant_dtype": "int4"}
        | {"layer_type": ["up_proj"], "max_samples": 2048}
    ]
    assert recipe["spec"]["process"][0] == (
        {"type": "adapt_rotation", "stage": 2, "block_size": -1, "online": False, "max_tp_size": 4}
        | {"down_proj_online_layers": []}
    )
    LlmService().quantize(
        QuantRequest(
            model_path=model_folder("llama"), save_path=tmp_path / "again", model_type="tiny", device="cpu", force=True
        ),
        recipe_from_dict(recipe),
        SilentProgress(),
    )
    assert content(tmp_path / "out") == content(tmp_path / "again")


def test_with_rotations_at_run_time(
    naive: ModuleType, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    online = SECOND | {"online": True, "max_tp_size": 2, "down_proj_online_layers": [1]}
    quantize(model_folder("llama"), tmp_path / "out", prior=prior(), process=[online, DYNAMIC])
    names = naive.read(tmp_path / "out").tensors
    assert "model.layers.1.mlp.down_proj.kronecker_rotation_m" in names
    metadata = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())["metadata"]
    assert metadata["quarot"]["max_tp_size"] == 2


LAOS_WEIGHT = {"scope": "per_channel", "symmetric": True, "method": "autoround", "ext": {"scale_dtype": "bfloat16"}}
LAOS_ACT = {"scope": "per_token", "symmetric": True, "method": "minmax"}


def test_the_recipe_of_laos(naive: ModuleType, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path) -> None:
    """Learned rotation, then autoround: four bits for gate and up of some layers, eight for what is sensitive."""
    strategies = [
        {
            "qconfig": {"act": LAOS_ACT | {"dtype": bits}, "weight": LAOS_WEIGHT | {"dtype": bits}},
            "include": include,
        }
        for bits, include in (
            ("int8", ["*self_attn*", "*down_proj*", "*.layers.0.mlp.*"]),
            ("int4", ["*.{gate,up}_proj"]),
        )
    ]
    rounding = {"type": "autoround_quant", "iters": 2, "strategies": strategies, "batch_size": 2}
    result = quantize(model_folder("qwen3"), tmp_path / "out", prior=prior(), process=[SECOND, rounding])
    assert result.stage_forwards == 15
    written = naive.read(tmp_path / "out")
    kinds = {module: written.kind(module) for module in written.quantized()}
    four = {module for module, kind in kinds.items() if kind == "W4A4_DYNAMIC"}
    assert four == {f"model.layers.{i}.mlp.{leaf}_proj" for i in (1, 2) for leaf in ("gate", "up")}
    assert set(kinds.values()) == {"W4A4_DYNAMIC", "W8A8_DYNAMIC"}
    verification = verify_folder(tmp_path / "out", model_folder("qwen3"))
    assert verification.ok, verification.text()


def test_the_recipe_of_laos_wins_back_what_four_bits_cost(
    stranger: Stranger, quantize: Quantize, tmp_path: Path
) -> None:
    """The shipped model, activations of four bits everywhere but in front of down_proj: unusable without a rotation."""

    def scheme(bits: str) -> dict[str, Any]:
        return {"act": LAOS_ACT | {"dtype": bits}, "weight": LAOS_WEIGHT | {"dtype": bits}}

    strategies = [{"qconfig": scheme("int4"), "exclude": ["*.down_proj"]}, {"qconfig": scheme("int8")}]
    rounding = {"type": "autoround_quant", "iters": 4, "strategies": strategies}
    quantize(EXAMPLE, tmp_path / "plain", process=[rounding])
    quantize(EXAMPLE, tmp_path / "laos", prior=prior(), process=[SECOND, rounding])
    size = json.loads((EXAMPLE / "config.json").read_text())["hidden_size"]
    assert not torch.allclose(exported(tmp_path / "laos"), Hadamard(size).dense(), atol=0.01)  # it was learned
    text = (EXAMPLE.parent / "heldout.txt").read_text()[:1500]
    plain, laos = (stranger.scores(EXAMPLE, tmp_path / name, text).kl_divergence for name in ("plain", "laos"))
    assert laos < 0.05 * plain
