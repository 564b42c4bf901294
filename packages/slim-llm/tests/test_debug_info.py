"""``--debug`` tells of every layer which part of the recipe made it, and how."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slim_core.progress import SilentProgress
from slim_core.recipe import recipe_from_dict
from slim_core.runners.plan import Plan
from slim_core.service import QuantRequest
from slim_llm.service import LlmService

TOKEN = {"dtype": "int8", "scope": "per_token", "symmetric": True, "method": "minmax"}
STATIC = {"dtype": "int8", "scope": "per_tensor", "symmetric": False, "method": "histogram"}


def weight(dtype: str, method: str, **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "scope": "per_channel", "symmetric": True, "method": method, **more}


AUTOROUND = {
    "type": "autoround_quant",
    "iters": 1,
    "strategies": [
        {"qconfig": {"act": TOKEN, "weight": weight("int8", "autoround")}, "include": ["*.down_proj"]},
        {
            "qconfig": {
                "act": TOKEN,
                "weight": weight("int4", "autoround", scope="per_group", ext={"group_size": 16}),
            },
            "include": ["*.mlp.*"],
        },
    ],
}
PROCESS = [
    {
        "type": "group",
        "configs": [
            {
                "type": "linear_quant",
                "qconfig": {"act": STATIC, "weight": weight("int8", "ssz")},
                "include": ["*.q_proj"],
            },
            {"type": "linear_quant", "qconfig": {"weight": weight("int4", "minmax")}, "include": ["*.k_proj"]},
            {"type": "dynamic_cache", "details": {"key": {"symmetric": False}}, "include": ["*0.self_attn"]},
            {"type": "fa3_quant", "include": ["*1.self_attn"]},
        ],
    },
    AUTOROUND,
    {"type": "float_sparse", "sparse_ratio": 0.25, "include": ["*.v_proj"]},
]
# linear: kind, position, and a part of its scheme
EXPECTED: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "self_attn.q_proj": ("W8A8", "process[0].configs[0]", {"act.method": "histogram", "weight.method": "ssz"}),
    "self_attn.k_proj": ("W4A16", "process[0].configs[1]", {"act": None, "weight.dtype": "int4"}),
    "self_attn.v_proj": ("W16A16S", "process[2]", {"sparse_ratio": 0.25}),
    "self_attn.o_proj": ("FLOAT", None, {}),
    "mlp.down_proj": ("W8A8_DYNAMIC", "process[1].strategies[0]", {"weight.dtype": "int8", "weight.ext": {}}),
    "mlp.gate_proj": (
        "W4A8_DYNAMIC",
        "process[1].strategies[1]",
        {"act.scope": "per_token", "weight.dtype": "int4", "weight.ext": {"group_size": 16}},
    ),
}


def part(scheme: Any, path: str) -> Any:
    for key in path.split("."):
        scheme = scheme[key]
    return scheme


def test_every_layer_has_the_scheme_that_made_it(
    model_folder: Callable[..., Path], dataset: Path, tmp_path: Path
) -> None:
    """Members of a group, strategies of autoround_quant and attentions, in the plan and in the files."""
    plans: list[Plan] = []
    spec = {"process": PROCESS, "save": [{"type": "ascendv1_saver"}], "dataset": str(dataset)}
    LlmService().quantize(
        QuantRequest(  # pyright: ignore
            model_path=model_folder("qwen3"), save_path=tmp_path / "out", model_type="tiny", device="cpu", debug=True
        ),
        recipe_from_dict({"apiversion": "modelslim_v1", "spec": spec}),
        SilentProgress(),
        on_plan=plans.append,
    )
    planned = {linear.name: linear for unit in plans[0].units for linear in unit.linears}
    info = json.loads((tmp_path / "out" / "debug_info" / "debug_info.json").read_text())
    description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    for block in range(3):
        for leaf, (kind, position, parts) in EXPECTED.items():
            name = f"model.layers.{block}.{leaf}"
            layer = info["layers"][name]
            assert layer["kind"] == planned[name].kind == description[f"{name}.weight"] == kind
            assert planned[name].reason == (f"spec.{position}" if position else "named by no rule")
            assert layer["processor"] == position
            assert (layer["scheme"] is None) == (position is None)
            for path, value in parts.items():
                assert part(layer["scheme"], path) == value, (name, path)
    cache, kernel, plain = (info["attentions"][f"model.layers.{i}.self_attn"] for i in range(3))
    assert cache["processor"] == "process[0].configs[2]"
    assert [cache["scheme"][state]["symmetric"] for state in ("key", "value")] == [False, True]
    assert kernel["processor"] == "process[0].configs[3]"
    assert (kernel["scheme"]["dtype"], kernel["scheme"]["scope"]) == ("int8", "per_head")
    assert (plain["processor"], plain["scheme"]) == (None, None)
