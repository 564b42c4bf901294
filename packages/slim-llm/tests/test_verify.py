"""Every kind of layer, from recipe to files, as ``slim verify`` sees it: no problem, and compared with the original."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slim_core.evaluation.verify import verify_folder
from slim_core.savers.ascendv1_folder import AscendV1Folder

ModelFolder = Callable[..., Path]
TOKEN8 = {"dtype": "int8", "scope": "per_token", "symmetric": True, "method": "minmax"}
TOKEN4 = TOKEN8 | {"dtype": "int4"}
STATIC = {"dtype": "int8", "scope": "per_tensor", "symmetric": False, "method": "minmax"}
MIXED = STATIC | {"scope": "pd_mix"}
FP8 = {"dtype": "fp8_e4m3", "scope": "per_token", "symmetric": True, "method": "minmax"}
MX8 = {"dtype": "mxfp8", "scope": "per_block", "symmetric": True, "method": "minmax"}
MX4 = MX8 | {"dtype": "mxfp4"}
DUAL = {"dtype": "mxfp4", "scope": "dual_scale", "symmetric": True, "method": "dualscale"}


def integers(bits: int, group: int = 0, symmetric: bool = True, method: str = "minmax") -> dict[str, Any]:
    return {
        "dtype": f"int{bits}",
        "scope": "per_group" if group else "per_channel",
        "symmetric": symmetric,
        "method": method,
        "ext": {"group_size": group} if group else {},
    }


# Activation, weight, type in the description.
CASES: dict[str, tuple[dict[str, Any] | None, dict[str, Any], str]] = {
    "W8A8": (STATIC, integers(8), "W8A8"),
    "W8A8S": (STATIC, integers(8, method="sparse"), "W8A8S"),
    "W8A8_MIX": (MIXED, integers(8), "W8A8_MIX"),
    "W8A8_DYNAMIC": (TOKEN8, integers(8), "W8A8_DYNAMIC"),
    "W8A8_DYNAMIC gptq": (TOKEN8, integers(8, method="gptq"), "W8A8_DYNAMIC"),
    "W8A8_DYNAMIC grouped": (TOKEN8, integers(8, 16), "W8A8_DYNAMIC"),
    "W8A16 ssz": (None, integers(8, method="ssz"), "W8A16"),
    "W8A16 grouped asymmetric": (None, integers(8, 16, False), "W8A16"),
    "W4A16": (None, integers(4), "W4A16"),
    "W4A16 asymmetric": (None, integers(4, 0, False), "W4A16"),
    "W4A16 grouped": (None, integers(4, 16), "W4A16"),
    "W4A16 grouped asymmetric gptq": (None, integers(4, 16, False, "gptq"), "W4A16"),
    "W4A8": (TOKEN8, integers(4), "W4A8_DYNAMIC"),
    "W4A8 gptq": (TOKEN8, integers(4, method="gptq"), "W4A8_DYNAMIC"),
    "W4A8 grouped ssz": (TOKEN8, integers(4, 16, method="ssz"), "W4A8_DYNAMIC"),
    "W4A4": (TOKEN4, integers(4), "W4A4_DYNAMIC"),
    "W4A4 grouped asymmetric": (TOKEN4, integers(4, 16, False), "W4A4_DYNAMIC"),
    "FP8": (FP8, FP8 | {"scope": "per_channel"}, "WFP8AFP8_DYNAMIC"),
    "MXFP8": (MX8, MX8, "W8A8_MXFP8"),
    "MXFP8 mse_round": (MX8, MX8 | {"method": "mse_round"}, "W8A8_MXFP8"),
    "MXFP8 with MXFP4": (MX8, MX4, "W4A8_MXFP"),
    "MXFP4 ceil_x": (MX4, MX4 | {"method": "ceil_x"}, "W4A4_MXFP4"),
    "MXFP4 fouroversix": (MX4, MX4 | {"method": "fouroversix"}, "W4A4_MXFP4"),
    "dual scale": (DUAL, DUAL | {"ext": {"dual_block_size": 32}}, "W4A4_MXFP4_DUALSCALE"),
}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.bfloat16) for case in CASES), ("W8A8S", torch.float16), ("W8A8_MIX", torch.float16)],
)
def test_every_kind(
    case: str, dtype: torch.dtype, model_folder: ModelFolder, quantize: Callable[..., Any], tmp_path: Path
) -> None:
    """qwen2 has biases and a tied head."""
    act, weight, label = CASES[case]
    qconfig = {"weight": weight} | ({"act": act} if act is not None else {})
    rule = {"type": "linear_quant", "qconfig": qconfig, "exclude": ["*.down_proj"] if case == "dual scale" else []}
    model = model_folder("qwen2", dtype)
    quantize(model, tmp_path / "out", process=[rule])
    found = verify_folder(tmp_path / "out", model)
    assert not found.problems, found.text()
    assert found.compared
    # Rows of tiny random models have no outliers, so nothing is worth a warning but what engines load.
    assert not [text for text in found.warnings if "vllm-ascend" not in text]
    folder = AscendV1Folder(tmp_path / "out")
    assert {kind for _, kind in folder.layers()} == {label}
    assert found.checked == len(folder.types)
