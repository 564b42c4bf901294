"""The practices for vision-language models, each run on a tiny model of its family: what becomes of every tensor is
compared with a table, and the engine must be able to load it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from slim_core.evaluation.verify import verify_folder
from slim_core.progress import SilentProgress
from slim_core.recipe import load_recipe
from slim_core.runners.plan import Plan
from slim_core.service import EvalRequest, QuantRequest
from slim_vlm.recipe import SpecVlm
from slim_vlm.service import VlmService

ROOT = Path(__file__).parents[3]
LAB = ROOT / "lab_practice"
API = "multimodal_vlm_modelslim_v1"
FILES = [path for path in sorted(LAB.glob("*/*.yaml")) if f"apiversion: {API}\n" in path.read_text("utf-8")]
OWN = [path for path in FILES if path.parent.name != "default"]
DEFAULTS = [path for path in FILES if path.parent.name == "default"]
# The tiny model of a family. Engines cut the inputs of experts into 16 parts for four bits, and want 64 to divide those
# of microscaling formats; experts are not as wide inside as outside.
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": []}
BUILT: dict[str, tuple[str, dict[str, Any]]] = {
    "glm4_1v": ("glm4v", {}),
    "glm4_6v": ("glm4v_moe", {"text_config": {"moe_intermediate_size": 48}}),
    "internvl3_5": ("internvl", {}),
    "internvl3_5_moe": (
        "internvl",
        {"text_config": {"model_type": "qwen3_moe", "moe_intermediate_size": 48, "norm_topk_prob": True, **EXPERTS}},
    ),
    "qwen2_5_vl": ("qwen2_5_vl", {"intermediate_size": 128}),
    "qwen2_vl": ("qwen2_vl", {}),
    "qwen3_vl": ("qwen3_vl", {"text_config": {"intermediate_size": 128}}),
    "qwen3_vl_embedding": ("qwen3_vl", {"text_config": {"intermediate_size": 128}}),
    "qwen3_vl_moe": ("qwen3_vl_moe", {"text_config": {"moe_intermediate_size": 128}}),
}
# Names of a checkpoint, by family: of a block of the vision tower, and of a layer of the text.
QWEN = (r"model\.visual\.blocks\.\d+\.", r"model\.language_model\.layers\.\d+\.")
QWEN2 = (r"visual\.blocks\.\d+\.", r"model\.layers\.\d+\.")
INTERN = (r"vision_tower\.encoder\.layer\.\d+\.", r"language_model\.model\.layers\.\d+\.")
PLACES = {
    **dict.fromkeys(("glm4_1v", "glm4_6v", "qwen3_vl", "qwen3_vl_embedding", "qwen3_vl_moe"), QWEN),
    **dict.fromkeys(("qwen2_5_vl", "qwen2_vl"), QWEN2),
    **dict.fromkeys(("internvl3_5", "internvl3_5_moe"), INTERN),
}
ATTENTION, GATE_UP, DOWN = r"self_attn\.[qkvo]_proj", r"mlp\.(gate|up)_proj", r"mlp\.down_proj"
EXPERT, SHARED = r"mlp\.experts\.\d+\.(gate|up|down)_proj", r"mlp\.shared_experts\.(gate|up|down)_proj"
MLP = r"mlp\.(gate|up|down)_proj"
# What each practice makes of linears of the vision tower and of the text; all else stays in floating point.
Table = tuple[dict[str, str], dict[str, str]]
STATIC_TEXT = {ATTENTION: "W8A8", GATE_UP: "W8A8", DOWN: "W8A8_DYNAMIC"}
QWEN3_BLOCK, QWEN2_5_BLOCK = r"(attn\.(qkv|proj)|mlp\.linear_fc1)", r"(attn\.(qkv|proj)|mlp\.(gate|up)_proj)"
WANTED: dict[str, Table] = {
    "glm4_1v_w8a16": ({}, {ATTENTION: "W8A16", r"mlp\.(gate_up|down)_proj": "W8A16"}),
    "glm4_1v_w8a8": ({}, {ATTENTION: "W8A8", r"mlp\.gate_up_proj": "W8A8", DOWN: "W8A8_DYNAMIC"}),
    "glm4_6v_w4a8": (
        {},
        {ATTENTION: "W8A8_DYNAMIC", MLP: "W8A8_DYNAMIC", SHARED: "W8A8_DYNAMIC", EXPERT: "W4A8_DYNAMIC"},
    ),
    "glm4_6v_w8a8": ({}, {ATTENTION: "W8A8", MLP: "W8A8_DYNAMIC", SHARED: "W8A8_DYNAMIC", EXPERT: "W8A8_DYNAMIC"}),
    "internvl3_5_moe_w4a8": ({}, {ATTENTION: "W8A8_DYNAMIC", EXPERT: "W4A8_DYNAMIC"}),
    "internvl3_5_moe_w8a8": ({}, {ATTENTION: "W8A8", EXPERT: "W8A8_DYNAMIC"}),
    "internvl3_5_tied_w8a8": ({}, STATIC_TEXT),
    "internvl3_5_w8a16": ({}, {ATTENTION: "W8A16", MLP: "W8A16"}),
    "internvl3_5_w8a8": ({}, STATIC_TEXT),
    "qwen2_5_vl_tied_w8a8": ({QWEN2_5_BLOCK: "W8A8"}, STATIC_TEXT),
    "qwen2_5_vl_w8a16": ({r"(attn|mlp)\.\w+": "W8A16"}, {ATTENTION: "W8A16", MLP: "W8A16"}),
    "qwen2_5_vl_w8a8": ({QWEN2_5_BLOCK: "W8A8"}, STATIC_TEXT),
    "qwen2_5_vl_w8a8_mxfp8": ({QWEN2_5_BLOCK: "W8A8_MXFP8"}, {ATTENTION: "W8A8_MXFP8", MLP: "W8A8_MXFP8"}),
    "qwen2_vl_tied_w8a8": ({r"(attn\.(qkv|proj)|mlp\.fc1)": "W8A8"}, STATIC_TEXT),
    "qwen2_vl_w8a16": ({r"(attn|mlp)\.\w+": "W8A16"}, {ATTENTION: "W8A16", MLP: "W8A16"}),
    "qwen2_vl_w8a8": ({r"(attn\.(qkv|proj)|mlp\.fc1)": "W8A8"}, STATIC_TEXT),
    "qwen3_vl_embedding_w8a8": ({}, {ATTENTION: "W8A8_DYNAMIC", MLP: "W8A8_DYNAMIC"}),
    "qwen3_vl_moe_w4a8": ({QWEN3_BLOCK: "W8A8_DYNAMIC"}, {ATTENTION: "W8A8_DYNAMIC", EXPERT: "W4A8_DYNAMIC"}),
    "qwen3_vl_moe_w8a8": ({QWEN3_BLOCK: "W8A8"}, {ATTENTION: "W8A8", EXPERT: "W8A8_DYNAMIC"}),
    "qwen3_vl_moe_w8a8_mxfp8": (
        {r"(attn\.qkv|mlp\.linear_fc1)": "W8A8_MXFP8"},
        {ATTENTION: "W8A8_MXFP8", EXPERT: "W8A8_MXFP8"},
    ),
    "qwen3_vl_tied_w8a8": ({QWEN3_BLOCK: "W8A8"}, STATIC_TEXT),
    "qwen3_vl_w8a16": ({r"(attn|mlp)\.\w+": "W8A16"}, {ATTENTION: "W8A16", MLP: "W8A16"}),
    "qwen3_vl_w8a8": ({QWEN3_BLOCK: "W8A8"}, STATIC_TEXT),
    "qwen3_vl_w8a8_mxfp8": (
        {r"(attn\.qkv|mlp\.linear_fc1)": "W8A8_MXFP8"},
        {ATTENTION: "W8A8_MXFP8", MLP: "W8A8_MXFP8"},
    ),
}
# Of the logits, in dB, of weights as drawn. Random routers change their mind with the last bit.
LEAST_SQNR = {"dense": 20.0, "experts": 10.0}
FUSED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)$")

Folder = Callable[..., Path]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, tiny_processors: Any) -> Path:
    """Three small pictures of different sizes, with questions and answers."""
    folder = tmp_path_factory.mktemp("pictures")
    records: list[str] = []
    for i, size in enumerate(((48, 40), (90, 33), (40, 64))):
        tiny_processors.picture(*size).save(folder / f"{i}.png")
        answer = "A square beside a circle, and below them a line of text that says where they are."
        records.append(json.dumps({"image": f"{i}.png", "text": "What is in the picture?", "answer": answer}))
    (folder / "index.jsonl").write_text("\n".join(records), "utf-8")
    return folder


def built(path: Path, vlm_folder: Folder) -> Path:
    family, options = BUILT[path.parent.name]
    if "_tied_" in path.stem:
        options = {**options, "tie_word_embeddings": True}
    return vlm_folder(family, **options)


def run(path: Path, model: Path, pictures: Path, output: Path) -> Plan:
    """Run a practice with a small calibration set; gives the plan."""
    recipe = output.parent / path.name
    recipe.write_text(path.read_text("utf-8").replace("dataset: calibImages", f"dataset: {pictures}"), "utf-8")
    plans: list[Plan] = []
    request = QuantRequest(model_path=model, save_path=output, model_type=path.parent.name, device="cpu")
    VlmService().quantize(request, load_recipe(recipe), SilentProgress(), plans.append)
    (plan,) = plans
    return plan


def stored(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape of every tensor."""
    found: dict[str, tuple[str, list[int]]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                part = file.get_slice(name)
                found[name] = (part.get_dtype(), part.get_shape())
    return found


def described(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "quant_model_description.json").read_text("utf-8"))


def weights_of(before: dict[str, tuple[str, list[int]]]) -> set[str]:
    """The weights that an engine asks for: those of the checkpoint, and of every expert where experts are stacked."""
    names: set[str] = set()
    for name, (_, shape) in before.items():
        if found := FUSED.match(name):
            parts = ("gate_proj", "up_proj") if found[2] == "gate_up_proj" else ("down_proj",)
            names |= {f"{found[1]}.{i}.{part}.weight" for i in range(shape[0]) for part in parts}
        elif name.endswith(".weight"):
            names.add(name)
    return names


def has_experts(path: Path) -> bool:
    return EXPERT in WANTED[path.stem][1]


def wanted(path: Path, weight: str) -> str:
    name = weight.removesuffix(".weight")
    for place, table in zip(PLACES[path.parent.name], WANTED[path.stem], strict=True):
        for pattern, kind in table.items():
            if re.fullmatch(place + pattern, name):
                return kind
    return "FLOAT"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_practice_is_sound(path: Path) -> None:
    recipe = load_recipe(path)
    spec = recipe.spec(SpecVlm)
    assert recipe.metadata.config_id == path.stem
    assert (recipe.raw_spec["runner"], spec.runner, spec.warnings()) == ("layer_wise", "layer_wise", [])
    assert [saver.type for saver in spec.save] == ["ascendv1_saver"]
    data_free = path.stem.endswith("w8a16") or path in DEFAULTS
    assert ("dataset: calibImages\n" in path.read_text("utf-8")) != data_free
    assert spec.dataset.path == "calibImages"


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.stem)
def test_it_runs_on_its_family_and_the_engine_loads_it(
    path: Path, vlm_folder: Folder, pictures: Path, tmp_path: Path
) -> None:
    model, output = built(path, vlm_folder), tmp_path / "out"
    plan = run(path, model, pictures, output)
    assert plan.warnings == []
    before, after, description = stored(model), stored(output), described(output)
    if "_tied_" in path.stem:  # engines ask for the head, which the checkpoint leaves out
        (embedding,) = (name for name in before if name.endswith("embed_tokens.weight"))
        assert not any("lm_head" in name for name in before)
        before["lm_head.weight"] = before[embedding]
    weights = weights_of(before)
    types = {name: kind for name, kind in description.items() if name.endswith(".weight")}
    assert types == {name: wanted(path, name) for name in weights}
    for table in WANTED[path.stem]:
        for kind in table.values():
            assert kind in types.values()
    assert len({kind for name, kind in types.items() if ".experts." in name}) == has_experts(path)
    for name, kind in types.items():
        if kind == "FLOAT":
            assert (after[name], after[name][0]) == (before[name], "BF16"), name
    assert any(re.match(PLACES[path.parent.name][0], name) for name in weights)
    result = verify_folder(output, model, "vllm-ascend")
    assert result.ok, result.problems
    if re.fullmatch(r".*(?<!_tied)_w8a8", path.stem):
        request = EvalRequest(model_path=model, quantized=output, dataset=str(pictures), device="cpu")
        sqnr = VlmService().evaluate(request, SilentProgress()).logits_sqnr_db
        assert sqnr is not None
        assert sqnr > LEAST_SQNR["experts" if has_experts(path) else "dense"]


def test_outliers_such_as_training_makes(vlm_folder: Folder, pictures: Path, tmp_path: Path) -> None:
    """The bound is stricter than the 5 dB of this scheme for mixtures of experts that read text alone."""
    model, output = vlm_folder("qwen3_vl_moe", outliers=True), tmp_path / "out"
    run(LAB / "qwen3_vl_moe" / "qwen3_vl_moe_w8a8.yaml", model, pictures, output)
    request = EvalRequest(model_path=model, quantized=output, dataset=str(pictures), device="cpu")
    sqnr = VlmService().evaluate(request, SilentProgress()).logits_sqnr_db
    assert sqnr is not None
    assert sqnr > LEAST_SQNR["experts"]


def test_the_mixed_scheme_of_qwen3_vl_moe(vlm_folder: Folder, pictures: Path, tmp_path: Path) -> None:
    """Tensor by tensor, for one linear of each sort; counts for all of them."""
    path = LAB / "qwen3_vl_moe" / "qwen3_vl_moe_w8a8.yaml"
    model, output = built(path, vlm_folder), tmp_path / "out"
    run(path, model, pictures, output)
    after, description = stored(output), described(output)

    def at(prefix: str) -> dict[str, tuple[str, list[int], str]]:
        start = f"{prefix}."
        return {n.removeprefix(start): (*after[n], description[n]) for n in after if n.startswith(start)}

    def static(n: int, k: int) -> dict[str, tuple[str, list[int], str]]:
        return {
            "weight": ("I8", [n, k], "W8A8"),
            "input_scale": ("F32", [1], "W8A8"),
            "input_offset": ("F32", [1], "W8A8"),
            "quant_bias": ("I32", [n], "W8A8"),
            "deq_scale": ("F32", [n], "W8A8"),
        }

    biased = {name: {"bias": ("F32", [n], "FLOAT")} for name, n in (("qkv", 96), ("proj", 32), ("fc1", 48))}
    assert at("model.visual.blocks.2.attn.qkv") == static(96, 32) | biased["qkv"]
    assert at("model.visual.blocks.2.attn.proj") == static(32, 32) | biased["proj"]
    assert at("model.visual.blocks.2.mlp.linear_fc1") == static(48, 32) | biased["fc1"]
    assert at("model.language_model.layers.3.self_attn.k_proj") == static(32, 64)
    for part, n, k in (("gate", 128, 64), ("up", 128, 64), ("down", 64, 128)):
        assert at(f"model.language_model.layers.3.mlp.experts.7.{part}_proj") == {
            "weight": ("I8", [n, k], "W8A8_DYNAMIC"),
            "weight_scale": ("F32", [n, 1], "W8A8_DYNAMIC"),
            "weight_offset": ("F32", [n, 1], "W8A8_DYNAMIC"),
        }
    for name in (
        "merger.linear_fc1",
        "merger.linear_fc2",
        "deepstack_merger_list.2.linear_fc2",
        "blocks.0.mlp.linear_fc2",
    ):
        assert {part: kind for part, (*_, kind) in at(f"model.visual.{name}").items()} == dict.fromkeys(
            ("weight", "bias"), "FLOAT"
        )
    assert (after["model.language_model.layers.0.mlp.gate.weight"], description["lm_head.weight"]) == (
        ("BF16", [8, 64]),
        "FLOAT",
    )
    kinds = [kind for name, kind in description.items() if name.endswith(".weight")]
    # Three linears of each of 3 vision blocks, four of each of 4 layers of the text; 8 experts of three in each.
    assert (kinds.count("W8A8"), kinds.count("W8A8_DYNAMIC")) == (3 * 3 + 4 * 4, 4 * 8 * 3)
