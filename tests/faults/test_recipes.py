"""Recipes that ask for what is not there. A row: what is done to a good one, and kind, words, place and way out."""

from __future__ import annotations

from collections.abc import Callable

import pytest

SCHEMA, SECURITY, UNSUPPORTED = "203 SchemaValidateError", "204 SecurityError", "301 UnsupportedError"
PROCESS = "spec.process[0]"


def edit(old: str, new: str) -> Callable[..., None]:
    """Replace a part of the good recipe."""
    return lambda w: w.edit(old, new)


MISSPELT = {
    "top level": (
        edit("metadata:", "metdata:"),
        SCHEMA,
        "unknown top-level key",
        "{recipe}:2: metdata",
        "did you mean 'metadata'",
    ),
    "metadata": (
        edit("config_id:", "config_ids:"),
        SCHEMA,
        "unknown field",
        "{recipe}:3: metadata.config_ids",
        "did you mean 'config_id'",
    ),
    "spec": (
        edit("  process:", "  proces:"),
        SCHEMA,
        "unknown field",
        "{recipe}:8: spec.proces",
        "did you mean 'process'",
    ),
    "process": (
        edit("include:", "includes:"),
        SCHEMA,
        "unknown field",
        f"{{recipe}}:22: {PROCESS}.includes",
        "did you mean 'include'",
    ),
    "qconfig": (
        edit("        weight:", "        weights:"),
        SCHEMA,
        "unknown field | required field is missing",
        f"{{recipe}}:17: {PROCESS}.qconfig.weights",
        "did you mean 'weight'",
    ),
    "act": (
        edit("symmetric: false", "symetric: false"),
        SCHEMA,
        "unknown field",
        f"{{recipe}}:14: {PROCESS}.qconfig.act.symetric",
        "did you mean 'symmetric'",
    ),
    "ext": (
        edit("aggregation_type: max", "agregation_type: max"),
        SCHEMA,
        "unknown field",
        f"{{recipe}}:16: {PROCESS}.qconfig.act.ext.agregation_type",
        "did you mean 'aggregation_type'",
    ),
    "save": (
        edit("part_file_size", "part-file-sizes"),
        SCHEMA,
        "unknown field",
        "{recipe}:26: spec.save[0].part-file-sizes",
        "did you mean 'part_file_size'",
    ),
    "dataset": (
        edit("max_length", "maxlength"),
        SCHEMA,
        "unknown field",
        "{recipe}:29: spec.dataset.maxlength",
        "did you mean 'max_length'",
    ),
}

VALUES = {
    "quoted boolean": (
        edit("symmetric: true", 'symmetric: "true"'),
        SCHEMA,
        "got 'true'",
        f"{{recipe}}:20: {PROCESS}.qconfig.weight.symmetric",
        "without quotes",
    ),
    "boolean for a number": (
        edit("part_file_size: 4", "part_file_size: true"),
        SCHEMA,
        "not true or false",
        "{recipe}:26: spec.save[0].part_file_size",
        "must be a number",
    ),
    "word for a number": (
        edit("part_file_size: 4", "part_file_size: large"),
        SCHEMA,
        "got 'large'",
        "{recipe}:26: spec.save[0].part_file_size",
        "must be a valid integer",
    ),
    "negative size": (
        edit("part_file_size: 4", "part_file_size: -1"),
        SCHEMA,
        "got -1",
        "{recipe}:26: spec.save[0].part_file_size",
        "greater than or equal to 0",
    ),
    "nothing for a number": (
        edit("part_file_size: 4", "part_file_size:"),
        SCHEMA,
        "got nothing",
        "{recipe}:26: spec.save[0].part_file_size",
        "must be a valid integer",
    ),
    "score of nan": (
        edit("score: 50", "score: .nan"),
        SCHEMA,
        "got nan",
        "{recipe}:4: metadata.score",
        "must be",
    ),
    "batch size of zero": (
        edit("max_length: 32", "batch_size: 0"),
        SCHEMA,
        "got 0",
        "{recipe}:29: spec.dataset.batch_size",
        "greater than or equal to 1",
    ),
    "empty dataset path": (
        edit("  dataset:\n    path: ", '  dataset:\n    path: "" # '),
        SCHEMA,
        "got ''",
        "{recipe}:28: spec.dataset.path",
        "at least 1 character",
    ),
    "list for a mapping": (
        edit("      qconfig:\n", "      qconfig: []\n      unused:\n"),
        SCHEMA,
        "got a list",
        f"{{recipe}}:10: {PROCESS}.qconfig",
        "must be a mapping",
    ),
    "mapping for a list": (
        edit("    - type: linear_quant\n      qconfig:", "      type: linear_quant\n      qconfig:"),
        SCHEMA,
        "got a mapping",
        "{recipe}:8: spec.process",
        "must be a list",
    ),
    "word for a list": (
        edit('include: ["*"]', 'include: "*"'),
        SCHEMA,
        "got '*'",
        f"{{recipe}}:22: {PROCESS}.include",
        "must be a list",
    ),
    "unknown scope": (
        edit("scope: per_tensor", "scope: per_tensr"),
        SCHEMA,
        "got 'per_tensr'",
        f"{{recipe}}:13: {PROCESS}.qconfig.act.scope",
        "did you mean 'per_tensor'",
    ),
    "unknown dtype": (
        edit(
            "          dtype: int8\n          scope: per_channel", "          dtype: int9\n          scope: per_channel"
        ),
        SCHEMA,
        "got 'int9'",
        f"{{recipe}}:18: {PROCESS}.qconfig.weight.dtype",
        "did you mean 'int8'",
    ),
    "unknown method": (
        edit("method: minmax\n      include", "method: minmx\n      include"),
        SCHEMA,
        "got 'minmx'",
        f"{{recipe}}:21: {PROCESS}.qconfig.weight.method",
        "did you mean 'minmax'",
    ),
    "unknown runner": (
        edit("runner: layer_wise", "runner: layerwise"),
        SCHEMA,
        "got 'layerwise'",
        "{recipe}:7: spec.runner",
        "did you mean 'layer_wise'",
    ),
    "unknown processor": (
        edit("type: linear_quant", "type: linear_quan"),
        SCHEMA,
        "got 'linear_quan'",
        f"{{recipe}}:9: {PROCESS}.type",
        "did you mean 'linear_quant'",
    ),
    "unknown saver": (
        edit("type: ascendv1_saver", "type: ascend_saver"),
        SCHEMA,
        "got 'ascend_saver'",
        "{recipe}:25: spec.save[0].type",
        "did you mean 'ascendv1_saver'",
    ),
    "processor without a type": (
        edit("type: linear_quant", "name: linear_quant"),
        SCHEMA,
        "required field is missing",
        f"{PROCESS}.type",
        "linear_quant",
    ),
    "processor is a name": (
        edit("    - type: linear_quant\n", "    - linear_quant\n    - type: linear_quant\n"),
        SCHEMA,
        "must be a mapping",
        f"{{recipe}}:9: {PROCESS}",
        "check the indentation",
    ),
    "weight left out": (
        edit("        weight:\n", "        act2:\n"),
        SCHEMA,
        "required field is missing",
        f"{PROCESS}.qconfig.weight",
        "fields: act, weight",
    ),
    "group of nobody": (
        edit("    - type: linear_quant\n", "    - {type: group, configs: []}\n    - type: linear_quant\n"),
        SCHEMA,
        "at least 1 item",
        f"{{recipe}}:9: {PROCESS}.configs",
        "must have",
    ),
    "fault inside a group": (
        edit(
            "    - type: linear_quant\n",
            "    - type: group\n      configs:\n        - {type: linear_quant, qconfig: {weight: {bits: 8}}}\n"
            "    - type: linear_quant\n",
        ),
        SCHEMA,
        "unknown field",
        f"{{recipe}}:11: {PROCESS}.configs[0].qconfig.weight.bits",
        "fields: dtype",
    ),
    "open brace": (
        edit('"*.down_proj"', '"*.{q,k"'),
        SCHEMA,
        "'{{' at character 3",
        f"{{recipe}}:23: {PROCESS}.exclude[0]",
        "is never closed",
    ),
    "open bracket": (
        edit('"*.down_proj"', '"*.[abc"'),
        SCHEMA,
        "'['",
        f"{{recipe}}:23: {PROCESS}.exclude[0]",
        "is never closed",
    ),
    "empty pattern": (
        edit('"*.down_proj"', '""'),
        SCHEMA,
        "the pattern is empty",
        f"{{recipe}}:23: {PROCESS}.exclude[0]",
        "empty",
    ),
    "endless pattern": (
        edit('"*.down_proj"', "a" * 201),
        SCHEMA,
        "201 characters",
        f"{{recipe}}:23: {PROCESS}.exclude[0]",
        "at most 200",
    ),
    "brace bomb": (
        edit('"*.down_proj"', '"{0..99}{0..99}{0..99}"'),
        SCHEMA,
        "alternatives",
        f"{{recipe}}:23: {PROCESS}.exclude[0]",
        "1000",
    ),
}

UNAVAILABLE = {
    "asymmetric per_token": (
        edit("scope: per_tensor", "scope: per_token"),
        SCHEMA,
        "no layer has activations int8 per_token asymmetric",
        f"{{recipe}}:9: {PROCESS}",
        "nearest legal pair is act int8 per_token symmetric",
    ),
    "per_group": (
        edit("scope: per_channel", "scope: per_group"),
        SCHEMA,
        "int8 per_group symmetric",
        f"{{recipe}}:9: {PROCESS}",
        "nearest legal pair",
    ),
    "four bits": (
        edit("dtype: int8\n          scope: per_channel", "dtype: int4\n          scope: per_channel"),
        SCHEMA,
        "int4 per_channel symmetric",
        f"{{recipe}}:9: {PROCESS}",
        "nearest legal pair",
    ),
    "a method of another scheme": (
        edit("method: minmax\n      include", "method: ceil_x\n      include"),
        SCHEMA,
        "method 'ceil_x' is not available",
        f"{{recipe}}:9: {PROCESS}",
        "use 'minmax' or 'ssz'",
    ),
    "a processor to come": (
        edit("type: linear_quant", "type: flatquant"),
        SCHEMA,
        "no installed package provides the processor 'flatquant'",
        f"{{recipe}}:9: {PROCESS}.type",
        "installed: adapt_rotation, autoround_quant",
    ),
    "a saver to come": (
        edit("type: ascendv1_saver", "type: compressed_tensors"),
        SCHEMA,
        "no installed package provides the saver 'compressed_tensors'",
        "{recipe}:25: spec.save[0].type",
        "installed: ascendv1_saver",
    ),
    "prior stage": (
        edit("  save:", "  prior:\n    - process: [{type: linear_quant, qconfig: {weight: {}}}]\n  save:"),
        UNSUPPORTED,
        "linear_quant learns nothing",
        "spec.prior[0].process[0]",
        "move it to process",
    ),
    "two savers": (
        edit("  save:\n", "  save:\n    - type: ascendv1_saver\n"),
        UNSUPPORTED,
        "2 savers are given",
        "spec.save",
        "give one saver",
    ),
    "no saver": (
        edit("  save:\n    - type: ascendv1_saver\n      part_file_size: 4\n", "  save: []\n"),
        UNSUPPORTED,
        "0 savers are given",
        "spec.save",
        "give one saver",
    ),
    "unknown apiversion": (
        edit("modelslim_v1", "modelslim_v2"),
        UNSUPPORTED,
        "unknown apiversion 'modelslim_v2'",
        "{recipe}: apiversion",
        "did you mean 'modelslim_v1'",
    ),
    "apiversion of another tool": (
        edit("modelslim_v1", "apps/v1"),
        UNSUPPORTED,
        "unknown apiversion 'apps/v1'",
        "{recipe}: apiversion",
        "known: modelslim_v0, modelslim_v1",
    ),
    "modelslim_v0": (
        edit("modelslim_v1", "modelslim_v0"),
        SCHEMA,
        "unknown field",
        "{recipe}:8: spec.process",
        "fields: anti_cfg, anti_params, calib_cfg",
    ),
    "diffusion": (
        edit("modelslim_v1", "multimodal_sd_modelslim_v1"),
        SCHEMA,
        "diffusion models are calibrated on what their own pipeline is given",
        "{recipe}:27: spec.dataset",
        "leave dataset out",
    ),
}

TABLES = {"misspelt": MISSPELT, "value": VALUES, "unavailable": UNAVAILABLE}
ROWS = [pytest.param(*row, id=f"{table}: {name}") for table, rows in TABLES.items() for name, row in rows.items()]


@pytest.mark.parametrize(("fault", "kind", "what", "where", "remedy"), ROWS)
def test_broken_recipe(workplace, refused, fault: Callable[..., object], kind, what, where, remedy) -> None:
    fault(workplace)
    refused(kind, what, where, remedy)
