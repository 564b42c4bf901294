"""The memory that a run is predicted to take, part by part. Whether it does is measured by benchmarks/memory.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from slim_core.checkpoint.source import TensorMeta
from slim_core.model.experts import ExpertLayer
from slim_core.model.streamed import StreamedModel
from slim_core.model.units import LinearInfo, Unit
from slim_core.processors.base import Assignment, Processor
from slim_core.processors.float_sparse import FloatSparse, FloatSparseConfig
from slim_core.processors.linear_quant import LinearQuant, LinearQuantConfig
from slim_core.quantization.kinds import LayerForm, LayerKind
from slim_core.quantization.statistics import Need, hessian_bytes
from slim_core.runners.choice import RunnerChoice
from slim_core.runners.prediction import Calibration, TowerLoad, memory_shares

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


NO_MODULES = SimpleNamespace(get_submodule=lambda name: nn.Identity())


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
    found = SimpleNamespace(units=units, running=units, source=source, dtype=torch.bfloat16, module=NO_MODULES)
    return cast("StreamedModel", found)


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
    shares = memory_shares(model(blocks), runner, processors, owned, needs or {}, calibration)
    return sum(share.nbytes for share in shares)


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

    factorisations = 4 << 20  # their code
    assert asked(Need.HESSIAN) == 3 * hessian_bytes(HIDDEN) + hessian_bytes(INNER) + factorisations
    assert asked(Need.TOKENS) == 4 * 512 * (3 * HIDDEN + INNER)
    looked_at = Calibration(0, tokens=4096)
    tokens = dict.fromkeys(names(), frozenset({Need.TOKENS}))
    assert peak(looked_at, needs=tokens) - peak(looked_at) - asked(Need.TOKENS) == INNER * (
        4096 * (2 * 2 + 4) + 4 * 256
    )
    assert asked(Need.RANGE) == 0
    other = peak(needs={"layers.0.self_attn.k_proj": frozenset({Need.HESSIAN})})
    assert other - peak(needs={}) == hessian_bytes(HIDDEN) + factorisations


def test_processors_take_turns_but_what_is_reshaped_stays() -> None:
    large = 1 << 30
    alone = peak(processors=[Takes(large)])
    assert peak(processors=[Takes(large), Takes(large // 2)]) == alone
    assert peak(processors=[Takes(large), Takes(large // 2, reshapes=True)]) == alone + large // 2


def test_reshaped_weights_are_copied_only_for_another_run() -> None:
    class Copies(Takes):
        def copied_bytes(self, linears: Any) -> int:
            return 3 << 20

    again, not_again = (peak(Calibration(0, runs_again=one), [Copies(1 << 30, reshapes=True)]) for one in (True, False))
    assert again - not_again == (3 << 20) + BLOCK


def test_a_block_that_has_run_for_the_last_time_is_not_in_memory_while_it_is_quantized() -> None:
    """Either the block and what runs inside it, or the work on it, whichever is more."""
    runs_once, runs_again = Calibration(0, runs_again=False), Calibration(0)
    assert peak(runs_once, [Takes(BLOCK // 2)]) == peak(runs_once)
    assert peak(runs_again, [Takes(BLOCK // 2)]) >= peak(runs_once) + BLOCK // 2
    assert peak(runs_once, [Takes(3 * BLOCK)]) > peak(runs_once) + BLOCK
    kept = peak(runs_once, [Takes(3 * BLOCK)], runner=MODEL_WISE)
    assert kept - peak(runs_once, [Takes(3 * BLOCK)]) == 2 * BLOCK


def test_a_head_that_no_sample_runs_through_is_not_counted() -> None:
    whole = model()
    head = LinearInfo("lm_head", "lm_head", HIDDEN, 1 << 20, False, False)
    units = [*whole.units, Unit("epilogue", None, {}, {}, (head,))]
    wide = cast("StreamedModel", SimpleNamespace(**{**vars(whole), "units": units, "running": whole.units}))
    owned = {name: Assignment(LayerForm(LayerKind.W8A8), "process[0]", "") for name in names()}
    shares = [memory_shares(one, LAYER_WISE, [], owned, {}, NOTHING_WAITS) for one in (whole, wide)]
    assert shares[0] == shares[1]


def test_activations_and_layers_that_wait() -> None:
    assert peak(Calibration(5 << 20)) - peak(Calibration(0)) == 5 << 20
    assert peak(Calibration(0, keeps_layers=True)) > peak() + BLOCK // 2
    long, longer = Calibration(0, tokens=8192), Calibration(0, tokens=16384)
    assert peak(longer) - peak(long) == 8192 * HIDDEN * 2 * 4  # the feed-forward part is given some tokens at a time
    whole = {name: frozenset({Need.SAMPLE_RANGES}) for name in names()}
    assert peak(longer, needs=whole) - peak(long, needs=whole) == 8192 * INNER * 2 * 4
    on_device = [replace(one, device="npu") for one in (long, longer)]  # all of these tokens are one portion there
    assert peak(on_device[1]) - peak(on_device[0]) == 8192 * INNER * 2 * 4
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
    assert gptq.working_bytes(infos, owned) == 8 * INNER**2  # down_proj
    wide = infos[4:5]
    made_good = 4 * INNER * 6 * 128
    assert gptq.working_bytes(wide, owned) == 4 * HIDDEN**2 + 7 * HIDDEN * INNER + made_good
    assert gptq.working_bytes(infos, {}) == 0
    theirs = {infos[6].name: Assignment(LayerForm(LayerKind.W16A16S), "process[1]", "")}
    assert sparse.working_bytes(infos, theirs) == 8 * INNER**2 + 15 * HIDDEN * INNER + (40 << 20)


EXPERTS, WIDE, NARROW = 6, 512, 192
PLACES = {"gate_proj": (NARROW, WIDE), "up_proj": (NARROW, WIDE), "down_proj": (WIDE, NARROW)}


def mixture(dtype: torch.dtype = torch.float32) -> tuple[StreamedModel, dict[str, tuple[ExpertLayer, ...]]]:
    """Two blocks of experts and one other linear, and the layers of experts."""
    units, layers, metas = [], {}, {}
    for block in range(2):
        shapes = {f"layers.{block}.o_proj": (WIDE, WIDE)}
        numbered = {
            number: {place: f"layers.{block}.mlp.experts.{number}.{place}" for place in PLACES}
            for number in range(EXPERTS)
        }
        shapes |= {name: PLACES[place] for one in numbered.values() for place, name in one.items()}
        infos = tuple(LinearInfo(name, name, width, out, False, True) for name, (out, width) in shapes.items())
        weights = {f"{name}.weight": f"{name}.weight" for name in shapes}
        metas |= {f"{name}.weight": TensorMeta("", dtype, shape) for name, shape in shapes.items()}
        units.append(Unit(f"layers.{block}", block, weights, weights, infos))
        layers[f"layers.{block}"] = (ExpertLayer(f"layers.{block}.mlp.experts", numbered),)
    source = SimpleNamespace(meta=metas.__getitem__)
    found = SimpleNamespace(units=units, running=units, source=source, dtype=dtype, module=NO_MODULES)
    return cast("StreamedModel", found), layers


def test_of_experts_one_at_a_time_is_in_memory() -> None:
    """What processors leave of the weights that they reshape goes with them; statistics of all stay."""
    model, layers = mixture()
    names = [info.name for unit in model.units for info in unit.linears]
    owned = {name: Assignment(LayerForm(LayerKind.W8A8), "process[0]", "") for name in names}
    needs = dict.fromkeys(names, frozenset({Need.HESSIAN}))
    whole, one = (
        memory_shares(model, LAYER_WISE, [Reshapes()], owned, needs, NOTHING_WAITS, experts) for experts in ({}, layers)
    )
    assert [share.what for share in whole][1:] == [share.what for share in one][1:]
    saved = [before.nbytes - after.nbytes for before, after in zip(whole, one, strict=True)]
    expert = 4 * 3 * WIDE * NARROW
    assert saved[0] == (EXPERTS - 1) * expert
    assert saved[3] == (EXPERTS - 1) * expert
    assert sum(saved) == saved[0] + saved[3]
    assert one[0].nbytes == 4 * WIDE * WIDE + expert
    assert one[1].what == "Hessians of the inputs of layers.0"
    assert one[1].nbytes == (1 + EXPERTS) * hessian_bytes(WIDE) + EXPERTS * hessian_bytes(NARROW)


def test_kernels_for_the_tokens_of_experts() -> None:
    """The library has those of float32 ready, and more tokens than in a sample need none."""
    waits = Calibration(0, tokens=256)
    half, full = (memory_shares(mixture(t)[0], LAYER_WISE, [], {}, {}, waits) for t in (torch.bfloat16, torch.float32))
    assert half[-1].nbytes == 64 << 20
    assert full[-1].nbytes == 0
    few = memory_shares(mixture(torch.bfloat16)[0], LAYER_WISE, [], {}, {}, Calibration(0, tokens=64))
    assert few[-1].nbytes == 16 << 20
    dense = memory_shares(model(), LAYER_WISE, [], {}, {}, waits)
    assert dense[-1].nbytes == 0


class Reshapes(Processor):
    reshapes = True

    def __init__(self) -> None:
        super().__init__(None, "process[0]")

    def working_bytes(self, linears: Any, assignments: Any) -> int:
        return 4 * sum(info.in_features * info.out_features for info in linears)


def test_images_wait_ahead_of_a_tower_and_nowhere_else() -> None:
    source = model()
    tower = replace(source.units[0], name="tower", block=None, stop=0)
    seeing = cast("StreamedModel", SimpleNamespace(**{**vars(source), "units": [tower], "running": [tower]}))
    load = TowerLoad(tokens=4096, largest=3 << 20, total=90 << 20)
    once, twice = Calibration(0, runs_again=False, towers=load), Calibration(0, towers=load)

    def images(calibration: Calibration, of: StreamedModel) -> int:
        shares = memory_shares(of, LAYER_WISE, [], {}, {}, calibration)
        return sum(share.nbytes for share in shares if "images" in share.what)

    assert images(once, seeing) == 7 * (3 << 20)
    assert images(twice, seeing) == 90 << 20
    assert images(twice, source) == 0
    few = replace(once, towers=replace(load, tokens=2048))
    inside = [
        next(share.nbytes for share in memory_shares(seeing, LAYER_WISE, [], {}, {}, one) if "inside" in share.what)
        for one in (once, few)
    ]
    assert inside[0] > inside[1]
