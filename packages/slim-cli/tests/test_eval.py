"""`slim eval`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def test_eval_scores_both(slim, quant, model: Path, tmp_path: Path) -> None:
    assert slim(*quant()).exit_code == 0
    text, scores = tmp_path / "text.txt", tmp_path / "scores.json"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    found = slim(
        *("eval", model, "--quantized", tmp_path / "out", "--text", text, "--json", scores),
        *("--device", "cpu", "--sequence-length", 64, "--max_windows", 2),
    )
    assert found.exit_code == 0, found.output
    header, perplexity, *rest = found.stdout.splitlines()
    assert header.split() == ["original", "quantized"]
    assert perplexity.split()[0] == "perplexity"
    measures = ["ratio", "KL divergence (nats)", "top-1 agreement", "logits SQNR (dB)", "tokens"]
    assert [line.split("  ")[0] for line in rest] == measures
    written = json.loads(scores.read_text())
    assert written["tokens"] == 126
    assert written["ratio"] == pytest.approx(written["quantized_perplexity"] / written["perplexity"])


def test_eval_of_the_original_alone(slim, model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("One sentence is enough for a number.")
    found = slim("eval", model, "--text", text, "--device", "cpu")
    assert found.exit_code == 0, found.output
    assert "quantized" not in found.stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "error 202 InvalidDatasetError: --text: no text to score"),
        (["--sequence_length", "3"], "error 203 SchemaValidateError: --sequence_length: got 3"),
    ],
)
def test_eval_errors(slim, model: Path, arguments: list[str], line: str) -> None:
    found = slim("eval", model, "--device", "cpu", *arguments)
    assert found.exit_code == 1
    assert line in found.stderr


def test_eval_of_an_unknown_kind_of_model(slim, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    found = slim("eval", tmp_path)
    assert found.exit_code == 1
    assert "error 301 UnsupportedError: " in found.stderr
    assert "no installed package can score this kind of model" in found.stderr
    assert "error 201 InvalidModelError: " in slim("eval", tmp_path / "nowhere").stderr
