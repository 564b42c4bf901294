"""The practices for language models that ship with Slim. Those of vision-language models are tested with slim-vlm."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml

from slim_core.practices import PracticeLibrary
from slim_core.recipe import NameFilter, dump_recipe, load_recipe

ROOT = Path(__file__).parents[4]
LAB = ROOT / "lab_practice"
DOCUMENTATION = ROOT / "docs/models.md"
REGISTRY = ROOT / "packages/slim-llm/src/slim_llm/models/registry.yaml"


def of_this_protocol(paths: Iterable[Path]) -> list[Path]:
    return [path for path in sorted(paths) if "apiversion: modelslim_v1\n" in path.read_text("utf-8")]


FILES = of_this_protocol(LAB.glob("*/*.yaml"))
DENSE = ("llama", "qwen1_5", "qwen2", "qwen2_5", "qwen3", "qwq")
DENSE_TYPES = {"w8a8", "w8a16", "w8a8c8", "w8a8s", "w16a16s", "w4a8", "w4a8c8", "w4a4"}
# Quantization types that each other family must have.
TYPES = {
    "deepseek_v2": {"w8a8", "w8a8c8", "w8a16", "w4a8"},
    "deepseek_v3": {"w8a8", "w8a8c8", "w8a16", "w4a8", "w4a8c8", "w4a4", "w4a4c8"},
    "deepseek_v3_2": {"w8a8", "w8a16", "w4a8"},
    "deepseek_v4": {"w8a8", "w4a8"},
    "ernie4_5_moe": {"w8a8", "w8a8c8", "w8a16", "w4a8"},
    "glm4_moe": {"w8a8", "w8a8c8", "w8a16", "w4a8"},
    "glm4_moe_lite": {"w8a8", "w8a8c8", "w8a16", "w4a8"},
    "glm_5": {"w8a8", "w8a8c8", "w8a16", "w4a8", "w4a8c8", "w4a4", "w4a4c8"},
    "gpt_oss": {"w8a8", "w4a8"},
    "hunyuan_moe": {"w8a8", "w8a8c8", "w8a16", "w4a8"},
    "kimi_k2": {"w8a8", "w8a8c8", "w8a16", "w4a8", "w4a8c8", "w4a4", "w4a4c8"},
    "llama4": {"w8a8", "w8a16", "w4a8"},
    "longcat_flash": {"w8a8", "w8a16", "w4a8", "w4a4"},
    "minimax_m2": {"w8a8", "w8a8c8", "w8a16", "w4a8"},
    "mixtral": {"w8a8", "w8a8c8", "w8a16", "w4a8"},
    "olmoe": {"w8a8", "w8a8c8", "w8a16", "w4a8"},
    "phimoe": {"w8a8", "w8a8c8", "w8a16", "w4a8"},
    "qwen2_moe": {"w8a8", "w8a8c8", "w8a16", "w4a8"},
    "qwen3_5": {"w8a8", "w8a16"},
    "qwen3_5_moe": {"w8a8", "w8a16", "w4a8"},
    "qwen3_moe": {"w8a8", "w8a8c8", "w8a16", "w4a8", "w4a8c8", "w4a4"},
    "qwen3_next": {"w8a8", "w8a16", "w4a8"},
}
# Parts of a decoder block: what is quantized of them, and what stays in floating point.
MLP = tuple(f"{{}}.{name}_proj" for name in ("gate", "up", "down"))
ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
LATENT = ("self_attn.q_a_proj", "self_attn.q_b_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.o_proj")
LINEAR_ATTENTION = tuple(f"linear_attn.{name}" for name in ("in_proj_qkv", "in_proj_z", "out_proj"))
INDEXER = tuple(f"self_attn.indexer.{name}" for name in ("wq_b", "wk", "weights_proj"))
COMPRESSOR = (
    *("self_attn.compressor.kv_proj", "self_attn.compressor.gate_proj", "self_attn.compressor.indexer.kv_proj"),
    *("self_attn.compressor.indexer.gate_proj", "self_attn.compressor.indexer.q_b_proj"),
    "self_attn.compressor.indexer.scorer.weights_proj",
)
ROUTER = ("mlp.gate", "mlp.router", "mlp.gate.wg", "feed_forward.router", "mlp.router.classifier")
ROUTER += ("block_sparse_moe.gate", "mlp.shared_expert_gate")


def mlp(*paths: str) -> tuple[str, ...]:
    return tuple(name.format(path) for path in paths for name in MLP)


EXPERTS = mlp("mlp.experts.0", "mlp.experts.127")
NUMBERED = tuple(f"mlp.experts.{expert}.w{i}" for expert in (0, 7) for i in (1, 2, 3))
SHARED = mlp("mlp", "mlp.shared_experts")
LAYOUTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **dict.fromkeys(DENSE, ((*ATTENTION, *mlp("mlp")), ())),
    **dict.fromkeys(
        ("deepseek_v3", "glm4_moe_lite", "kimi_k2"), ((*LATENT, *SHARED, *EXPERTS), ("self_attn.kv_b_proj",))
    ),
    # Without a low rank in DeepSeek-V2-Lite.
    "deepseek_v2": ((*LATENT, "self_attn.q_proj", *SHARED, *EXPERTS), ("self_attn.kv_b_proj",)),
    **dict.fromkeys(("deepseek_v3_2", "glm_5"), ((*LATENT, *SHARED, *EXPERTS), ("self_attn.kv_b_proj", *INDEXER))),
    "deepseek_v4": (
        (*(f"self_attn.{name}_proj" for name in ("q_a", "q_b", "kv", "o_b")), *mlp("mlp.shared_experts"), *NUMBERED),
        COMPRESSOR,
    ),
    **dict.fromkeys(("ernie4_5_moe", "glm4_moe"), ((*ATTENTION, *SHARED, *EXPERTS), ())),
    **dict.fromkeys(("gpt_oss", "olmoe", "qwen3_moe"), ((*ATTENTION, *EXPERTS), ())),
    "hunyuan_moe": ((*ATTENTION, *mlp("mlp.shared_mlp"), *EXPERTS), ()),
    # Maverick has a dense feed forward in every other block.
    "llama4": ((*ATTENTION, *mlp("feed_forward", "feed_forward.shared_expert", "feed_forward.experts.15")), ()),
    "longcat_flash": (
        (
            *(name.replace("self_attn", f"self_attn.{half}") for half in (0, 1) for name in LATENT),
            *mlp("mlps.0", "mlps.1"),
            *EXPERTS,
        ),
        ("self_attn.0.kv_b_proj", "self_attn.1.kv_b_proj"),
    ),
    **dict.fromkeys(("minimax_m2", "mixtral", "phimoe"), ((*ATTENTION, *NUMBERED), ())),
    "qwen2_moe": ((*ATTENTION, *mlp("mlp.shared_expert"), *EXPERTS), ()),
    "qwen3_5": ((*LINEAR_ATTENTION, *ATTENTION, *mlp("mlp")), ("linear_attn.in_proj_a", "linear_attn.in_proj_b")),
    "qwen3_5_moe": (
        (*LINEAR_ATTENTION, *ATTENTION, *mlp("mlp.shared_expert"), *EXPERTS),
        ("linear_attn.in_proj_a", "linear_attn.in_proj_b"),
    ),
    "qwen3_next": (
        ("linear_attn.in_proj_qkvz", "linear_attn.out_proj", *ATTENTION, *mlp("mlp.shared_expert"), *EXPERTS),
        ("linear_attn.in_proj_ba",),
    ),
}
LATENTS = tuple(
    family for family, (quantized, _) in LAYOUTS.items() if LATENT[0] in quantized and LATENT[2] in quantized
)


def in_layers(names: Iterable[str]) -> list[str]:
    return [f"model.layers.{layer}.{name}" for layer in (0, 35) for name in names]


def ident(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", FILES, ids=ident)
def test_a_practice_is_sound(path: Path):
    recipe = load_recipe(path)
    spec = recipe.spec()
    assert recipe.apiversion == "modelslim_v1"
    assert recipe.metadata.config_id == path.stem
    assert spec.runner == "auto"
    assert [saver.type for saver in spec.save] == ["ascendv1_saver"]
    assert spec.warnings() == []


RECIPES = [*FILES, *of_this_protocol([*ROOT.glob("examples/*.yaml"), *ROOT.glob("benchmarks/recipes/*.yaml")])]


@pytest.mark.parametrize("path", RECIPES, ids=ident)
def test_a_recipe_is_the_same_after_it_was_written(path: Path, tmp_path: Path):
    recipe = load_recipe(path)
    text = dump_recipe(recipe)
    (tmp_path / path.name).write_text(text, "utf-8")
    again = load_recipe(tmp_path / path.name)
    assert again.spec() == recipe.spec()
    assert (again.apiversion, again.metadata, again.extra) == (recipe.apiversion, recipe.metadata, recipe.extra)
    assert dump_recipe(again) == text


def owners(path: Path) -> list[NameFilter]:
    """What the processors name that take linears."""
    found = [one for one in load_recipe(path).spec().process if one.type in ("linear_quant", "float_sparse")]
    return [NameFilter(one.include, one.exclude) for one in found]


@pytest.mark.parametrize("path", FILES, ids=ident)
def test_every_linear_is_quantized_exactly_once_and_every_pattern_is_used(path: Path):
    """But those that are to stay in floating point, and routers."""
    filters = owners(path)
    family = path.parent.name
    quantized, kept = LAYOUTS[family if family != "default" else "qwen3"]
    linears = in_layers(quantized)
    for name in linears:
        assert [each.matches(name) for each in filters].count(True) == 1, name
    if family == "default":
        return
    assert [each.unmatched(linears) for each in filters] == [[]] * len(filters)
    if family not in DENSE:
        for name in in_layers((*kept, *ROUTER)):
            assert not any(each.matches(name) for each in filters), name


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name not in (*DENSE, "default")], ids=ident)
def test_experts_are_quantized_as_engines_load_them(path: Path):
    """Never by one scale for all tokens, all alike, four bits per channel; the linears of a latent one by one."""
    processors = [one for one in load_recipe(path).spec().process if one.type == "linear_quant"]
    owner = {
        name: (processor.qconfig.act, processor.qconfig.weight)
        for processor in processors
        for name in in_layers(LAYOUTS[path.parent.name][0])
        if NameFilter(processor.include, processor.exclude).matches(name)
    }
    experts = [owner[name] for name in owner if ".experts." in name]
    assert len(experts) == len(in_layers([n for n in LAYOUTS[path.parent.name][0] if ".experts." in n]))
    assert all(one == experts[0] for one in experts)
    for act, weight in experts:
        assert act is None or act.scope in ("per_token", "per_block")
        assert weight.scope == ("per_block" if act is not None and act.scope == "per_block" else "per_channel")
    quant_type = path.stem.rpartition("-")[2]
    if quant_type.startswith("w4"):
        four = {name for name, (_, weight) in owner.items() if weight.dtype in ("int4", "mxfp4")}
        assert four == {name for name in owner if ".experts." in name}
    cached = [one.type for one in load_recipe(path).spec().process if one.type in ("dynamic_cache", "fa3_quant")]
    kind = "fa3_quant" if path.parent.name in LATENTS else "dynamic_cache"
    assert cached == [kind] * quant_type.endswith("c8")


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name == "default"], ids=ident)
def test_the_fallbacks_leave_routers_alone(path: Path):
    (processor,) = load_recipe(path).spec().process
    chosen = NameFilter(processor.include, processor.exclude)
    assert not chosen.matches("model.layers.3.mlp.gate")
    assert chosen.matches("model.layers.3.mlp.experts.0.gate_proj")


def test_static_scales_come_after_smoothing():
    """One scale for all tokens is only as good as the outliers are gone."""
    for path in FILES:
        spec = load_recipe(path).spec()
        static = [one for one in spec.process if one.type == "linear_quant" and one.qconfig.act is not None]
        if any(one.qconfig.act.scope == "per_tensor" for one in static):
            assert spec.process[0].type == "iter_smooth", path


def test_every_registered_model_type_reaches_a_practice_without_a_question():
    library = PracticeLibrary([LAB])
    registry = yaml.safe_load(REGISTRY.read_text())
    assert set(registry) == {path.parent.name for path in FILES} - {"default"}
    for pedigree, names in registry.items():
        types = DENSE_TYPES if pedigree in DENSE else TYPES[pedigree]
        assert {one.quant_type for one in library.list() if one.pedigree == pedigree} == types
        for name in names:
            for quant_type in types:
                selection = library.select(pedigree, name, quant_type)
                assert selection.question is None
                assert selection.practice.quant_type == quant_type
    for practice in library.list():
        if practice.pedigree in registry:
            assert list(practice.metadata.verified_model_types) == registry[practice.pedigree]
    assert library.warnings == []


def test_names_are_unique():
    ids = [practice.config_id for practice in PracticeLibrary([LAB]).list()]
    assert len(ids) == len(set(ids)) == len(list(LAB.glob("*/*.yaml"))) > len(FILES)


def test_the_table_of_practices_in_the_documentation():
    rows: dict[str, set[str]] = {}
    for folders, types in re.findall(r"^\| (`.*?`) \| [^|]+ \| (w[^|]+) \|$", DOCUMENTATION.read_text("utf-8"), re.M):
        rows |= {folder: set(types.split(", ")) for folder in re.findall(r"`(\w+)`", folders)}
    assert rows == TYPES | dict.fromkeys(DENSE, DENSE_TYPES)
