"""What of a block's output counts, for those who run the block themselves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from slim_core.runners.kept_block import KeptBlock, hidden_states

CPU = torch.device("cpu")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TEXT, PICTURE = drawn(2, 3, 8), drawn(2, 5, 8, seed=1)


@pytest.mark.parametrize(
    ("output", "streams"),
    [
        (PICTURE, [PICTURE]),
        ((PICTURE,), [PICTURE]),
        ((TEXT, PICTURE), [TEXT, PICTURE]),  # FLUX, Qwen-Image
        ((PICTURE, TEXT), [PICTURE, TEXT]),  # HunyuanVideo
        ((None, PICTURE), [PICTURE]),  # the last block of SD3
        ([PICTURE, TEXT], [PICTURE, TEXT]),
        # Language models: weights of attentions, what is cached, logits of a router.
        ((PICTURE, drawn(2, 4, 5, 8)), [PICTURE]),
        ((PICTURE, (TEXT, TEXT)), [PICTURE]),
        ((PICTURE, drawn(10, 8)), [PICTURE]),
        ((PICTURE, drawn(2, 5, 4)), [PICTURE]),
        ((PICTURE, torch.ones(2, 5, 8, dtype=torch.int64)), [PICTURE]),
    ],
)
def test_hidden_states(output: Any, streams: list[Tensor]) -> None:
    found = hidden_states(output)
    if len(streams) == 1:
        assert found is streams[0]
    else:
        assert torch.equal(found, torch.cat([stream.reshape(-1, 8) for stream in streams]))


def test_both_streams_are_held_against_the_float_block() -> None:
    """Whatever is wrong with one of them shows."""
    forwards: Any = SimpleNamespace(present=lambda stream: [1], compute=lambda sample: {1: (TEXT, PICTURE + 1)}[sample])
    model: Any = SimpleNamespace(module=None)
    block = KeptBlock(model, forwards, [None, (TEXT, PICTURE)], CPU)  # the first sample passes this block by
    assert block.samples == 1
    difference = (block.run(0) - block.target(0)).abs()
    assert difference.shape == (2 * (3 + 5), 8)
    assert float(difference[:6].max()) == 0
    assert float((difference[6:] - 1).abs().max()) < 1e-6
