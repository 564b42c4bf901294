"""Four-bit weights of linears with odd sizes: two codes share a byte, and the form decides along which axis.

A form either has room for the linear, and then the written files hold what they should, or the linear is named before
anything is written.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3Config

from slim_core.errors import UnsupportedError
from slim_core.evaluation.verify import verify_folder
from slim_core.progress import SilentProgress
from slim_core.recipe import recipe_from_dict
from slim_core.savers.ascendv1_folder import AscendV1Folder
from slim_core.service import QuantRequest
from slim_llm.service import LlmService

TOKENIZER = Path(__file__).parents[3] / "examples" / "tiny-qwen3"
# q (32, 33), k and v (16, 33), o (33, 32), gate and up (45, 33), down (33, 45)
HIDDEN, INNER = 33, 45
Q, OUT, GATE, DOWN = "self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"
TOKEN: dict[str, Any] = {"dtype": "int8", "scope": "per_token"}
TOKEN_4: dict[str, Any] = {"dtype": "int4", "scope": "per_token"}
WIDTHS = {Q: HIDDEN, OUT: 32, GATE: HIDDEN, DOWN: INNER}
# With those that engines fuse with them.
PATTERNS = {Q: "*.{q,k,v}_proj", OUT: "*.o_proj", GATE: "*.{gate,up}_proj", DOWN: "*.down_proj"}
MX_8, MX_4 = ({"dtype": f"mxfp{bits}", "scope": "per_block"} for bits in (8, 4))


def weight(method: str, symmetric: bool = True, grouped: bool = False) -> dict[str, Any]:
    scope = "per_group" if grouped else "per_channel"
    return {"dtype": "int4", "scope": scope, "symmetric": symmetric, "method": method}


ROWS, COLUMNS, PARTS = "rows are packed in pairs", "columns are packed in pairs", "cut it into 16 parts"
# Which linears have room, and what refuses the others.
NO_PAIRS: dict[str, str | None] = {Q: None, OUT: None, GATE: None, DOWN: None}
PAIRED_ROWS: dict[str, str | None] = {Q: None, OUT: ROWS, GATE: ROWS, DOWN: ROWS}
PAIRED_COLUMNS: dict[str, str | None] = {Q: COLUMNS, OUT: None, GATE: COLUMNS, DOWN: COLUMNS}
SPLIT = PAIRED_ROWS | {DOWN: PARTS}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None, dict[str, str | None]]] = {
    "w4a16": ("W4A16", weight("minmax", symmetric=False), None, PAIRED_COLUMNS),
    "w4a16 gptq": ("W4A16", weight("gptq"), None, PAIRED_COLUMNS),
    "w4a16 groups": ("W4A16", weight("ssz", grouped=True), None, PAIRED_ROWS),
    "w4a16 groups gptq": ("W4A16", weight("gptq", symmetric=False, grouped=True), None, PAIRED_ROWS),
    "w4a8": ("W4A8_DYNAMIC", weight("ssz"), TOKEN, SPLIT),
    "w4a8 groups": ("W4A8_DYNAMIC", weight("minmax", grouped=True), TOKEN, SPLIT),
    "w4a8 gptq": ("W4A8_DYNAMIC", weight("gptq"), TOKEN, SPLIT),
    "w4a8 autoround": ("W4A8_DYNAMIC", weight("autoround", grouped=True), TOKEN, SPLIT),
    "w4a4": ("W4A4_DYNAMIC", weight("minmax", symmetric=False), TOKEN_4, NO_PAIRS),
    "w4a4 groups": ("W4A4_DYNAMIC", weight("ssz", grouped=True), TOKEN_4, NO_PAIRS),
    "w4a4 gptq": ("W4A4_DYNAMIC", weight("gptq", symmetric=False), TOKEN_4, NO_PAIRS),
    "w4a4 autoround": ("W4A4_DYNAMIC", weight("autoround"), TOKEN_4, NO_PAIRS),
    "w4a8 mxfp": ("W4A8_MXFP", MX_4 | {"method": "fouroversix"}, MX_8, PAIRED_COLUMNS),
    "mxfp4": ("W4A4_MXFP4", MX_4 | {"method": "ceil_x"}, MX_4, PAIRED_COLUMNS),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block with a hidden state and an inner state of odd sizes."""
    folder = tmp_path_factory.mktemp("odd") / "model"
    config = Qwen3Config(
        vocab_size=3072,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / file, folder / file)
    return folder


def processor(leaf: str, weight: dict[str, Any], act: dict[str, Any] | None) -> dict[str, Any]:
    if weight["scope"] == "per_group":
        weight = weight | {"ext": {"group_size": WIDTHS[leaf] // 3 if WIDTHS[leaf] % 2 else 16}}
    rule = {"qconfig": {"weight": weight} | ({} if act is None else {"act": act}), "include": [PATTERNS[leaf]]}
    if weight["method"] == "autoround":
        return {"type": "autoround_quant", "iters": 1, "strategies": [rule]}
    return {"type": "linear_quant", **rule}


@pytest.mark.parametrize("leaf", WIDTHS)
@pytest.mark.parametrize("case", CASES)
def test_odd_sizes(model: Path, dataset: Path, tmp_path: Path, case: str, leaf: str) -> None:
    kind, weight, act, refusals = CASES[case]
    spec = {"process": [processor(leaf, weight, act)], "save": [{"type": "ascendv1_saver"}], "dataset": str(dataset)}
    out = tmp_path / "out"
    request = QuantRequest(model_path=model, save_path=out, model_type="tiny", device="cpu", force=True)  # pyright: ignore
    recipe = recipe_from_dict({"apiversion": "modelslim_v1", "spec": spec})
    refusal, name = refusals[leaf], f"model.layers.0.{leaf}"
    if refusal is not None:
        with pytest.raises(UnsupportedError, match=f"cannot become {kind}: .*{refusal}") as caught:
            LlmService().quantize(request, recipe, SilentProgress())
        assert (caught.value.code, caught.value.where, caught.value.remedy) == (301, name, "exclude this linear")
        assert not list(tmp_path.iterdir())
        return
    LlmService().quantize(request, recipe, SilentProgress())
    verification = verify_folder(out, model)
    assert verification.ok, verification.text()
    description = json.loads((out / "quant_model_description.json").read_text())
    assert description[f"{name}.weight"] == kind
    (original,) = (load_file(file)[f"{name}.weight"] for file in model.glob("*.safetensors"))
    written = AscendV1Folder(out).layer(name)
    assert written is not None
    error = (written.dequantized() - original.float()).norm() / original.float().norm()
    assert 0.01 < float(error) < (0.35 if weight["method"] in ("gptq", "autoround") else 0.2)
