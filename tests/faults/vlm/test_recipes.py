"""Recipes for vision-language models that ask for what is not there.

A row: what is done to a workplace where all is right, and kind, words, place and way out of the message.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

DATASET, SCHEMA = "202 InvalidDatasetError", "203 SchemaValidateError"
UNSUPPORTED = "301 UnsupportedError"


def edit(old: str, new: str) -> Callable[..., None]:
    """Replace a part of the good recipe."""
    return lambda w: w.edit(old, new)


def set_as(fields: str) -> Callable[..., None]:
    return lambda w: w.edit(f"dataset: {w.pictures}", f"dataset: {{path: {w.pictures}, {fields}}}")


PRIOR = """\
    - {type: adapt_rotation, stage: 2}
  prior:
    - process: [{type: adapt_rotation, stage: 1, steps: 1}]
      dataset: mix_calib.jsonl
"""


def prior(text: str) -> Callable[..., None]:
    """A stage ahead that learns from a set of its own."""
    rotation, stage = text.split("\n", 1)

    def change(w) -> None:
        w.edit("  process:\n", f"  process:\n{rotation}\n")
        w.edit("  save:\n", f"{stage}  save:\n")

    return change


PROMPT = "{recipe}:12: spec.default_text"
RECIPES = {
    "empty prompt": (edit('"What is this?"', '""'), SCHEMA, "got ''; must not be empty", PROMPT, "leave it out"),
    "blank prompt": (edit('"What is this?"', '" "'), SCHEMA, "got ' '; must not be empty", PROMPT, "leave it out"),
    "prompt is a number": (edit('"What is this?"', "7"), SCHEMA, "must be a valid string", PROMPT, "got 7"),
    "max_length": (
        set_as("max_length: 64"),
        SCHEMA,
        "got 64; it would cut through the tokens of an image",
        "{recipe}:11: spec.dataset.max_length",
        "leave it out",
    ),
    "batch_size": (
        set_as("batch_size: 2"),
        SCHEMA,
        "got 2; must be 1",
        "{recipe}:11: spec.dataset.batch_size",
        "one runs at a time",
    ),
    "unknown field": (
        edit("default_text", "default_txt"),
        SCHEMA,
        "unknown field",
        "{recipe}:12: spec.default_txt",
        "did you mean 'default_text'?",
    ),
    "unknown field of the set": (
        set_as("num_sample: 2"),
        SCHEMA,
        "unknown field",
        "{recipe}:11: spec.dataset.num_sample",
        "did you mean 'num_samples'?",
    ),
    "runner": (
        edit("  process:", "  runner: layerwise\n  process:"),
        SCHEMA,
        "got 'layerwise'; allowed: auto, layer_wise, dp_layer_wise, model_wise",
        "{recipe}:3: spec.runner",
        "did you mean 'layer_wise'?",
    ),
    "runner is no name": (
        edit("  process:", "  runner: [auto]\n  process:"),
        SCHEMA,
        "got a list",
        "{recipe}:3: spec.runner",
        "allowed: auto, layer_wise",
    ),
    "prior with texts": (prior(PRIOR), DATASET, "has no 'image'", "mix_calib.jsonl:1", "take another set"),
    "prior with max_length": (
        prior(PRIOR.replace("mix_calib.jsonl", "{path: calibImages, max_length: 9}")),
        SCHEMA,
        "got 9; it would cut through",
        "{recipe}:12: spec.prior[0].dataset.max_length",
        "leave it out",
    ),
    "of a text model": (
        lambda w: w.become_text_model(),
        UNSUPPORTED,
        "does not know model_type 'qwen3' as a vision-language model",
        "{model}/config.json",
        "it is a language model, which recipes of modelslim_v1 quantize",
    ),
    "of modelslim_v1": (
        lambda w: (
            w.edit("multimodal_vlm_modelslim_v1", "modelslim_v1"),
            w.edit('  default_text: "What is this?"\n', ""),
        ),
        UNSUPPORTED,
        "does not know model_type 'qwen3_vl' as a causal language model",
        "{model}/config.json",
        "it is a vision-language model, which recipes of multimodal_vlm_modelslim_v1 quantize",
    ),
    "of modelslim_v1, with a prompt": (
        edit("multimodal_vlm_modelslim_v1", "modelslim_v1"),
        SCHEMA,
        "unknown field",
        PROMPT,
        "fields: runner, process, save",
    ),
}


@pytest.mark.parametrize(("fault", "kind", "what", "where", "remedy"), RECIPES.values(), ids=RECIPES)
def test_recipes(workplace, refused, fault: Callable[..., object], kind, what, where, remedy) -> None:
    workplace.fill_save()
    fault(workplace)
    refused(kind, what, where, remedy, "--overwrite")
