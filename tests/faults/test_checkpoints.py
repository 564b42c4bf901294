"""Broken model folders. A row: what is done to a good one, and kind, words, place and way out of the message."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file, save_file

MODEL, UNSUPPORTED, SECURITY = "201 InvalidModelError", "301 UnsupportedError", "204 SecurityError"
UP = "model.layers.1.mlp.up_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
AGAIN = "copy or download the file again"
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}


def config(**changes: object) -> Callable[..., None]:
    return lambda w: w.configure(**changes)


def file(name: str, content: str | bytes) -> Callable[..., None]:
    data = content.encode() if isinstance(content, str) else content
    return lambda w: (w.model / name).write_bytes(data) and None


def without(*names: str) -> Callable[..., None]:
    def remove(w) -> None:
        for name in names:
            (w.model / name).unlink()

    return remove


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[..., None]:
    return lambda w: w.change(change)


def header(edit: Callable[[dict], object]) -> Callable[..., None]:
    return lambda w: w.edit_header(edit)


def split(edit: Callable[[dict[str, str]], object]) -> Callable[..., None]:
    return lambda w: w.split(edit)


def unreadable(name: str) -> Callable[..., None]:
    """A regular file on which every read fails, also for root."""

    def replace(w) -> None:
        (w.model / name).unlink()
        (w.model / name).symlink_to("/proc/self/mem")

    return replace


def resized(change: int) -> Callable[..., None]:
    return lambda w: os.truncate(w.weights, w.weights.stat().st_size + change)


def header_of(length: int, text: bytes = b"{}") -> Callable[..., None]:
    return lambda w: w.weights.write_bytes(length.to_bytes(8, "little") + text) and None


def missing_shard(w) -> None:
    w.split()
    (w.model / SECOND).unlink()


def truncated_shard(w) -> None:
    w.split()
    os.truncate(w.model / SECOND, (w.model / SECOND).stat().st_size - 1)


def left_over_shard(w) -> None:
    save_file({UP: torch.zeros(48, 32, dtype=torch.bfloat16)}, w.model / "model-old.safetensors")


def second_index(w) -> None:
    w.split()
    shutil.copy(w.model / "model.safetensors.index.json", w.model / "old.safetensors.index.json")


def index(content: str) -> Callable[..., None]:
    return lambda w: (w.split(), (w.model / "model.safetensors.index.json").write_text(content))


def only_bin(w) -> None:
    w.weights.rename(w.model / "pytorch_model.bin")


def set_value(name: str, value: float) -> Callable[..., None]:
    def change(w) -> None:
        w.change(lambda t: t[name].view(-1).__setitem__(-1, value))

    return change


def fp8(factors: Callable[[torch.Tensor], dict[str, torch.Tensor]]) -> Callable[..., None]:
    """One weight in float8, with whatever ``factors`` puts beside it."""

    def change(w) -> None:
        w.configure(quantization_config=FP8)
        w.change(lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)} | factors(t[UP])))

    return change


def float8_unannounced(w) -> None:
    w.change(lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}))


def missing_expert(w) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    moe = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        decoder_sparse_step=1,
    )
    Qwen3MoeForCausalLM(moe).save_pretrained(w.model)
    tensors = load_file(w.weights)
    del tensors["model.layers.0.mlp.experts.1.up_proj.weight"]
    save_file(tensors, w.weights)


def duplicate_in_header(w) -> None:
    raw = w.weights.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text = raw[8 : 8 + length].rstrip()
    entry = json.dumps(json.loads(text)[NORM])
    text = text[:-1] + f', "{NORM}": {entry}}}'.encode()
    w.weights.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


CONFIG = {
    "no folder": (
        lambda w: shutil.rmtree(w.model),
        MODEL,
        "does not exist or is not a folder",
        "{model}",
        "point --model_path to",
    ),
    "a file": (
        lambda w: w.options.update(model_path=str(w.dataset)),
        MODEL,
        "does not exist or is not a folder",
        "{dataset}",
        "point --model_path to",
    ),
    "no config.json": (without("config.json"), MODEL, "there is no config.json", "{model}", "point --model_path to"),
    "broken config.json": (
        file("config.json", '{"model_type": '),
        MODEL,
        "cannot be read as JSON: Expecting value",
        "{model}/config.json",
        "download",
    ),
    "config.json is a list": (file("config.json", "[]"), MODEL, "is not a JSON object", "config.json", "download"),
    "config.json is binary": (
        file("config.json", b"\xff\xfe\x00"),
        MODEL,
        "cannot be read as JSON",
        "{model}/config.json",
        "download",
    ),
    "config.json unreadable": (
        unreadable("config.json"),
        MODEL,
        "Input/output error",
        "{model}/config.json",
        "download",
    ),
    "unknown model_type": (
        config(model_type="qwen33"),
        UNSUPPORTED,
        "does not know model_type 'qwen33'",
        "{model}/config.json",
        "upgrade transformers",
    ),
    "no model_type": (
        config(model_type=None),
        UNSUPPORTED,
        "does not know model_type None",
        "{model}/config.json",
        "check the file",
    ),
    "model_type is a list": (
        config(model_type=["qwen3"]),
        UNSUPPORTED,
        "does not know model_type ['qwen3']",
        "{model}/config.json",
        "check the file",
    ),
    "an encoder": (
        config(model_type="clip"),
        UNSUPPORTED,
        "does not know model_type 'clip'",
        "{model}/config.json",
        "check the file",
    ),
    "code of its own": (
        config(model_type="mine", auto_map={"AutoConfig": "mine.Config"}),
        SECURITY,
        "needs Python code that ships with it",
        "{model}/config.json",
        "--trust_remote_code True",
    ),
    "code that is not there": (
        lambda w: (
            w.configure(model_type="mine", auto_map={"AutoConfig": "mine.Config"}),
            w.options.update(trust_remote_code="True"),
        ),
        MODEL,
        "mine.py",
        "{model}",
        "check",
    ),
    "heads do not divide": (
        config(num_attention_heads="four"),
        MODEL,
        "transformers cannot build the model",
        "{model}/config.json",
        "num_attention_heads",
    ),
    "no layers": (
        config(num_hidden_layers=0, layer_types=None),
        MODEL,
        "no list of decoder blocks",
        "Qwen3ForCausalLM",
        "adapter",
    ),
    "a layer too many": (
        config(num_hidden_layers=3, layer_types=None),
        MODEL,
        "are not in the checkpoint | model.layers.2.",
        "{model}",
        "do not belong together",
    ),
    "another width": (
        config(intermediate_size=64),
        MODEL,
        "has shape [48, 32], config.json asks for [64, 32]",
        "mlp.gate_proj.weight",
        "do not belong together",
    ),
    "awq": (
        config(quantization_config={"quant_method": "awq", "bits": 4}),
        UNSUPPORTED,
        "already quantized (awq)",
        "{model}/config.json",
        "start from the floating-point checkpoint",
    ),
    "compressed-tensors": (
        config(quantization_config={"quant_method": "compressed-tensors"}),
        UNSUPPORTED,
        "already quantized (compressed-tensors)",
        "{model}/config.json",
        "start from the floating-point checkpoint",
    ),
    "ascendv1": (
        file("quant_model_description.json", "{}"),
        UNSUPPORTED,
        "holds a quantized checkpoint",
        "{model}",
        "start from the original",
    ),
    "missing expert": (
        missing_expert,
        MODEL,
        "1 expert tensors are not in the checkpoint, among them 'model.layers.0.mlp.experts.1.up_proj.weight'",
        "{model}",
        "a shard is missing",
    ),
    "block of one number": (
        config(quantization_config={"quant_method": "fp8", "weight_block_size": [128]}),
        MODEL,
        "must be two positive numbers, got [128]",
        "quantization_config.weight_block_size",
        "config.json",
    ),
    "no tokenizer": (
        without("tokenizer.json", "tokenizer_config.json"),
        MODEL,
        "the tokenizer cannot be loaded",
        "{model}",
        "copy the tokenizer files",
    ),
    "broken tokenizer": (
        file("tokenizer.json", "{"),
        MODEL,
        "the tokenizer cannot be loaded",
        "{model}",
        "copy the tokenizer files",
    ),
    "tokenizer of nothing": (
        file("tokenizer.json", "{}"),
        MODEL,
        "the tokenizer cannot be loaded",
        "{model}",
        "copy the tokenizer files",
    ),
}

FILES = {
    "no weights": (without("model.safetensors"), MODEL, "no safetensors weights", "{model}", "point --model_path to"),
    "only .bin": (only_bin, MODEL, "only pytorch_model.bin", "{model}", "convert the checkpoint to safetensors"),
    "empty": (file("model.safetensors", b""), MODEL, "(0 bytes)", "{weights}", AGAIN),
    "text": (file("model.safetensors", "version https://git-lfs\n"), MODEL, "not a safetensors", "{weights}", AGAIN),
    "garbage header": (header_of(16, b"\xff" * 16), MODEL, "its header is not valid JSON", "{weights}", AGAIN),
    "header longer than the file": (header_of(1 << 20), MODEL, "cut off inside its header", "{weights}", AGAIN),
    "header of a terabyte": (header_of(1 << 40), MODEL, "not a safetensors file", "{weights}", AGAIN),
    "header is a list": (header_of(2, b"[]"), MODEL, "not an object", "{weights}", AGAIN),
    "header nested too deeply": (header_of(99_999, b"[" * 99_999), MODEL, "nested too deeply", "{weights}", AGAIN),
    "header with a name twice": (duplicate_in_header, MODEL, f"'{NORM}' appears twice", "{weights}", AGAIN),
    "truncated": (resized(-7), MODEL, "the file is truncated", "{weights}", AGAIN),
    "bytes at the end": (resized(+7), MODEL, "longer than its header says", "{weights}", AGAIN),
    "a folder": (
        lambda w: (w.weights.unlink(), w.weights.mkdir()),
        MODEL,
        "not a file",
        "{weights}",
        "download",
    ),
    "link to nothing": (
        lambda w: (w.weights.unlink(), w.weights.symlink_to("../blobs/gone")),
        MODEL,
        "cannot be read: No such file",
        "{weights}",
        "download",
    ),
    "unreadable": (unreadable("model.safetensors"), MODEL, "Input/output error", "{weights}", AGAIN),
    "unknown dtype": (
        header(lambda h: h[UP].update(dtype="I4")),
        MODEL,
        f"header entry of tensor '{UP}' is malformed",
        "{weights}",
        AGAIN,
    ),
    "negative length": (
        header(lambda h: h[UP].update(shape=[-48, -32])),
        MODEL,
        f"header entry of tensor '{UP}' is malformed",
        "{weights}",
        AGAIN,
    ),
    "entry contradicts itself": (
        header(lambda h: h[UP].update(shape=[48, 33])),
        MODEL,
        f"tensor '{UP}' contradicts itself",
        "{weights}",
        AGAIN,
    ),
    "tensors overlap": (
        header(lambda h: h[UP].update(data_offsets=h[DOWN]["data_offsets"])),
        MODEL,
        "overlaps another one or leaves a gap",
        "{weights}",
        AGAIN,
    ),
    "missing shard": (missing_shard, MODEL, f"shard {SECOND} is missing", "index.json", "download the folder again"),
    "truncated shard": (truncated_shard, MODEL, "the file is truncated", f"{{model}}/{SECOND}", AGAIN),
    "left-over shard": (
        left_over_shard,
        MODEL,
        f"tensor '{UP}' is stored twice, also in model-old.safetensors",
        "{weights}",
        "remove the left-over shard",
    ),
    "two indices": (second_index, MODEL, "several index files: model.", "{model}", "keep the one"),
    "index lists what is not there": (
        split(lambda listed: listed.update({"model.extra": FIRST})),
        MODEL,
        f"places tensor 'model.extra' in {FIRST}, which does not hold it",
        "{model}",
        "download the folder again",
    ),
    "index names the other shard": (
        split(lambda listed: listed.update({UP: FIRST if listed[UP] == SECOND else SECOND})),
        MODEL,
        f"places tensor '{UP}'",
        "{model}",
        "download the folder again",
    ),
    "index points outside": (
        split(lambda listed: listed.update({UP: "../../etc/weights.safetensors"})),
        MODEL,
        f"tensor '{UP}' is placed outside the folder: '../../etc/weights.safetensors'",
        "index.json",
        "download",
    ),
    "index of numbers": (
        split(lambda listed: listed.update({UP: 1})),
        MODEL,
        f"tensor '{UP}' is placed outside the folder: 1",
        "index.json",
        "download",
    ),
    "index is no JSON": (index("{"), MODEL, "not a safetensors index", "index.json", "download"),
    "index without a map": (index("{}"), MODEL, "no weight_map", "index.json", "download"),
    "empty map": (index('{"weight_map": {}}'), MODEL, "weight_map is empty", "index.json", "download"),
}

TENSORS = {
    "missing": (
        tensors(lambda t: t.pop(UP)),
        MODEL,
        f"1 tensors of the model are not in the checkpoint, among them '{UP}'",
        "{model}",
        "a shard is missing",
    ),
    "misspelt": (
        tensors(lambda t: t.update({UP.replace("up_proj", "up_projj"): t.pop(UP)})),
        MODEL,
        f"(there is '{UP.replace('up_proj', 'up_projj')}')",
        "{model}",
        "do not belong together",
    ),
    "wrong shape": (
        tensors(lambda t: t.update({UP: t[UP].T.contiguous()})),
        MODEL,
        f"tensor '{UP}' has shape [32, 48], config.json asks for [48, 32]",
        "{model}",
        "do not belong together",
    ),
    "scalar": (
        tensors(lambda t: t.update({NORM: t[NORM][0].clone()})),
        MODEL,
        f"tensor '{NORM}' has shape [], config.json asks for [32]",
        "{model}",
        "do not belong together",
    ),
    "integers": (
        tensors(lambda t: t.update({UP: t[UP].to(torch.int8)})),
        MODEL,
        "int8",
        UP,
        "floating-point",
    ),
    "complex": (
        tensors(lambda t: t.update({UP: t[UP].to(torch.complex64)})),
        MODEL,
        "complex64",
        UP,
        "floating-point",
    ),
    "float8 without factors": (
        fp8(lambda weight: {}),
        MODEL,
        f"float8 tensor has no '{UP}_scale_inv' beside it",
        UP,
        "a shard is missing",
    ),
    "float8 not announced": (float8_unannounced, MODEL, "float8", UP, "quantization_config"),
    "float8 with too few factors": (
        fp8(lambda weight: {f"{UP}_scale_inv": torch.ones(1, 2)}),
        MODEL,
        "has shape [1, 2], expected [3, 2] for blocks of (16, 16)",
        f"{UP}_scale_inv",
        "weight_block_size",
    ),
    "float8 with whole factors": (
        fp8(lambda weight: {f"{UP}_scale_inv": torch.ones(3, 2, dtype=torch.int32)}),
        MODEL,
        "holds torch.int32, expected a floating-point type",
        f"{UP}_scale_inv",
        "start from another checkpoint",
    ),
}


TABLES = {"config": CONFIG, "file": FILES, "tensor": TENSORS}
ROWS = [pytest.param(*row, id=f"{table}: {name}") for table, rows in TABLES.items() for name, row in rows.items()]


@pytest.mark.parametrize(("fault", "kind", "what", "where", "remedy"), ROWS)
@pytest.mark.filterwarnings("ignore:Casting complex")
def test_broken_checkpoint(workplace, refused, fault: Callable[..., object], kind, what, where, remedy) -> None:
    fault(workplace)
    refused(kind, what, where, remedy)


VALUES = {
    "nan in a weight": (set_value(UP, float("nan")), "the weight holds NaN or infinity in row 47", UP, "repair"),
    "infinity in a weight": (set_value(UP, float("inf")), "the weight holds NaN or infinity in row 47", UP, "repair"),
    "minus infinity": (set_value(UP, float("-inf")), "the weight holds NaN or infinity in row 47", UP, "repair"),
    "nan in an fp8 factor": (
        fp8(lambda weight: {f"{UP}_scale_inv": torch.full((3, 2), float("nan"))}),
        "the weight holds NaN or infinity in row 0",
        UP,
        "repair the checkpoint",
    ),
    "nan in a norm": (
        set_value(NORM, float("nan")),
        "its activations hold NaN or infinity",
        "model.layers.1.self_attn.q_proj",
        "check the model",
    ),
    "infinity in a norm": (
        set_value(NORM, float("inf")),
        "its activations hold NaN or infinity",
        "model.layers.1.self_attn.q_proj",
        "check the model",
    ),
}


@pytest.mark.parametrize("flags", [(), ("--overwrite",)], ids=["new", "overwrite"])
@pytest.mark.parametrize(("fault", "what", "where", "remedy"), VALUES.values(), ids=VALUES)
def test_value_that_shows_when_it_is_read(
    workplace, refused, fault: Callable[..., object], what, where, remedy, flags: tuple[str, ...]
) -> None:
    """The first block is finished by then, so the hidden folder stays; an older output is as it was."""
    if flags:
        workplace.fill_save()
    fault(workplace)
    refused(MODEL, what, where, remedy, *flags, resumable=True)
