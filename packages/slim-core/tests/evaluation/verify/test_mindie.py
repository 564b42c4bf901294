"""Folders for MindIE-SD: a good one passes, and every fault of one is told."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from slim_core.checkpoint.reader import Checkpoint
from slim_core.checkpoint.renamed import RenamedSource
from slim_core.evaluation.inspect import inspect_folder
from slim_core.evaluation.verify import Verification, mindie, verify_folder

HIDDEN, WIDE = 64, 128
TEXT, WEIGHTS = "quant_model_description_w8a8_dynamic.json", "quant_model_weight_w8a8_dynamic.safetensors"
INDEX = "quant_model_weight.safetensors.index.json"
MX4 = "blocks.1.ffn.2"
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


class Folder:
    """A small transformer by the formulas of the format; change what you like, then :meth:`write`."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.tensors: dict[str, Tensor] = {}
        self.types: dict[str, Any] = {}
        self.original: dict[str, Tensor] = {}
        self.head: dict[str, Any] = {"model_quant_type": "W8A8_DYNAMIC"}
        for block in range(2):
            self.original[f"blocks.{block}.norm.weight"] = torch.randn(HIDDEN, generator=generator)
            for name, width in (("attn.q", HIDDEN), ("attn.k", HIDDEN), ("ffn.2", WIDE)):
                self.original[f"blocks.{block}.{name}.weight"] = torch.randn(HIDDEN, width, generator=generator)
                self.original[f"blocks.{block}.{name}.bias"] = torch.randn(HIDDEN, generator=generator)
        for block in range(2):
            self.add(f"blocks.{block}.norm.weight", self.original[f"blocks.{block}.norm.weight"], "FLOAT")
            self.dynamic(f"blocks.{block}.attn.q")
            self.static(f"blocks.{block}.attn.k")
        self.dynamic("blocks.0.ffn.2")
        self.mxfp4(MX4)

    def add(self, name: str, tensor: Tensor, kind: str) -> None:
        self.tensors[name], self.types[name] = tensor, kind

    def layer(self, prefix: str, kind: str, **parts: Tensor) -> None:
        for suffix, tensor in parts.items():
            self.add(f"{prefix}.{suffix}", tensor, kind)
        self.add(f"{prefix}.bias", self.original[f"{prefix}.bias"].float(), "FLOAT")

    def _int8(self, prefix: str) -> tuple[Tensor, Tensor]:
        weight = self.original[f"{prefix}.weight"]
        scale = weight.abs().amax(1, keepdim=True) / 127
        return (weight / scale).round().to(torch.int8), scale

    def dynamic(self, prefix: str) -> None:
        codes, scale = self._int8(prefix)
        self.layer(prefix, "W8A8_DYNAMIC", weight=codes, weight_scale=scale, weight_offset=torch.zeros_like(scale))

    def static(self, prefix: str, input_scale: float = 0.03125) -> None:
        codes, scale = self._int8(prefix)
        step, offset = torch.tensor([input_scale]), torch.tensor([-7.0])
        deq = (scale.flatten() * step).float()
        bias = self.original[f"{prefix}.bias"].double() / deq.double() - offset.double() * codes.double().sum(1)
        quant_bias = bias.round().to(torch.int32)
        parts = {"quant_bias": quant_bias, "input_scale": step, "input_offset": offset, "deq_scale": deq}
        self.layer(prefix, "W8A8", weight=codes, **parts)

    def mxfp4(self, prefix: str) -> None:
        blocks = self.original[f"{prefix}.weight"].reshape(HIDDEN, -1, 32)
        power = torch.ceil(torch.log2(blocks.abs().amax(2, keepdim=True) / 6))
        scaled = blocks / 2**power
        near = E2M1[(scaled.abs()[..., None] - E2M1).abs().argmin(-1)] * scaled.sign()
        exponents = (power.squeeze(2) + 127).to(torch.uint8)
        self.layer(prefix, "W4A4_MXFP4", weight=near.flatten(1).to(torch.float8_e4m3fn), weight_scale=exponents)

    def set(self, name: str, index: Any, value: float) -> None:
        changed = self.tensors[name].clone()
        changed[index] = value
        self.tensors[name] = changed

    def drop(self, name: str) -> None:
        del self.tensors[name], self.types[name]

    def write(self, folder: Path, *, parts: int = 0, text: str = TEXT, weights: str = WEIGHTS) -> Path:
        folder.mkdir()
        (folder / text).write_text(json.dumps({**self.head, **self.types}))
        if parts:
            names = list(self.tensors)
            placed = {name: i * parts // len(names) + 1 for i, name in enumerate(names)}
            files = {i: f"quant_model_weight-{i:05d}-of-{parts:05d}.safetensors" for i in range(1, parts + 1)}
            for i, file in files.items():
                save_file({n: self.tensors[n].contiguous() for n in names if placed[n] == i}, folder / file)
            size = sum(tensor.nbytes for tensor in self.tensors.values())
            listed = {name: files[i] for name, i in placed.items()}
            (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": listed}))
        else:
            save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, folder / weights)
        (folder / "tiny_best_practice.yaml").write_text(
            "apiversion: multimodal_sd_modelslim_v1\n"
            "spec: {process: [{type: linear_quant, qconfig: {weight: {method: minmax}}}]}"
        )
        for file in folder.iterdir():
            file.chmod(0o640)
        return folder

    def write_original(self, folder: Path) -> Path:
        folder.mkdir()
        save_file(self.original, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        return folder


@pytest.fixture
def draft() -> Folder:
    return Folder()


def rotation(size: int = 8) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(9)))[0].bfloat16()


def test_rotations_of_query_and_key(draft: Folder, tmp_path: Path) -> None:
    draft.head["blocks.1.attn.quant_type"] = "FP8_DYNAMIC"
    bare = verify_folder(draft.write(tmp_path / "bare"), None, "mindie-sd")
    assert any("FP8_DYNAMIC" in problem for problem in map(str, bare.problems))
    for leaf in ("q_rot", "k_rot"):
        draft.add(f"blocks.1.attn.{leaf}", rotation(), "FLOAT")
    good = verify_folder(draft.write(tmp_path / "good"), None, "mindie-sd")
    assert (good.problems, good.warnings) == ([], [])
    assert good.checked == len(draft.tensors)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("q_rot", rotation().flip(1), "times the transposed k_rot is not one"),
        ("q_rot", 2 * rotation(), "times the transposed k_rot is not one"),
        ("k_rot", rotation().fill_(float("nan")), "times the transposed k_rot is not one"),
        ("k_rot", rotation(16), r"is \[8, 8\] beside \[16, 16\], expected two equal squares"),
        ("k_rot", None, r"k_rot: is missing; query and key of an attention have a rotation both"),
    ],
)
def test_rotations_that_change_the_scores(
    draft: Folder, tmp_path: Path, name: str, value: Tensor | None, text: str
) -> None:
    draft.head["blocks.1.attn.quant_type"] = "FP8_DYNAMIC"
    for leaf in ("q_rot", "k_rot"):
        draft.add(f"blocks.1.attn.{leaf}", rotation(), "FLOAT")
    if value is None:
        draft.drop(f"blocks.1.attn.{name}")
    else:
        draft.tensors[f"blocks.1.attn.{name}"] = value
    problems = verify_folder(draft.write(tmp_path / "out")).problems
    assert any(re.search(text, str(problem)) for problem in problems)


def test_a_good_folder(draft: Folder, tmp_path: Path) -> None:
    out, model = draft.write(tmp_path / "out"), draft.write_original(tmp_path / "model")
    for engine in (None, "mindie-sd"):
        found = verify_folder(out, model, engine)
        assert (found.problems, found.warnings) == ([], [])
        assert found.checked == len(draft.tensors)
        assert found.compared
        assert {entry.engine for entry in found.loadable} == {"mindie-sd"}
    inspection = inspect_folder(out)
    assert (inspection.format, inspection.model_quant_type) == ("mindie", "W8A8_DYNAMIC")
    assert inspection.types["W4A4_MXFP4"].modules == 1
    assert inspection.global_keys == {"model_quant_type": "W8A8_DYNAMIC"}


def test_an_engine_of_another_format(draft: Folder, tmp_path: Path) -> None:
    found = verify_folder(draft.write(tmp_path / "out"), engine="vllm-ascend")
    assert any("vllm-ascend wants other files around its layers than those of mindie" in one for one in found.problems)


def test_in_parts(draft: Folder, tmp_path: Path) -> None:
    out = draft.write(tmp_path / "out", parts=3)
    found = verify_folder(out, draft.write_original(tmp_path / "model"))
    assert found.problems == []
    first = "quant_model_weight-00001-of-00003.safetensors"
    assert found.warnings == [
        f"{first}: mindie-sd does not load weights in parts; write one file (part_file_size: 0)",
    ]
    assert verify_folder(out, engine="mindie-sd").problems == found.warnings


def test_a_file_that_is_too_large(draft: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = draft.write(tmp_path / "out")
    size = (out / WEIGHTS).stat().st_size
    monkeypatch.setattr(mindie, "_LARGEST", size)
    assert verify_folder(out, engine="mindie-sd").ok
    monkeypatch.setattr(mindie, "_LARGEST", size - 1)
    assert verify_folder(out).warnings == [f"{WEIGHTS}: mindie-sd refuses files above 0 GiB; this one has {size} bytes"]
    assert not verify_folder(out, engine="mindie-sd").ok


def test_nothing_quantized(draft: Folder, tmp_path: Path) -> None:
    draft.tensors = dict(draft.original)
    draft.types = dict.fromkeys(draft.original, "FLOAT")
    draft.head["model_quant_type"] = "FLOAT"
    text, weights = "quant_model_description.json", "quant_model_weight.safetensors"
    found = verify_folder(draft.write(tmp_path / "out", text=text, weights=weights))
    assert found.problems == []
    assert found.warnings == [
        "quant_model_description.json: mindie-sd finds no weights of a model in which nothing is quantized"
    ]


@pytest.mark.parametrize("rule", ["iter_smooth", "quarot"])
def test_float_tensors_are_compared_whatever_the_recipe(rule: str, draft: Folder, tmp_path: Path) -> None:
    draft.set("blocks.0.norm.weight", 3, 1.0)
    draft.set("blocks.0.attn.q.weight", (0, 0), 0)  # weights may have been changed before they were quantized
    out = draft.write(tmp_path / "out")
    linear = "{type: linear_quant, qconfig: {weight: {method: minmax}}}"
    (out / "tiny_best_practice.yaml").write_text(f"spec: {{process: [{{type: {rule}}}, {linear}]}}")
    found = verify_folder(out, draft.write_original(tmp_path / "model"))
    assert found.problems == ["blocks.0.norm.weight: differs from the original, expected the same bits"]
    (warning,) = found.warnings
    if rule == "quarot":
        assert not found.compared
    else:
        assert warning == (
            "blocks.0.attn.q: is not that of the original, like 1 linears whose input is not scaled: right if "
            "iter_smooth moved scales from one linear into the next"
        )


def test_the_recipe_may_lie_above_the_folder_of_one_of_several_transformers(draft: Folder, tmp_path: Path) -> None:
    out, model = draft.write(tmp_path / "out"), draft.write_original(tmp_path / "model")
    draft.set("blocks.0.attn.q.weight", (0, 0), 0)
    changed = draft.write(tmp_path / "changed")
    for folder in (out, changed):
        (folder / "tiny_best_practice.yaml").unlink()
    # Without the method, what is a little off is not judged.
    assert verify_folder(changed, model).ok
    (tmp_path / "wan_best_practice.yaml").write_text(
        "spec: {process: [{type: linear_quant, qconfig: {weight: {method: minmax}}}]}"
    )
    assert verify_folder(out, model).ok
    assert [one.split(":")[0] for one in verify_folder(changed, model).problems] == ["blocks.0.attn.q.weight"]


def test_an_original_with_names_of_its_own(draft: Folder, tmp_path: Path) -> None:
    out, model = draft.write(tmp_path / "out"), tmp_path / "model"
    model.mkdir()
    save_file({f"transformer.{name}": t for name, t in draft.original.items()}, model / "model.safetensors")
    asked: list[tuple[Path, set[str], str]] = []

    def opener(folder: Path, names: Any, part: str) -> RenamedSource:
        asked.append((folder, set(names), part))
        return RenamedSource(Checkpoint(folder), {name: f"transformer.{name}" for name in draft.original})

    found = verify_folder(out, model, "mindie-sd", opener)
    assert (found.problems, found.warnings, found.compared) == ([], [], True)
    assert asked == [(model, set(draft.tensors), "out")]


Fault = Callable[[Folder], None]
FAULTS: dict[str, tuple[Fault, str]] = {
    "no type of the model": (
        lambda it: it.head.clear(),
        f"{TEXT}: the key 'model_quant_type' is missing, expected a str",
    ),
    "a type that is no text": (
        lambda it: it.head.update(model_quant_type=8),
        f"{TEXT}: 'model_quant_type' is 8, expected a str",
    ),
    "an unknown type": (
        lambda it: it.head.update(model_quant_type="W9A9"),
        f"{TEXT}: model_quant_type is 'W9A9', which MindIE-SD does not know",
    ),
    "a type that no layer has": (
        lambda it: it.head.update(model_quant_type="W8A8_MXFP8"),
        f"{TEXT}: model_quant_type is 'W8A8_MXFP8', but no tensor has this type",
    ),
    "the type of another file": (
        lambda it: it.head.update(model_quant_type="W8A8"),
        f"{TEXT}: expected the name quant_model_description_w8a8.json, because model_quant_type is 'W8A8'",
    ),
    "keys of ascendv1": (
        lambda it: it.head.update(version="1.0.0"),
        "version: is described as 1.0.0 but is in no weight file",
    ),
    "an object of ascendv1": (
        lambda it: it.head.update(metadata={}),
        "metadata: its type in the description is {}, expected a string",
    ),
    "an entry without a tensor": (
        lambda it: it.types.update({"blocks.9.weight": "FLOAT"}),
        "blocks.9.weight: is described as FLOAT but is in no weight file",
    ),
    "a tensor without an entry": (
        lambda it: it.types.pop("blocks.0.norm.weight"),
        f"blocks.0.norm.weight: is in {WEIGHTS} but has no entry in {TEXT}",
    ),
    "deq_scale in int64": (
        lambda it: it.tensors.update(
            {"blocks.0.attn.k.deq_scale": it.tensors["blocks.0.attn.k.deq_scale"].view(torch.int32).long()}
        ),
        "blocks.0.attn.k.deq_scale: is int64 [64], expected float32 [64]",
    ),
    "a missing scale": (
        lambda it: it.drop("blocks.0.attn.q.weight_scale"),
        "blocks.0.attn.q.weight_scale: is missing; a W8A8_DYNAMIC layer has it",
    ),
    "a bias with a type": (
        lambda it: it.types.update({f"{MX4}.bias": "W4A4_MXFP4"}),
        f"{MX4}.bias: has the type W4A4_MXFP4, expected FLOAT as part of a W4A4_MXFP4 layer",
    ),
    "values that four bits do not have": (
        lambda it: it.set(f"{MX4}.weight", (5, 3), 5.0),
        f"{MX4}.weight: holds values in row 5 that are no numbers of four bits (E2M1)",
    ),
    "values of four bits in another dtype": (
        lambda it: it.tensors.update({f"{MX4}.weight": it.tensors[f"{MX4}.weight"].float()}),
        f"{MX4}.weight: is float32 [64, 128], expected float8_e4m3fn [64, 128]",
    ),
    "a value that was moved": (
        lambda it: it.set(f"{MX4}.weight", (5, int(it.tensors[f"{MX4}.weight"][5].float().argmax())), -6.0),
        f"{MX4}.weight: row 5 is off by",
    ),
    "a scale of NaN": (
        lambda it: it.set(f"{MX4}.weight_scale", (2, 1), 255),
        f"{MX4}.weight_scale: is 255 in row 2, which stands for NaN; expected exponents 0..254",
    ),
    "a quant_bias": (
        lambda it: it.set("blocks.1.attn.k.quant_bias", 4, 0),
        "blocks.1.attn.k.quant_bias: is 0 in row 4",
    ),
    "a cache": (
        lambda it: it.add("blocks.0.attn.k_proj.kv_cache_scale", torch.ones(HIDDEN), "C8"),
        "blocks.0.attn.k_proj.kv_cache_scale: has the type C8, for which the format has no place",
    ),
    "a float tensor that was changed": (
        lambda it: it.set("blocks.1.norm.weight", 0, 9.0),
        "blocks.1.norm.weight: differs from the original, expected the same bits",
    ),
    "a tensor that was left out": (
        lambda it: it.drop("blocks.1.norm.weight"),
        "blocks.1.norm.weight: is in the original but missing here",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault: str, draft: Folder, tmp_path: Path) -> None:
    spoil, message = FAULTS[fault]
    spoil(draft)
    found = verify_folder(draft.write(tmp_path / "out"), draft.write_original(tmp_path / "model"))
    assert any(one.startswith(message) for one in found.problems), found.text()


def verified(out: Path) -> Verification:
    return verify_folder(out, engine="mindie-sd")


def _second(out: Path) -> None:
    (out / "quant_model_description_w8a8_dynamic_0.json").write_text("{}")


def _foreign(out: Path) -> None:
    save_file({"a": torch.ones(1)}, out / "diffusion_pytorch_model.safetensors")


FILE_FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no description": (lambda out: (out / TEXT).unlink(), "quant_model_description.json: the file is missing"),
    "not JSON": (lambda out: (out / TEXT).write_text("{"), f"{TEXT}: cannot be read as JSON"),
    "two descriptions": (_second, "quant_model_description_w8a8_dynamic_0.json: a second description beside"),
    "no weights": (lambda out: (out / WEIGHTS).unlink(), f"{WEIGHTS}: the file is missing"),
    "another name": (
        lambda out: (out / WEIGHTS).rename(out / "quant_model_weight.safetensors"),
        f"{WEIGHTS}: the file is missing, because model_quant_type is 'W8A8_DYNAMIC'",
    ),
    "foreign weights": (_foreign, "diffusion_pytorch_model.safetensors: a foreign weight file"),
    "a stale index": (
        lambda out: (out / "model.safetensors.index.json").write_text("{}"),
        "model.safetensors.index.json: must not be here",
    ),
    "an open description": (lambda out: (out / TEXT).chmod(0o644), f"{TEXT}: has mode 0644, expected at most 0640"),
    "open weights": (lambda out: (out / WEIGHTS).chmod(0o660), f"{WEIGHTS}: has mode 0660, expected at most 0640"),
    "cut weights": (
        lambda out: (out / WEIGHTS).write_bytes((out / WEIGHTS).read_bytes()[:-100]),
        f"{WEIGHTS}: ",
    ),
    "a quantization_config": (
        lambda out: (out / "config.json").write_text('{"quantization_config": {}}'),
        "config.json: has quantization_config",
    ),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_faults_of_files(fault: str, draft: Folder, tmp_path: Path) -> None:
    spoil, message = FILE_FAULTS[fault]
    out = draft.write(tmp_path / "out")
    assert verified(out).ok
    spoil(out)
    found = verified(out)
    assert any(one.startswith(message) for one in found.problems), found.text()


def test_links(draft: Folder, tmp_path: Path) -> None:
    out = draft.write(tmp_path / "out")
    for name in (TEXT, WEIGHTS):
        (out / name).rename(tmp_path / name)
        (out / name).symlink_to(tmp_path / name)
    assert verify_folder(out).problems == [f"{n}: is a symbolic link, which MindIE-SD refuses" for n in (TEXT, WEIGHTS)]


@pytest.mark.parametrize("missing", [INDEX, "quant_model_weight-00002-of-00003.safetensors"])
def test_parts_that_are_missing(missing: str, draft: Folder, tmp_path: Path) -> None:
    out = draft.write(tmp_path / "out", parts=3)
    (out / missing).unlink()
    assert verify_folder(out).problems


def test_what_the_engine_asks_of_layers(draft: Folder, tmp_path: Path) -> None:
    draft.drop(f"{MX4}.bias")
    out = draft.write(tmp_path / "out")
    found = verify_folder(out)
    assert found.problems == []
    assert found.warnings == [f"{MX4}: mindie-sd loads W4A4_MXFP4 linear layers only with a bias (1 of them)"]
    assert not verified(out).ok


def test_types_that_only_other_tools_write_are_counted(draft: Folder, tmp_path: Path) -> None:
    for name, kind in draft.types.items():
        if kind == "W8A8":
            draft.types[name] = "W8A8_TIMESTEP"
    found = verify_folder(draft.write(tmp_path / "out"))
    assert found.problems == []
    assert any("what has the type W8A8_TIMESTEP is not checked further (2 such)" in one for one in found.warnings)


def test_a_scale_that_is_no_number_of_bf16(draft: Folder, tmp_path: Path) -> None:
    draft.static("blocks.0.attn.k", input_scale=0.0311)
    found = verify_folder(draft.write(tmp_path / "out"))
    assert found.problems == []
    (warning,) = found.warnings
    assert warning.startswith("blocks.0.attn.k.input_scale: is 0.03109")
    assert "expected a value that bfloat16 can hold" in warning
