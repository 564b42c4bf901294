"""What travels between ranks."""

from __future__ import annotations

import pytest
import torch

from slim_core.quantization.statistics import InputStatistics, Need
from slim_core.ranks.group import ALONE, packed, unpacked


def test_one_that_is_alone_waits_for_nobody() -> None:
    value, sums = object(), torch.ones(2)
    assert ALONE.gather(value, "a") == [value]
    assert ALONE.broadcast(value, 0, "a") is value
    ALONE.add_up(sums, None, "a")
    assert torch.equal(sums, torch.ones(2))
    ALONE.tick()
    ALONE.part()


@pytest.mark.parametrize("device", [torch.device("cuda", 1), None])
def test_what_lies_on_the_host_stays_there(device: torch.device | None) -> None:
    """Statistics are packed whatever they hold, and come out as they were."""
    seen = InputStatistics(frozenset({Need.CHANNELS, Need.TOKENS, Need.HISTOGRAM}))
    seen.update(torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)))
    found = unpacked(packed(seen, device), device)
    assert torch.equal(found.kept.tokens(), seen.kept.tokens())
    assert torch.equal(found.channels.total, seen.channels.total)
    assert torch.equal(found.histogram.counts, seen.histogram.counts)
    assert found.channels.total.device.type == "cpu"
    assert found.needs == seen.needs
