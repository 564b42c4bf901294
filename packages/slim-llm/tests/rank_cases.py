"""Recipes for runs of several ranks, and the process of one rank that carries them out one after the other.

Started as ``torchrun`` starts ranks: ``python rank_cases.py plan.json`` with RANK, WORLD_SIZE and MASTER_ADDR.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from slim_core.progress import SilentProgress
from slim_core.recipe import recipe_from_dict
from slim_core.runners.run import RunResult
from slim_core.service import QuantRequest
from slim_llm.service import LlmService

WEIGHT: dict[str, Any] = {"dtype": "int8", "scope": "per_channel", "symmetric": True, "method": "minmax"}
STATIC: dict[str, Any] = {"dtype": "int8", "scope": "per_tensor", "symmetric": False, "method": "minmax"}
TOKEN: dict[str, Any] = {"dtype": "int8", "scope": "per_token", "symmetric": True, "method": "minmax"}


def linear(act: dict[str, Any] | None = STATIC, include: Any = ("*",), **weight: Any) -> dict[str, Any]:
    qconfig = {"weight": WEIGHT | weight} | ({} if act is None else {"act": act})
    return {"type": "linear_quant", "qconfig": qconfig, "include": list(include)}


SSZ = linear(TOKEN, method="ssz")
GPTQ = linear(TOKEN, method="gptq")
AUTOROUND = {
    "type": "autoround_quant",
    "iters": 3,
    "strategies": [
        {"qconfig": {"act": TOKEN, "weight": {"dtype": "int4", "scope": "per_channel", "method": "autoround"}}}
    ],
}
STATE = {"dtype": "int8", "scope": "per_channel", "symmetric": True, "method": "minmax"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "minmax": ("qwen3", {"process": [linear()]}),
    "mean of extremes": ("qwen3", {"process": [linear(STATIC | {"ext": {"aggregation_type": "mean"}})]}),
    "histogram": ("qwen3", {"process": [linear(STATIC | {"method": "histogram"})]}),
    "ssz": ("qwen3", {"process": [SSZ]}),
    "ssz with static inputs": ("qwen3", {"process": [linear(method="ssz")]}),
    "gptq": ("qwen3", {"process": [GPTQ]}),
    "gptq, quantized outputs handed on": ("qwen3", {"process": [GPTQ], "propagate": "quantized"}),
    "static, quantized outputs handed on": ("qwen3_moe", {"process": [linear()], "propagate": "quantized"}),
    "gptq of experts": ("qwen3_moe", {"process": [GPTQ]}),
    "one expert at a time": ("qwen3_moe_16", {"process": [GPTQ], "propagate": "quantized", "one_expert": True}),
    "starved experts": ("qwen3_moe_16", {"process": [linear()]}),
    "extra samples": (
        "qwen3_moe_16",
        {"process": [linear()], "dataset": {"num_samples": 3, "min_tokens_per_expert": 40, "extra_share": 9}},
    ),
    "routed tokens": (
        "qwen3_moe_16",
        {"process": [linear()], "dataset": {"min_tokens_per_expert": 30, "route_starved_experts": True}},
    ),
    "autoround": ("qwen3", {"process": [AUTOROUND]}),
    "autoround, quantized outputs handed on": ("qwen3", {"process": [AUTOROUND], "propagate": "quantized"}),
    "float_sparse": ("qwen3", {"process": [{"type": "float_sparse", "sparse_ratio": 0.4}]}),
    "smooth_quant": ("qwen3", {"process": [{"type": "smooth_quant"}, linear()]}),
    "iter_smooth": ("qwen3", {"process": [{"type": "iter_smooth"}, linear()]}),
    "iter_smooth, centred": ("qwen3", {"process": [{"type": "iter_smooth", "symmetric": False}, GPTQ]}),
    "flex_smooth_quant": ("qwen3", {"process": [{"type": "flex_smooth_quant"}, linear()]}),
    "flex_smooth_quant of experts": ("qwen3_moe", {"process": [{"type": "flex_smooth_quant"}, linear()]}),
    "flex_awq_ssz": (
        "qwen3",
        {"process": [{"type": "flex_awq_ssz", "qconfig": {"act": TOKEN, "weight": WEIGHT | {"method": "ssz"}}}, SSZ]},
    ),
    "awq": ("qwen3", {"process": [{"type": "awq", "weight_qconfig": WEIGHT}, linear(None)]}),
    "kv_smooth and a cache": (
        "qwen3",
        {"process": [{"type": "kv_smooth"}, linear(), {"type": "dynamic_cache", "qconfig": STATE}]},
    ),
    "fa3_quant": ("deepseek_v3", {"process": [{"type": "fa3_quant", "qconfig": STATE | {"scope": "per_head"}}]}),
    "quarot": ("qwen3", {"process": [{"type": "quarot"}, linear()]}),
    "adapt_rotation": (
        "qwen3",
        {
            "prior": [{"process": [{"type": "adapt_rotation", "stage": 1, "steps": 3}]}],
            "process": [{"type": "adapt_rotation", "stage": 2}, linear()],
        },
    ),
    "group of processors": (
        "qwen3",
        {
            "process": [
                {
                    "type": "group",
                    "configs": [
                        linear(),
                    ],
                }
            ]
        },
    ),
    "no data": ("qwen3", {"process": [linear(TOKEN)], "runner": "dp_layer_wise"}),
}


def run(
    model: str | Path, out: str | Path, dataset: str | Path, spec: dict[str, Any], device: str = "cpu", **request: Any
) -> RunResult:
    """A run; ``one_expert`` in a spec leaves it one byte less memory than it would take with whole blocks."""
    spec = {"save": [{"type": "ascendv1_saver"}], **spec, "dataset": {"path": str(dataset), **spec.get("dataset", {})}}
    one_expert = spec.pop("one_expert", False)
    recipe = recipe_from_dict({"apiversion": "modelslim_v1", "spec": spec})
    asked = QuantRequest(
        model_path=Path(model), save_path=Path(out), model_type="tiny", device=device, force=True, **request
    )
    if one_expert:
        ranks = device.count(",") + 1
        peak = LlmService().plan(asked, recipe).memory.peak
        asked = asked.model_copy(update={"max_memory": f"host={(peak - 1) * ranks}B"})
        assert LlmService().plan(asked, recipe).memory.by_expert
    return LlmService().quantize(asked, recipe, SilentProgress())


def main(plan: Path) -> None:
    import torch

    torch.set_num_threads(1)
    given = json.loads(plan.read_text())
    for name, port in given["ports"].items():
        os.environ["MASTER_PORT"] = str(port)
        family, spec = CASES[name]
        out = Path(given["outputs"]) / name
        result = run(given["models"][family], out, given["dataset"], spec, given["device"])
        told = {"ranks": len(result.rank_peak_bytes), "linears": [record.name for record in result.linears]}
        if os.environ["RANK"] == "0":
            (Path(given["outputs"]) / f"{name}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
