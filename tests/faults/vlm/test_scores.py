"""Scoring of what cannot be scored.

A row: what is done to a workplace where all is right, what the command is given, and kind, words, place and way out of
the message.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from typer.testing import CliRunner

MODEL, DATASET = "201 InvalidModelError", "202 InvalidDatasetError"
SCHEMA, UNSUPPORTED = "203 SchemaValidateError", "301 UnsupportedError"
TEXT = "model.language_model.layers"


def scored(w, *given: str) -> None:
    """Let the workplace run ``slim eval``, on pictures with answers."""
    from slim_cli.main import app

    w.list_records(*({"image": name, "answer": "A picture."} for name in ("a.png", "more/b.jpg")))
    arguments = [w.fill(one) for one in given]
    w.run = lambda: CliRunner().invoke(app, ["eval", str(w.model), "--device", "cpu", *arguments])


def nothing(w) -> None:
    pass


def one_layer_less(w) -> None:
    """In the model, after it was quantized."""
    w.configure(
        text_config={**json.loads((w.model / "config.json").read_text())["text_config"], "num_hidden_layers": 2}
    )
    w.change(lambda t: [t.pop(name) for name in list(t) if name.startswith(f"{TEXT}.2.")])


def no_answer(w) -> None:
    w.list_records({"image": "a.png", "answer": "A picture."}, {"image": "a.png"})


SET = ("--dataset", "{folder}/pictures")
SCORES = {
    "text and pictures": (
        nothing,
        (*SET, "--text", "t.txt"),
        SCHEMA,
        "--text and --dataset exclude each other",
        "",
        "score one of them at a time",
    ),
    "neither": (nothing, (), DATASET, "nothing to score", "--dataset", "with --text"),
    "a sample without an answer": (no_answer, SET, DATASET, "the sample has no answer", "{dataset}:2", "add 'answer'"),
    "a folder without a list": (
        lambda w: w.dataset.unlink(),
        SET,
        DATASET,
        "is a folder of pictures without answers",
        "{folder}/pictures",
        "add a .jsonl file",
    ),
    "a broken picture": (
        lambda w: (w.pictures / "a.png").write_bytes(b"?"),
        SET,
        DATASET,
        "neither a JPEG nor a PNG",
        "{dataset}:1",
        "convert it",
    ),
    "texts": (nothing, ("--dataset", "mix_calib.jsonl"), DATASET, "has no 'image'", "mix_calib.jsonl:1", "another set"),
    "a text model": (
        lambda w: w.become_text_model(),
        SET,
        UNSUPPORTED,
        "no installed package can score this kind of model on images",
        "{model}",
        "score language models with --text",
    ),
    "no quantized folder": (
        nothing,
        (*SET, "--quantized", "no"),
        MODEL,
        "there is no quant_model_description.json",
        "no: ",
        "point to a folder that slim quant wrote",
    ),
    "quantized folder of another model": (
        one_layer_less,
        (*SET, "--quantized", "{save}"),
        MODEL,
        f"written for another model: {TEXT}.2.self_attn.q_proj is 64 x 64, in the original not there",
        "{save}",
        "give the folder that was written for this model",
    ),
}


@pytest.mark.parametrize(("fault", "given", "kind", "what", "where", "remedy"), SCORES.values(), ids=SCORES)
def test_scores(workplace, refused, fault: Callable[..., object], given, kind, what, where, remedy) -> None:
    if "{save}" in given:
        assert workplace.run().exit_code == 0
    scored(workplace, *given)
    fault(workplace)
    refused(kind, what, where, remedy)


def test_nothing_is_broken_to_begin_with(workplace) -> None:
    assert workplace.run().exit_code == 0
    scored(workplace, *SET, "--quantized", "{save}")
    scores = workplace.run()
    assert scores.exit_code == 0, scores.output
    assert "top-1 agreement" in scores.stdout
