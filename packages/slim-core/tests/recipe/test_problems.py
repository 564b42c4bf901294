"""Broken recipes: every problem is said with its line, its field and what would be right."""

from __future__ import annotations

import pytest

from slim_core.errors import SchemaValidateError
from slim_core.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("install")


def head(spec: str) -> str:
    return "apiversion: modelslim_v1\nspec:\n" + spec


LINEAR = "  process:\n  - type: linear_quant\n    qconfig:\n"  # lines 3 to 5

BROKEN = {
    "no apiversion": ("spec: {}\n", [":1: apiversion is missing (add `apiversion: modelslim_v1`)"]),
    "empty apiversion": ("metadata: {}\napiversion:\nspec: {}\n", [":2: apiversion is empty"]),
    "apiversion number": ("apiversion: 1\nspec: {}\n", [":1: apiversion: got 1; must be a string"]),
    "no spec": ("apiversion: modelslim_v1\n", [":1: spec is missing (add `spec:`"]),
    "empty spec": ("apiversion: modelslim_v1\nspec:\n", [":2: spec is empty"]),
    "spec list": ("apiversion: modelslim_v1\nspec: [a]\n", [":2: spec: got a list; must be a mapping"]),
    "metdata": (
        "apiversion: modelslim_v1\nspec: {}\nmetdata: {}\n",
        [":3: metdata: unknown top-level key; did you mean 'metadata'? (or rename 'metdata')"],
    ),
    "spek": ("apiversion: modelslim_v1\nspek: {}\n", [":2: spek: unknown top-level key; did you mean 'spec'?"]),
    "apiVersion": (
        "apiVersion: modelslim_v1\nspec: {}\n",
        [":1: apiVersion: unknown top-level key; did you mean 'api"],
    ),
    "api_version": (
        "api_version: modelslim_v1\nspec: {}\n",
        [":1: api_version: unknown top-level key; did you mean 'apiversion'?"],
    ),
    "metadata list": ("apiversion: v\nmetadata: []\nspec: {}\n", [":2: metadata: got a list; must be a mapping"]),
    "score": (
        "apiversion: v\nmetadata:\n  score: -1\nspec: {}\n",
        [":3: metadata.score: got -1; must be greater than or"],
    ),
    "config id": (
        "apiversion: v\nmetadata:\n  config_id: 7\nspec: {}\n",
        [":3: metadata.config_id: got 7; must be a va"],
    ),
    "long config id": (
        f"apiversion: v\nmetadata:\n  config_id: {'x' * 201}\nspec: {{}}\n",
        [":3: metadata.config_id: got 'xxx", "must have at most 200 characters"],
    ),
    "label": (
        'apiversion: v\nmetadata:\n  label:\n    kv_cache: "False"\nspec: {}\n',
        [":4: metadata.label.kv_cache: got 'False'; must be a valid boolean"],
    ),
    "metadata field": (
        "apiversion: v\nmetadata:\n  config-id: a\nspec: {}\n",
        [":3: metadata.config-id: unknown field; did you mean 'config_id'? (fields: config_id, score, label,"],
    ),
    "verified tags": (
        "apiversion: v\nmetadata:\n  verified_tags:\n    Qwen3-32B: [MindIE]\nspec: {}\n",
        [":4: metadata.verified_tags.Qwen3-32B[0]: got 'MindIE'; must be a list"],
    ),
    "runner": (
        head("  runner: layerwise\n"),
        [":3: spec.runner: got 'layerwise'; allowed: auto, layer_wise, dp_layer_wise, model_wise; did you mean"],
    ),
    "spec field": (
        head("  proces: []\n"),
        [":3: spec.proces: unknown field; did you mean 'process'? (fields: runner, "],
    ),
    "process mapping": (head("  process: {type: group}\n"), [":3: spec.process: got a mapping; must be a list"]),
    "process item": (
        head("  process:\n    - linear_quant\n"),
        [":4: spec.process[0]: got 'linear_quant'; must be a mapping that starts with `type:`; check the indentation"],
    ),
    "no type": (
        head("  process:\n    - qconfig: {}\n"),
        [":4: spec.process[0].type: required field is missing; group, iter_smooth, linear_quant"],
    ),
    "type": (
        head("  process:\n    - type: linear_qaunt\n"),
        [
            ":4: spec.process[0].type: got 'linear_qaunt'; installed processors: group, iter_smooth, linear_quant; "
            "did you mean 'linear_quant'?"
        ],
    ),
    "type number": (head("  process:\n    - type: 1\n"), [":4: spec.process[0].type: must be a string"]),
    "type of the protocol": (
        head("  process:\n    - type: quarot\n"),
        [":4: spec.process[0].type: no installed package provides the processor 'quarot'; installed: group,"],
    ),
    "saver": (
        head("  save:\n    - type: ascend_v1_saver\n"),
        [":4: spec.save[0].type: got 'ascend_v1_saver'; installed savers: ascendv1_saver; did you mean 'asc"],
    ),
    "processor as saver": (
        head("  save:\n    - type: group\n"),
        [":4: spec.save[0].type: got 'group'; installed savers"],
    ),
    "saver size": (
        head("  save:\n    - type: ascendv1_saver\n      part_file_size: -1\n"),
        [":5: spec.save[0].part_file_size: got -1; must be greater than or equal to 0"],
    ),
    "size as flag": (
        head("  save:\n    - type: ascendv1_saver\n      part_file_size: true\n"),
        [":5: spec.save[0].part_file_size: got True; must be a number, not true or false"],
    ),
    "size in fractions": (
        head("  save:\n    - type: ascendv1_saver\n      part_file_size: 1.5\n"),
        [":5: spec.save[0].part_file_size: got 1.5; must be a valid integer"],
    ),
    "dtype": (
        head(LINEAR + "      act:\n        dtype: int9\n      weight: {}\n"),
        [
            ":7: spec.process[0].qconfig.act.dtype: got 'int9'; allowed: float, int8, int4, mxfp8, mxfp4, fp8_e4m3; "
            "did you mean 'int8'?"
        ],
    ),
    "scope": (
        head(LINEAR + "      weight:\n        scope: per-channel\n"),
        [":7: spec.process[0].qconfig.weight.scope: got 'per-channel'; allowed: ", "did you mean 'per_channel'?"],
    ),
    "method": (
        head(LINEAR + "      weight:\n        method: minimax\n"),
        [":7: spec.process[0].qconfig.weight.method: got 'minimax'; allowed: none, minmax, ", "did you mean 'minmax'?"],
    ),
    "symmetric": (
        head(LINEAR + '      weight:\n        symmetric: "False"\n'),
        [":7: spec.process[0].qconfig.weight.symmetric: got 'False'; must be true or false, without quotes"],
    ),
    "weight": (head(LINEAR + "      act: {}\n"), [":5: spec.process[0].qconfig.weight: required field is missing"]),
    "qconfig": (
        head("  process:\n  - type: linear_quant\n"),
        [":4: spec.process[0].qconfig: required field is missing"],
    ),
    "qconfig field": (
        head(LINEAR + "      weights: {}\n      weight: {}\n"),
        [":6: spec.process[0].qconfig.weights: unknown field; did you mean 'weight'? (fields: act, weight)"],
    ),
    "weight field": (
        head(LINEAR + "      weight:\n        symetric: true\n"),
        [":7: spec.process[0].qconfig.weight.symetric: unknown field; did you mean 'symmetric'? (fields: dtype, scope"],
    ),
    "act list": (
        head(LINEAR + "      weight: {}\n      act: [int8]\n"),
        [":7: spec.process[0].qconfig.act: got a list; must be a mapping"],
    ),
    "ext": (
        head(LINEAR + "      weight:\n        method: gptq\n        ext:\n          percdmp: 0.1\n"),
        [":9: spec.process[0].qconfig.weight.ext.percdmp: unknown field; did you mean 'percdamp'? (fields: agg"],
    ),
    "ext value": (
        head(LINEAR + "      weight:\n        method: gptq\n        ext:\n          percdamp: much\n"),
        [":9: spec.process[0].qconfig.weight.ext.percdamp: got 'much'; must be a valid number"],
    ),
    "pattern": (
        head("  process:\n  - type: linear_quant\n    qconfig: {weight: {}}\n    include: ['*', '*.{q,k_proj']\n"),
        [":6: spec.process[0].include[1]: '{' at character 3 of '*.{q,k_proj' is never closed"],
    ),
    "include text": (
        head('  process:\n  - type: linear_quant\n    qconfig: {weight: {}}\n    include: "*"\n'),
        [":6: spec.process[0].include: got '*'; must be a list"],
    ),
    "processor field": (
        head("  process:\n  - type: linear_quant\n    qconfig: {weight: {}}\n    excludes: []\n"),
        [":6: spec.process[0].excludes: unknown field; did you mean 'exclude'? (fields: type, qconfig, inc"],
    ),
    "inside a group": (
        head(
            "  process:\n  - type: group\n    configs:\n    - type: linear_quant\n      qconfig:\n        weight:\n"
            "          dtype: int9\n          dtyp: int8\n"
        ),
        [
            ":9: spec.process[0].configs[0].qconfig.weight.dtype: got 'int9'",
            ":10: spec.process[0].configs[0].qconfig.weight.dtyp: unknown field; did you mean 'dtype'?",
        ],
    ),
    "type inside a group": (
        head(
            "  process:\n  - type: group\n    configs:\n    - type: linear_quant\n      qconfig: {weight: {}}\n    - {}"
        ),
        [":8: spec.process[0].configs[1].type: required field is missing"],
    ),
    "empty group": (
        head("  process:\n  - type: group\n    configs: []\n"),
        [":5: spec.process[0].configs: got a list; must have at least 1 item, not 0"],
    ),
    "through an alias": (
        "apiversion: v\nq: &q\n  weight:\n    dtype: int7\nspec:\n  process:\n  - type: linear_quant\n    qconfig: *q",
        [":4: spec.process[0].qconfig.weight.dtype: got 'int7'"],
    ),
    "number": (
        head("  process:\n  - type: iter_smooth\n    alpha: 1.5\n    scale_min: tiny\n    steps: 2.5\n"),
        [
            ":5: spec.process[0].alpha: got 1.5; must be less than or equal to 1",
            ":6: spec.process[0].scale_min: got 'tiny'; must be a valid number",
            ":7: spec.process[0].steps: got 2.5; must be a valid integer",
        ],
    ),
    "not a number": (
        head("  process:\n  - type: iter_smooth\n    alpha: .nan\n"),
        [":5: spec.process[0].alpha: got nan; must be a finite number"],
    ),
    "flag as number": (
        head("  process:\n  - type: iter_smooth\n    symmetric: 1\n"),
        [":5: spec.process[0].symmetric: got 1; must be true or false"],
    ),
    "union": (
        head("  process:\n  - type: iter_smooth\n    limit: many\n"),
        [
            ":5: spec.process[0].limit: got 'many'; must be a valid integer",
            ":5: spec.process[0].limit: got 'many'; must be",
        ],
    ),
    "choice in a list": (
        head("  process:\n  - type: iter_smooth\n    enable_subgraph_type:\n    - ov\n    - norm_linear\n"),
        [
            ":7: spec.process[0].enable_subgraph_type[1]: got 'norm_linear'; allowed: norm-linear, linear-linear, ov, "
            "up-down; did you mean 'norm-linear'?"
        ],
    ),
    "dataset": (head("  dataset: [a]\n"), [":3: spec.dataset: got a list; must be a mapping"]),
    "dataset name": (head("  dataset: ''\n"), [":3: spec.dataset: got ''; must have at least 1 character"]),
    "dataset field": (
        head("  dataset:\n    path: a\n    max_len: 4\n"),
        [":5: spec.dataset.max_len: unknown field; did you mean 'max_length'?"],
    ),
    "dataset number": (
        head("  dataset:\n    path: a\n    num_samples: 0\n"),
        [":5: spec.dataset.num_samples: got 0; must be greater than or equal to 1"],
    ),
    "dataset quota": (
        head("  dataset:\n    path: a\n    min_tokens_per_expert: -1\n    extra_share: -0.1\n"),
        [
            ":5: spec.dataset.min_tokens_per_expert: got -1; must be greater than or equal to 0",
            ":6: spec.dataset.extra_share: got -0.1; must be greater than or equal to 0",
        ],
    ),
    "dataset routing": (
        head("  dataset:\n    path: a\n    route_starved_experts: true\n"),
        [":3: spec.dataset: route_starved_experts needs min_tokens_per_expert, a number above 0"],
    ),
    "quota of a stage": (
        head("  prior:\n  - process: []\n    dataset:\n      path: a\n      min_tokens_per_expert: 4\n"),
        [":5: spec.prior[0].dataset: min_tokens_per_expert is met in the main stage; give it in spec.dataset"],
    ),
    "dataset path": (head("  dataset:\n    num_samples: 1\n"), [":3: spec.dataset.path: required field is missing"]),
    "prior": (
        head("  prior:\n  - process:\n    - type: iter_smooth\n      alpha: 7\n    data: b\n"),
        [":6: spec.prior[0].process[0].alpha: got 7", ":7: spec.prior[0].data: unknown field; did you mean 'dataset'?"],
    ),
    "search interval": (
        head(LINEAR + "      weight:\n        method: ceil_x\n        ext: {search_max: 5}\n"),
        [":6: spec.process[0].qconfig.weight: ext.search_max (5.0) must exceed ext.search_min (6)"],
    ),
}


@pytest.mark.parametrize(("text", "messages"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_recipes(write, text, messages):
    path = write(text)
    with pytest.raises(SchemaValidateError) as caught:
        load_recipe(path).spec()
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{path}:") for line in lines)
    for message in messages:
        assert any(message in line for line in lines), str(caught.value)
    wanted = [message for message in messages if message.startswith(":")]
    assert len(lines) == len(wanted), str(caught.value)


def test_all_problems_are_listed_in_the_order_of_the_lines(write):
    text = head(
        "  save:\n  - type: nope\n  runner: slow\n  process:\n  - type: nope\n  - type: iter_smooth\n    alpha: 2\n"
    )
    with pytest.raises(SchemaValidateError) as caught:
        load_recipe(write(text)).spec()
    numbers = [int(line.split(":")[1]) for line in str(caught.value).splitlines()]
    assert numbers == [4, 5, 7, 9]
