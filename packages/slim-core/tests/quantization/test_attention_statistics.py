"""Statistics of states: exact, and independent of the order and the batching of samples."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slim_core.errors import InvalidModelError, SpecError, UnexpectedError
from slim_core.model.attention import AttentionInfo
from slim_core.quantization.attention import AttentionForm, AttentionKind, StateForm
from slim_core.quantization.statistics.attention import AttentionStatistics, Largest, StateStatistics, above_bound

CHANNEL, HEAD = StateForm("int8", "per_channel"), StateForm("int8", "per_head")
FORMS = [
    CHANNEL,
    HEAD,
    StateForm("int8", "per_channel", True, 0.99),
    StateForm("int8", "per_channel", False, 0.99),
    StateForm("int8", "per_head", True, 0.9),
    StateForm("fp8_e4m3", "per_head", True, 0.9999),
]


def sample(seed: int, tokens: int, batch: int = 1, heads: int = 2, dim: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, tokens, dim, generator=generator).exp() * torch.randn(
        batch, heads, tokens, dim, generator=generator
    )


def observed(form: StateForm, samples: list[Tensor], tokens: int | None = None) -> StateStatistics:
    seen = StateStatistics.of(form, samples[0].shape[3], tokens or sum(x.shape[0] * x.shape[2] for x in samples))
    for x in samples:
        seen.update(x)
    return seen


def same(one: StateStatistics, other: StateStatistics) -> None:
    for mine, others in zip(one.bounds("a", "key"), other.bounds("a", "key"), strict=True):
        assert torch.equal(mine, others)
    assert one.tokens == other.tokens


def naive(form: StateForm, samples: list[Tensor]) -> tuple[list[float], list[float]]:
    """Bounds by sorting all values of every channel or head, in plain Python."""
    heads, dim = samples[0].shape[1], samples[0].shape[3]
    rows = [(h, slice(d, d + 1)) for h in range(heads) for d in range(dim)]
    rows = rows if form.scope == "per_channel" else [(h, slice(None)) for h in range(heads)]
    lows, highs = [], []
    for head, channels in rows:
        values = sorted(float(v) for x in samples for v in x[:, head, :, channels].flatten())
        keep = math.ceil(Fraction(str(form.share)) * len(values))
        if form.symmetric:
            bound = sorted(abs(v) for v in values)[keep - 1]
            lows.append(max(values[0], -bound))
            highs.append(min(values[-1], bound))
        else:
            side = math.ceil(Fraction(str((1 + form.share) / 2)) * len(values))
            lows.append(values[len(values) - side])
            highs.append(values[side - 1])
    return lows, highs


@pytest.mark.parametrize("form", FORMS)
def test_equals_sorting_everything(form: StateForm) -> None:
    samples = [sample(seed, tokens, batch) for seed, tokens, batch in ((0, 50, 1), (1, 3, 4), (2, 70, 2), (3, 1, 1))]
    low, high = observed(form, samples).bounds("a", "key")
    assert (low.tolist(), high.tolist()) == naive(form, samples)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25, deadline=None)
@given(data=st.data(), seeds=st.lists(st.integers(0, 1000), min_size=1, max_size=5))
def test_order_batching_and_merging_do_not_matter(form: StateForm, data: st.DataObject, seeds: list[int]) -> None:
    samples = [sample(seed, 1 + seed % 7) for seed in seeds]
    whole = observed(form, samples)
    order = data.draw(st.permutations(range(len(samples))))
    same(whole, observed(form, [samples[i] for i in order]))
    tokens = sum(x.shape[2] for x in samples)
    cut = data.draw(st.integers(0, len(samples)))
    parts = [StateStatistics.of(form, 3, tokens) for _ in range(2)]
    for i in order:
        parts[i < cut].update(samples[i])
    parts[0].merge(parts[1])
    same(whole, parts[0])
    equal = [sample(seed, 4) for seed in seeds]
    same(observed(form, equal), observed(form, [torch.cat(equal)]))


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.integers(-20, 20), min_size=1, max_size=60), share=st.sampled_from([0.5, 0.9, 0.99, 0.9999]))
def test_the_bound_holds_the_share_and_is_the_narrowest(values: list[int], share: float) -> None:
    largest = Largest(above_bound(len(values), share) + 1)
    for start in range(0, len(values), 7):
        largest.update(torch.tensor([values[start : start + 7]], dtype=torch.float32))
    bound = float(largest.bound(share))
    inside = sum(v <= bound for v in values)
    assert inside >= Fraction(str(share)) * len(values)
    assert sum(v < bound for v in values) < Fraction(str(share)) * len(values)


def test_no_more_is_kept_than_is_needed() -> None:
    seen = StateStatistics.of(StateForm("int8", "per_head", True, 0.9999), 128, 2048 * 128)
    assert seen.magnitudes is not None
    assert seen.magnitudes.keep == math.floor(Fraction("0.0001") * 2048 * 128 * 128) + 1
    for seed in range(3):
        seen.update(sample(seed, 40, dim=128))
    assert seen.magnitudes.values is not None
    assert seen.magnitudes.values.shape == (2, seen.magnitudes.keep)
    assert StateStatistics.of(HEAD, 128, 10).magnitudes is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_are_float32(dtype: torch.dtype) -> None:
    form = StateForm("int8", "per_head", True, 0.9)
    x = sample(0, 30).to(dtype)
    same(observed(form, [x]), observed(form, [x.float()]))
    assert observed(form, [x]).bounds("a", "key")[0].dtype == torch.float32


def test_channels_are_ordered_head_by_head() -> None:
    x = torch.arange(6.0).view(1, 2, 1, 3)
    assert observed(CHANNEL, [x]).bounds("a", "key")[1].tolist() == [0, 1, 2, 3, 4, 5]
    assert observed(HEAD, [x]).bounds("a", "key")[1].tolist() == [2, 5]


def test_empty_batches_change_nothing() -> None:
    x = sample(0, 9)
    seen = observed(FORMS[2], [x, x[:, :, :0], x[:0]])
    same(seen, observed(FORMS[2], [x]))


def test_of_an_attention_only_static_states_are_observed() -> None:
    info = AttentionInfo("a", "a", 4, 2, 3, 5)
    token = StateForm("int8", "per_token")
    form = AttentionForm(AttentionKind.FAQUANT, token, HEAD, CHANNEL)
    seen, other = AttentionStatistics.of(form, info, 8), AttentionStatistics.of(form, info, 8)
    assert set(seen.states) == {"key", "value"}
    key, value = sample(0, 4), sample(1, 4, dim=5)
    assert seen.observe(sample(2, 4, heads=4), key, value) is None
    other.observe(None, key, value)
    seen.merge(other)
    assert seen.states["key"].tokens == 8
    assert torch.equal(seen.states["value"].bounds("a", "value")[1], value.amax((0, 2)).flatten())


def test_what_goes_wrong_is_named() -> None:
    with pytest.raises(SpecError, match=r"model\.attn: no calibration sample reached .* range of its key"):
        StateStatistics(HEAD).bounds("model.attn", "key")
    broken = sample(0, 4)
    for value in (float("nan"), float("inf")):
        broken[0, 0, 0, 0] = value
        for form in FORMS:
            with pytest.raises(InvalidModelError, match=r"model\.attn: its value holds NaN or infinity"):
                observed(form, [sample(1, 4), broken, sample(2, 4)]).bounds("model.attn", "value")
    with pytest.raises(UnexpectedError, match="largest of 120 values are needed"):
        observed(StateForm("int8", "per_head", True, 0.9), [sample(0, 40)], tokens=10).bounds("a", "key")
