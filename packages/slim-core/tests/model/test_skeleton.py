"""Models without weights, and where their blocks are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from slim_core.errors import InvalidModelError
from slim_core.model.skeleton import find_blocks, parameters_on_meta


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("frequencies", torch.arange(4.0) ** 2, persistent=False)
        self.register_buffer("table", torch.arange(3))
        self.register_parameter("nothing", None)


def test_parameters_are_on_meta_and_buffers_are_real() -> None:
    with parameters_on_meta():
        net = Net()
    assert {p.device.type for p in net.parameters()} == {"meta"}
    assert all(isinstance(p, nn.Parameter) and not p.requires_grad for p in net.parameters())
    assert net.frequencies.tolist() == [0, 1, 4, 9]
    assert net.table.tolist() == [0, 1, 2]
    assert net.nothing is None
    assert net.head.weight is net.embed.weight


def test_afterwards_parameters_are_real_again() -> None:
    original = nn.Module.register_parameter
    with pytest.raises(ZeroDivisionError), parameters_on_meta():
        raise ZeroDivisionError
    assert nn.Module.register_parameter is original
    assert nn.Linear(2, 2).weight.device.type == "cpu"


class Large(nn.Module):
    """More than any machine has memory for."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.empty(512, 1 << 20, 1 << 14))
        self.zeros = nn.Parameter(torch.zeros((512, 1 << 34)))
        self.sized = nn.Parameter(torch.rand(size=(1 << 21, 1 << 21)))
        self.embed = nn.Embedding(1 << 32, 1 << 10)
        self.small = nn.Parameter(torch.ones(3))
        self.register_buffer("table", torch.zeros(1 << 10))


def test_parameters_larger_than_memory_are_never_allocated() -> None:
    with parameters_on_meta():
        net = Large()
    assert {p.device.type for p in net.parameters()} == {"meta"}
    assert net.experts.shape == (512, 1 << 20, 1 << 14)
    assert net.table.device.type == "cpu"
    assert torch.zeros(1 << 10).device.type == "cpu"


def test_a_buffer_too_large_to_be_computed() -> None:
    original = nn.Module.register_buffer
    with parameters_on_meta(), pytest.raises(InvalidModelError, match="buffer 'mask' of Module has 1099511627776 elem"):
        nn.Module().register_buffer("mask", torch.ones(1 << 20, 1 << 20).tril())
    assert nn.Module.register_buffer is original


def test_blocks_are_the_list_with_most_parameters() -> None:
    net = nn.Module()
    net.small = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))
    net.inner = nn.Module()
    net.inner.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
    net.empty = nn.ModuleList()
    assert find_blocks(net) == "inner.layers"


def test_lists_inside_a_list_do_not_count() -> None:
    net = nn.Module()
    net.layers = nn.ModuleList()
    for _ in range(2):
        block = nn.Module()
        block.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        net.layers.append(block)
    assert find_blocks(net) == "layers"


def test_the_blocks_of_another_modality_are_set_aside() -> None:
    net = nn.Module()
    net.tower = nn.Module()
    net.tower.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
    net.towers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    net.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
    assert find_blocks(net) == "tower.layers"
    assert find_blocks(net, ["tower"]) == "towers", "a module whose name begins alike is another one"
    assert find_blocks(net, ["tower", "towers"]) == "layers"


@pytest.mark.parametrize("lists", [[], [nn.ModuleList()], [nn.ModuleList([nn.ReLU()])]])
def test_no_blocks(lists: list[nn.ModuleList]) -> None:
    net = nn.Module()
    net.linear = nn.Linear(2, 2)
    for i, entry in enumerate(lists):
        net.add_module(f"list{i}", entry)
    with pytest.raises(InvalidModelError, match="Module has no list of decoder blocks"):
        find_blocks(net)
