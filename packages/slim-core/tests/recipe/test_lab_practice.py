"""The practices that ship with Slim."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from slim_core.practices import PracticeLibrary
from slim_core.recipe import NameFilter, dump_recipe, load_recipe

ROOT = Path(__file__).parents[4]
LAB = ROOT / "lab_practice"
REGISTRY = ROOT / "packages/slim-llm/src/slim_llm/models/registry.yaml"

FILES = sorted(LAB.glob("*/*.yaml"))
QUANT_TYPES_HELD = ("w8a8", "w8a16", "w8a8c8", "w8a8s", "w16a16s", "w4a8", "w4a8c8", "w4a4")
LINEARS = [
    f"model.layers.{layer}.{name}"
    for layer in (0, 35)
    for name in (
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    )
]


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
    assert dump_recipe(recipe)


def owners(path: Path) -> list[NameFilter]:
    """What the processors name that take linears."""
    found = [one for one in load_recipe(path).spec().process if one.type in ("linear_quant", "float_sparse")]
    return [NameFilter(one.include, one.exclude) for one in found]


@pytest.mark.parametrize("path", FILES, ids=ident)
def test_every_linear_of_a_dense_model_is_quantized_exactly_once_and_every_pattern_is_used(path: Path):
    filters = owners(path)
    for name in LINEARS:
        assert [each.matches(name) for each in filters].count(True) == 1, name
    if path.parent.name != "default":
        assert [each.unmatched(LINEARS) for each in filters] == [[]] * len(filters)


@pytest.mark.parametrize("path", sorted(LAB.glob("default/*.yaml")), ids=ident)
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
    assert set(registry) == set(library.pedigrees()) - {"default"}
    for pedigree, names in registry.items():
        for name in names:
            for quant_type in QUANT_TYPES_HELD:
                selection = library.select(pedigree, name, quant_type)
                assert selection.question is None
                assert selection.practice.quant_type == quant_type
    for practice in library.list():
        if practice.pedigree != "default":
            assert list(practice.metadata.verified_model_types) == registry[practice.pedigree]
    assert library.warnings == []


def test_names_are_unique():
    ids = [practice.config_id for practice in PracticeLibrary([LAB]).list()]
    assert len(ids) == len(set(ids)) == len(FILES)
