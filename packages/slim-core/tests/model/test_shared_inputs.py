"""Which linears read one and the same input: declared or found, and always seen by running the block."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from slim_core.errors import UnsupportedError
from slim_core.model.inputs import change_inputs
from slim_core.model.shared_inputs import find_shared_inputs

BLOCK = "layers.0"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("q", "k", "v", "context_k", "context_v", "out", "late", "first", "second", "idle", "gate"):
            setattr(self, name, nn.Linear(8, 8))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        made = self.q(x) + self.k(x.view(1, -1, 8)) + self.v(input=x)
        made = made + (self.context_k(context) * self.context_v(context)).sum(1, keepdim=True)
        made = self.out(torch.tanh(made)) + self.gate(x)
        zeros, others = torch.zeros(1, 4, 8), torch.zeros(1, 4, 8)
        made = made + self.first(zeros) + self.second(others)
        x += 1  # what is given now is the same tensor, but not the same input
        return made + self.late(x)


@pytest.fixture
def root() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"layers": nn.ModuleList([Block()])})


def found_in(
    root: nn.Module, given: tuple[tuple[str, ...], ...] | None
) -> tuple[list[tuple[str, ...]], dict[str, str]]:
    block = root.get_submodule(BLOCK)
    linears = [f"{BLOCK}.{name}" for name, _ in block.named_children() if name != "gate"]
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(1, 4, 8, generator=generator), torch.randn(1, 5, 8, generator=generator)
    graphs, refused = find_shared_inputs(root, BLOCK, lambda: block(x.clone(), context), linears, given)
    for graph in graphs:
        assert (graph.type, graph.source, graph.label) == ("norm-linear", "", "non-fusion")
        assert graph.name == graph.targets[0]
        assert torch.equal(graph.columns, torch.arange(8))
    short = len(BLOCK) + 1
    groups = [tuple(name[short:] for name in graph.targets) for graph in graphs]
    return groups, {name[short:]: why.replace(f"{BLOCK}.", "") for name, why in refused.items()}


def test_groups_are_found(root: nn.Module) -> None:
    groups, refused = found_in(root, None)
    assert groups == [
        *(("q", "k", "v"), ("context_k", "context_v"), ("out",), ("first",), ("second",), ("late",)),
    ]
    assert refused == {"idle": "it did not run"}


def test_given_groups_are_checked(root: nn.Module) -> None:
    given = (("k", "q"), ("context_v", "v", "absent"), ("late",), ("idle",), ("gate", "out"), ("nothing", "there"))
    groups, refused = found_in(root, given)
    assert groups == [("k", "q"), ("context_v",), ("late",), ("out",)]
    assert refused == {
        "v": "it is not given what context_v is given",
        "idle": "it did not run",
        "gate": "it is no linear that can be quantized",
    }


def test_a_linear_in_two_groups_is_an_error(root: nn.Module) -> None:
    with pytest.raises(UnsupportedError, match=r"layers\.0\.q: the linear is in two groups") as caught:
        found_in(root, (("q", "k"), ("out", "q")))
    assert "scaled_inputs" in (caught.value.remedy or "")


def test_a_rotated_input_is_not_scaled(root: nn.Module) -> None:
    handles = change_inputs(root, {f"{BLOCK}.k": lambda x: x.flip(-1)})
    groups, refused = found_in(root, (("q", "k", "v"),))
    assert groups == [("q", "v")]
    assert refused == {"k": "its input is rotated while the model runs"}
    for handle in handles:
        handle.remove()
    assert found_in(root, (("q", "k", "v"),)) == ([("q", "k", "v")], {})
