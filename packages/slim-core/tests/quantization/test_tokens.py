"""The sample of tokens: which are in it, whatever the order in which they came."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slim_core.errors import InvalidModelError, UnsupportedError
from slim_core.quantization.statistics.tokens import TokenSample


def activations(count: int, width: int, seed: int) -> Tensor:
    """Tokens whose largest values spread over many octaves, few of them large."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(count, 1, generator=generator).pow(-0.7)
    return torch.randn(count, width, generator=generator) * sizes


def sample_tokens(batches: Iterable[Tensor], size: int) -> Tensor:
    sample = TokenSample(size)
    for batch in batches:
        sample.update(batch)
    return sample.tokens()


def level(token: Tensor) -> int:
    return math.floor(2 * math.log2(float(token.abs().max())))


def shares(counts: dict[int, int], size: int) -> dict[int, int]:
    """Tokens handed out one by one, largest stratum first in every round: the naive way."""
    taken = dict.fromkeys(counts, 0)
    while sum(taken.values()) < size and taken != counts:
        for stratum in sorted(counts, reverse=True):
            if taken[stratum] < counts[stratum] and sum(taken.values()) < size:
                taken[stratum] += 1
    return taken


def histogram(tokens: Tensor) -> dict[int, int]:
    counts: dict[int, int] = {}
    for token in tokens:
        counts[level(token)] = counts.get(level(token), 0) + 1
    return counts


@given(st.integers(1, 120), st.integers(1, 40), st.integers(0, 99), st.data())
def test_any_order_and_any_batches(count: int, size: int, seed: int, data: st.DataObject) -> None:
    tokens = activations(count, 5, seed)
    whole = sample_tokens([tokens], size)
    order = data.draw(st.permutations(range(count)))
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=5)))
    shuffled = tokens[list(order)]
    parts = [shuffled[a:b] for a, b in zip([0, *cuts], [*cuts, count], strict=True)]
    assert torch.equal(sample_tokens(parts, size), whole)
    ranks = [TokenSample(size), TokenSample(size), TokenSample(size)]
    for i, part in enumerate(parts):
        ranks[i % 2].update(part)
    ranks[1].merge(ranks[0])
    ranks[1].merge(ranks[2])
    assert torch.equal(ranks[1].tokens(), whole)
    assert ranks[1].seen == count


@given(st.integers(1, 120), st.integers(1, 40), st.integers(0, 99))
def test_every_stratum_has_its_share(count: int, size: int, seed: int) -> None:
    tokens = activations(count, 3, seed)
    found = sample_tokens([tokens], size)
    assert len(found) == min(count, size)
    assert histogram(found) == {k: n for k, n in shares(histogram(tokens), size).items() if n}
    rows = {tuple(row) for row in tokens.tolist()}
    assert len({tuple(row) for row in found.tolist()} & rows) == len(found)
    levels = [level(token) for token in found]
    assert levels == sorted(levels)


def test_the_few_with_outliers_are_in_it() -> None:
    tokens = torch.rand(5000, 8, generator=torch.Generator().manual_seed(0)) + 0.5
    tokens[[17, 4000]] *= 300
    found = sample_tokens(tokens.split(64), 100)
    assert int((found.amax(1) > 100).sum()) == 2


def test_chosen_evenly_inside_a_stratum() -> None:
    """Not by position, not by size: the mean of what is taken is that of the stratum."""
    values = torch.linspace(1.0, 1.4, 4000)
    tokens = torch.stack([values, torch.zeros(4000)], 1)
    found = sample_tokens([tokens], 1000)[:, 0]
    assert abs(float(found.mean()) - 1.2) < 0.01
    assert abs(float(found.std()) - float(values.std())) < 0.01


def test_memory_is_that_of_the_sample_and_a_batch() -> None:
    sample = TokenSample(50)
    for seed in range(40):
        sample.update(activations(100, 4, seed).reshape(4, 25, 4))
        assert len(sample._buffer) <= 50 + len(sample._counts) + 64
    assert sample.seen == 4000


def test_counts_bring_the_sample_back_to_all_tokens() -> None:
    tokens = activations(3000, 4, 0)
    sample = TokenSample(200)
    for part in tokens.split(100):
        sample.update(part)
    counts = sample.counts()
    assert len(counts) == 200
    assert float(counts.sum()) == pytest.approx(3000)
    found, seen = histogram(sample.tokens()), histogram(tokens)
    for token, count in zip(sample.tokens(), counts.tolist(), strict=True):
        assert count == pytest.approx(seen[level(token)] / found[level(token)])
    mean = (sample.tokens().abs().amax(1) * counts).sum() / counts.sum()
    assert float(mean) == pytest.approx(float(tokens.abs().amax(1).mean()), rel=0.03)


def test_a_smaller_sample_of_a_sample_is_that_of_all_tokens() -> None:
    tokens = activations(3000, 4, 0)
    large, small, direct = TokenSample(200), TokenSample(50), TokenSample(50)
    for part in tokens.split(100):
        large.update(part)
        direct.update(part)
    small.merge(large)
    assert torch.equal(small.tokens(), direct.tokens())
    assert torch.equal(small.counts(), direct.counts())
    scale = torch.tensor([1.0, 2.0, 4.0, 0.5])
    assert torch.equal(small.rescaled(scale).tokens(), direct.tokens() / scale)
    assert torch.equal(small.tokens(), direct.tokens())


def test_half_precision_zeros_and_nothing() -> None:
    tokens = activations(20, 4, 0).bfloat16()
    tokens[::2] = 0.0
    found = sample_tokens([tokens, torch.zeros(3, 4).bfloat16(), torch.zeros(0, 4)], 50)
    assert found.dtype == torch.float32
    assert sorted(found.tolist()) == sorted(tokens[1::2].float().tolist())
    assert torch.equal(sample_tokens([-torch.zeros(1, 2) + torch.tensor([1.0, -0.0])], 1), torch.tensor([[1.0, 0.0]]))


def test_bad_tokens() -> None:
    with pytest.raises(UnsupportedError, match="no token was seen"):
        sample_tokens([torch.zeros(3, 2)], 4)
    with pytest.raises(InvalidModelError, match="hold NaN or infinity"):
        sample_tokens([torch.tensor([[1.0, math.nan]])], 4)
    with pytest.raises(UnsupportedError, match="tokens of different widths, 2 and 3, cannot share a sample"):
        sample_tokens([torch.ones(1, 2), torch.ones(1, 3)], 4)


def test_room_grows_in_few_steps() -> None:
    """A larger buffer lies beside the last while it is filled."""
    sample, rooms = TokenSample(512), set[int]()
    for seed in range(40):
        sample.update(activations(40, 8, seed))
        rooms.add(len(sample._buffer))
    assert len(rooms) <= 6
    assert max(rooms) <= 640
    assert torch.equal(sample.tokens(), sample_tokens([activations(40, 8, seed) for seed in range(40)], 512))
