"""Recipes: YAML in, validated and immutable configuration out. Imports no torch."""

from slim_core.recipe.base import Flag, Integer, Number, Phase, ProcessorConfig, SaverConfig, StrictModel
from slim_core.recipe.json_schema import recipe_json_schema
from slim_core.recipe.layer_wise import LayerWiseSpec
from slim_core.recipe.load import Recipe, dump_recipe, dump_yaml, load_recipe, recipe_from_dict
from slim_core.recipe.patterns import Exclude, Include, NameFilter, NamePattern, escape_pattern
from slim_core.recipe.plugins import (
    AnyProcessor,
    AnySaver,
    forget_plugins,
    plugin_names,
    processor_class,
    saver_class,
)
from slim_core.recipe.qconfig import ActConfig, DType, LinearQConfig, QConfig, Scope, WeightConfig
from slim_core.recipe.schema import Dataset, DatasetConfig, Metadata, PriorStage, SpecV1, spec_model
from slim_core.recipe.yaml_source import Document, Location, read_yaml

__all__ = [
    "ActConfig",
    "AnyProcessor",
    "AnySaver",
    "DType",
    "Dataset",
    "DatasetConfig",
    "Document",
    "Exclude",
    "Flag",
    "Include",
    "Integer",
    "LayerWiseSpec",
    "LinearQConfig",
    "Location",
    "Metadata",
    "NameFilter",
    "NamePattern",
    "Number",
    "Phase",
    "PriorStage",
    "ProcessorConfig",
    "QConfig",
    "Recipe",
    "SaverConfig",
    "Scope",
    "SpecV1",
    "StrictModel",
    "WeightConfig",
    "dump_recipe",
    "dump_yaml",
    "escape_pattern",
    "forget_plugins",
    "load_recipe",
    "plugin_names",
    "processor_class",
    "read_yaml",
    "recipe_from_dict",
    "recipe_json_schema",
    "saver_class",
    "spec_model",
]
