"""The memory that a run is predicted to take, part by part. Whether it does is measured by benchmarks/memory.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch

from slim_core.checkpoint.source import TensorMeta
from slim_core.memory import KEPT_BY_THE_HEAP
from slim_core.model.units import LinearInfo, StreamedModel, Unit
from slim_core.processors.base import Assignment, Processor
from slim_core.processors.float_sparse import FloatSparse, FloatSparseConfig
from slim_core.processors.linear_quant import LinearQuant, LinearQuantConfig
from slim_core.quantization.kinds import LayerForm, LayerKind
from slim_core.quantization.statistics import Need
from slim_core.runners.choice import RunnerChoice
from slim_core.runners.prediction import Calibration, peak_memory

HIDDEN, INNER = 2048, 8192
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
LAYER_WISE, MODEL_WISE = RunnerChoice("layer_wise", ""), RunnerChoice("model_wise", "")
BLOCK = 2 * sum(out * width for out, width in SHAPES.values())


def linears(block: int) -> tuple[LinearInfo, ...]:
    return tuple(
        LinearInfo(f"layers.{block}.{leaf}", f"layers.{block}.{leaf}", width, out, False, True)
        for leaf, (out, width) in SHAPES.items()
    )


def model(blocks: int = 2) -> StreamedModel:
    """Blocks of bf16 linears, without anything behind them."""
    metas = {
        f"{info.name}.weight": TensorMeta("", torch.bfloat16, (info.out_features, info.in_features))
        for block in range(blocks)
        for info in linears(block)
    }
    units = [
        Unit(f"layers.{i}", i, {}, {f"{info.name}.weight": f"{info.name}.weight" for info in linears(i)}, linears(i))
        for i in range(blocks)
    ]
    source = SimpleNamespace(meta=metas.__getitem__)
    return cast("StreamedModel", SimpleNamespace(units=units, source=source, dtype=torch.bfloat16))


def names(blocks: int = 2) -> list[str]:
    return [info.name for block in range(blocks) for info in linears(block)]


NOTHING_WAITS = Calibration(0)


def peak(
    calibration: Calibration | None = NOTHING_WAITS,
    processors: Sequence[Processor] = (),
    needs: Mapping[str, frozenset[Need]] | None = None,
    runner: RunnerChoice = LAYER_WISE,
    blocks: int = 2,
) -> int:
    owned = {name: Assignment(LayerForm(LayerKind.W8A8), "process[0]", "") for name in names(blocks)}
    return peak_memory(model(blocks), runner, processors, owned, needs or {}, calibration)


class Takes(Processor):
    def __init__(self, size: int, reshapes: bool = False) -> None:
        super().__init__(None, "process[0]")
        self._size, self._reshapes = size, reshapes

    @property
    def reshapes(self) -> bool:
        return self._reshapes

    def working_bytes(self, linears: Any, assignments: Any) -> int:
        return self._size


def test_one_block_is_loaded_at_a_time_unless_the_model_is_kept() -> None:
    assert peak(blocks=2) == peak(blocks=40)
    assert peak(runner=MODEL_WISE, blocks=4) - peak(blocks=4) == 3 * BLOCK


def test_without_calibration_no_block_is_loaded() -> None:
    assert peak(None, blocks=2) == peak(None, blocks=40) < BLOCK


def test_statistics_are_kept_once_for_an_input() -> None:
    def asked(need: Need) -> int:
        return peak(needs=dict.fromkeys(names(), frozenset({need}))) - peak(needs={})

    assert asked(Need.HESSIAN) == 4 * (3 * HIDDEN**2 + INNER**2)
    assert asked(Need.TOKENS) == 4 * 512 * (3 * HIDDEN + INNER)
    assert asked(Need.RANGE) == 0
    other = peak(needs={"layers.0.self_attn.k_proj": frozenset({Need.HESSIAN})})
    assert other - peak(needs={}) == 4 * HIDDEN**2


def test_processors_take_turns_but_what_is_reshaped_stays() -> None:
    large = 1 << 30
    alone = peak(processors=[Takes(large)])
    assert peak(processors=[Takes(large), Takes(large // 2)]) == alone
    assert peak(processors=[Takes(large), Takes(large // 2, reshapes=True)]) == alone + large // 2


def test_activations_and_layers_that_wait() -> None:
    assert peak(Calibration(5 << 20)) - peak(Calibration(0)) == 5 << 20
    assert peak(Calibration(0, keeps_layers=True)) > peak() + BLOCK // 2
    long = peak(Calibration(0, tokens=4096)) - peak(Calibration(0, tokens=2048))
    assert long == 2048 * INNER * 2 * 4
    assert peak(Calibration(0, tokens=4096, trains=True)) > peak(Calibration(0, tokens=4096))


def test_what_methods_need_for_the_linear_at_work() -> None:
    """Either the Hessian in order and its factor, or the factor and copies of the weight, whichever is more."""
    weight = {"dtype": "int8", "scope": "per_channel", "symmetric": True}
    gptq, minmax = (
        LinearQuant(LinearQuantConfig.model_validate({"qconfig": {"weight": weight | {"method": one}}}), "process[0]")
        for one in ("gptq", "minmax")
    )
    sparse = FloatSparse(FloatSparseConfig(), "process[1]")
    infos = linears(0)
    owned = {info.name: Assignment(LayerForm(LayerKind.W8A16), "process[0]", "") for info in infos}
    assert minmax.working_bytes(infos, owned) == 0
    assert gptq.working_bytes(infos, owned) == 8 * INNER**2 + KEPT_BY_THE_HEAP  # down_proj
    wide = infos[4:5]
    made_good = 4 * INNER * 6 * 128
    assert gptq.working_bytes(wide, owned) == 4 * HIDDEN**2 + 7 * HIDDEN * INNER + made_good + KEPT_BY_THE_HEAP
    assert gptq.working_bytes(infos, {}) == 0
    theirs = {infos[6].name: Assignment(LayerForm(LayerKind.W16A16S), "process[1]", "")}
    assert sparse.working_bytes(infos, theirs) == 8 * INNER**2 + 15 * HIDDEN * INNER + (40 << 20)
