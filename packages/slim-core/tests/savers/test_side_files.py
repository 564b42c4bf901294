"""What is copied beside the weights, and how it is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slim_core.savers.side_files import copy_side_files, write_json

COPIED = {
    "tokenizer.json",
    "merges.txt",
    "modeling_x.py",
    "chat_template.jinja",
    "tokenizer.model",
    "qwen.tiktoken",
    "generation_config.json",
}
LEFT = {
    "model.safetensors",
    "model.safetensors.index.json",
    "quant_model_weights.safetensors.index.json",
    "quant_model_description.json",
    "quant_model_description_w8a8.json",
    "pytorch_model.bin",
    "report.json",
    "report.html",
    "README.md",
    ".gitattributes",
    "x_best_practice.yaml",
}


def folders(tmp_path: Path) -> tuple[Path, Path]:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    return source, target


def test_which_files_are_copied(tmp_path: Path) -> None:
    source, target = folders(tmp_path)
    for name in COPIED | LEFT:
        (source / name).write_bytes(b"\x00\xff" + name.encode())
        (source / name).chmod(0o644)
    (source / "folder.json").mkdir()
    (source / "folder.json" / "inner.json").write_text("{}")
    copy_side_files(source, target)
    assert {path.name for path in target.iterdir()} == COPIED
    for path in target.iterdir():
        assert path.read_bytes() == (source / path.name).read_bytes()
        assert path.stat().st_mode & 0o777 == 0o600


def test_links_are_followed(tmp_path: Path) -> None:
    source, target = folders(tmp_path)
    (tmp_path / "blob").write_text("{}")
    (source / "tokenizer.json").symlink_to(tmp_path / "blob")
    copy_side_files(source, target)
    assert not (target / "tokenizer.json").is_symlink()
    assert (target / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("config", "written"),
    [
        ({"a": 1, "quantization_config": {"quant_method": "fp8"}}, {"a": 1}),
        ({"text_config": {"b": 2, "quantization_config": {}}}, {"text_config": {"b": 2}}),
        ({"quantization_config": {"x": 1}, "text_config": {"quantization_config": {"x": 1}}}, {"text_config": {}}),
    ],
)
def test_the_configuration_loses_what_describes_the_source(tmp_path: Path, config: object, written: object) -> None:
    source, target = folders(tmp_path)
    (source / "config.json").write_text(json.dumps(config))
    copy_side_files(source, target)
    assert (target / "config.json").read_text() == json.dumps(written, indent=2)
    assert (target / "config.json").stat().st_mode & 0o777 == 0o600


def test_other_configurations_are_copied_byte_for_byte(tmp_path: Path) -> None:
    source, target = folders(tmp_path)
    text = '{"a":   1, "text_config": {"b": "\u00e9"}, "name": "\\u00e9"}\n\n'
    (source / "config.json").write_text(text, "utf-8")
    copy_side_files(source, target)
    assert (target / "config.json").read_text("utf-8") == text


def test_json_is_ascii_without_a_final_newline_and_private(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("something longer than what will be written")
    path.chmod(0o600)
    write_json(path, {"b": "é", "a": 1}, indent=4)
    assert path.read_bytes() == b'{\n    "b": "\\u00e9",\n    "a": 1\n}'
    write_json(tmp_path / "new.json", {}, indent=2)
    assert (tmp_path / "new.json").stat().st_mode & 0o777 == 0o600


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
_JSON = st.recursive(_SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=_JSON, indent=st.integers(1, 4))
def test_json_is_laid_out_as_the_library_would(tmp_path, content, indent):
    write_json(tmp_path / "file.json", content, indent)
    assert (tmp_path / "file.json").read_text("utf-8") == json.dumps(content, indent=indent)
