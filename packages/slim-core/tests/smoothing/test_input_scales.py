"""The edits of a smoothing without a source: weights take the scale, and the input is multiplied by one over it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from slim_core.checkpoint.reader import Checkpoint
from slim_core.errors import UnexpectedError
from slim_core.model.inputs import is_changed, mul_scale_of
from slim_core.model.skeleton import parameters_on_meta
from slim_core.model.streamed import StreamedModel
from slim_core.model.subgraphs import Subgraph
from slim_core.model.units import Addition
from slim_core.model.weights import Edit, UnitWeights
from slim_core.smoothing.scales import Smoothing, edits_of

CPU = torch.device("cpu")
NAMES = ("layers.0.q", "layers.0.k")
GRAPH = Subgraph("norm-linear", "", NAMES, torch.arange(8))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(8, 6), "k": nn.Linear(8, 4)})])


def called(name: str) -> str:
    """What the checkpoint calls parameters; it knows weights and biases alone."""
    path, _, leaf = name.rpartition(".")
    assert leaf in ("weight", "bias")
    return f"{path.replace('layers.0', 'block.first')}.{leaf}"


def opened(folder: Path, dtype: torch.dtype) -> tuple[StreamedModel, dict[str, Tensor]]:
    torch.manual_seed(0)
    state = {name: value.detach().to(dtype).contiguous() for name, value in Net().state_dict().items()}
    save_file({called(name): value for name, value in state.items()}, folder / "model.safetensors")
    with parameters_on_meta():
        net = Net().to(dtype)
    model = StreamedModel(net, Checkpoint(folder), folder, {}, ("layers",), called)
    return model.with_additions(Addition(mul_scale_of(name), dtype, (8,)) for name in NAMES), state


def block_weights(model: StreamedModel, *, live: bool = False) -> UnitWeights:
    (unit,) = [unit for unit in model.units if unit.block is not None]
    return UnitWeights(model, unit, live=live)


def test_tensors_are_called_like_the_weight(tmp_path: Path) -> None:
    model, _ = opened(tmp_path, torch.float32)
    (unit,) = [unit for unit in model.units if unit.block is not None]
    assert [meta.name for meta in unit.added.values()] == ["block.first.q.div.mul_scale", "block.first.k.div.mul_scale"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_nothing_changes_but_where_the_scale_is(tmp_path: Path, dtype: torch.dtype) -> None:
    model, state = opened(tmp_path, dtype)
    weights, scale = block_weights(model), torch.tensor([1.0, 0.1, 3.3, 1e-5, 700.0, 2.0**20, 2.0**-20, 1.7])
    x = torch.randn(5, 8, dtype=torch.float64)
    product = torch.ones(8)
    for _ in range(2):  # the second comes on top of the first
        done, edits = edits_of(Smoothing(GRAPH, scale), weights)
        weights.apply(edits)
        product = product / done.scale
        factor = weights[mul_scale_of(NAMES[0])].load()
        assert torch.allclose(product, factor, rtol=1e-6, atol=0)
        assert torch.equal(factor, weights[mul_scale_of(NAMES[1])].load())
        stored = weights[mul_scale_of(NAMES[0])].stored_form()
        assert stored.dtype == dtype
        assert torch.equal(stored.float(), factor)
        assert bool((torch.isfinite(stored) & (stored != 0)).all())
        if dtype != torch.float16:
            assert torch.equal(factor.bfloat16().float(), factor)
        for name in NAMES:
            weight, exact = weights[f"{name}.weight"].load().double(), state[f"{name}.weight"].double()
            assert torch.allclose(weight, exact / factor.double(), rtol=1e-6, atol=0)
            assert torch.allclose((x * factor.double()) @ weight.T, x @ exact.T, rtol=0, atol=1e-6)
            assert torch.equal(weights[f"{name}.bias"].load(), state[f"{name}.bias"])
    ordinary = scale.log2().abs() < 7
    near = (factor.double() * scale.double() ** 2 - 1).abs()
    assert float(near[ordinary].max()) <= 2**-7


def test_the_module_computes_the_same_while_it_is_run(tmp_path: Path) -> None:
    model, state = opened(tmp_path, torch.float32)
    (unit,) = [unit for unit in model.units if unit.block is not None]
    model.load(unit.parameters, CPU)
    weights, linear = block_weights(model, live=True), model.module.get_submodule(NAMES[0])
    x = torch.randn(3, 8)
    want = nn.functional.linear(x, state[f"{NAMES[0]}.weight"], state[f"{NAMES[0]}.bias"])
    for scale in (torch.full((8,), 0.25), torch.linspace(0.2, 9, 8)):
        weights.apply(edits_of(Smoothing(GRAPH, scale), weights)[1])
        assert torch.allclose(linear(x), want, atol=1e-5)
        assert not torch.allclose(linear.get_parameter("weight"), state[f"{NAMES[0]}.weight"])
    before = linear(x)
    with pytest.raises(UnexpectedError):
        weights.apply(
            [Edit(mul_scale_of(NAMES[0]), value=torch.ones(8)), Edit(mul_scale_of(NAMES[1]), value=torch.ones(3))]
        )
    assert torch.equal(linear(x), before)
    model.unload([*unit.parameters, *unit.added])
    assert not is_changed(linear)
    assert linear.get_parameter("weight").device.type == "meta"


def test_an_edit_that_fails_half_way_leaves_the_input_as_it_was(tmp_path: Path) -> None:
    model, _ = opened(tmp_path, torch.float32)
    (unit,) = [unit for unit in model.units if unit.block is not None]
    model.load(unit.parameters, CPU)
    weights, linear = block_weights(model, live=True), model.module.get_submodule(NAMES[0])
    kept = weights.hand_over

    def fails_late(name: str) -> None:
        if name == f"{NAMES[1]}.weight" and mul_scale_of(NAMES[1]) in weights:
            raise MemoryError
        kept(name)

    weights.hand_over = fails_late  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(MemoryError):
        weights.apply(edits_of(Smoothing(GRAPH, torch.full((8,), 3.0)), weights)[1])
    assert not is_changed(linear)
    assert mul_scale_of(NAMES[0]) not in weights


def test_what_nothing_was_done_to_is_multiplied_by_one(tmp_path: Path) -> None:
    model, _ = opened(tmp_path, torch.bfloat16)
    weights = block_weights(model)
    weights.fill()
    stored = weights[mul_scale_of(NAMES[1])].stored_form()
    assert stored.dtype == torch.bfloat16
    assert torch.equal(stored, torch.ones(8, dtype=torch.bfloat16))
