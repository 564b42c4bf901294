"""The search for scales: the objective against a naive one, and what a search promises of its choice."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slim_core.errors import InvalidModelError, UnsupportedError
from slim_core.quantization.statistics.tokens import TokenSample
from slim_core.smoothing import search as smoothing_search
from slim_core.smoothing.search import (
    GRID,
    Evidence,
    Objective,
    WeightSample,
    awq_scales,
    exact,
    exponent_scale,
    ratio_grid,
    search_alpha,
    search_exponents,
    search_ratio,
    symmetric_rows,
)

CPU = torch.device("cpu")
POSITIVE = st.floats(2.0**-10, 2.0**10, width=32)


class Rows:
    """A weight that counts how many of its rows are read."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.shape, self.read = matrix, tuple(matrix.shape), 0

    def rows(self, start: int, stop: int) -> Tensor:
        self.read += stop - start
        return self.matrix[start:stop]


def inputs(tokens: int = 200, width: int = 24, seed: int = 0) -> Tensor:
    """Activations with a few large channels and a few large tokens."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator)
    x *= torch.exp(torch.randn(tokens, 1, generator=generator) * 0.5)
    return x * (1 + 30 * (torch.rand(width, generator=generator) < 0.15))


def weights(rows: int = 40, width: int = 24, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator) * torch.exp(torch.randn(width, generator=generator) * 0.4)


def sample(x: Tensor, size: int = 512) -> TokenSample:
    kept = TokenSample(size)
    for part in x.split(64):
        kept.update(part)
    return kept


def evidence(x: Tensor, w: Tensor) -> Evidence:
    return Evidence.of(sample(x), w.float(), CPU)


def int8_objective(x: Tensor, w: Tensor) -> Objective:
    return Objective(evidence(x, w), symmetric_rows(8), symmetric_rows(8))


def naive_error(x: Tensor, counts: Tensor, w: Tensor, scale: Tensor, act_bits: int | None, weight_bits: int) -> float:
    """The definition, in float64, one row at a time."""

    def rounded(row: Tensor, bits: int | None) -> Tensor:
        if bits is None:
            return row
        step = float(row.abs().max()) / (2 ** (bits - 1) - 1)
        return torch.tensor([round(value / step) * step for value in row.tolist()], dtype=torch.float64)

    xs, ws = (x.double() / scale.double()), (w.double() * scale.double())
    quantized = torch.stack([rounded(r, act_bits) for r in xs]) @ torch.stack([rounded(r, weight_bits) for r in ws]).T
    y = x.double() @ w.double().T
    c = counts.double().unsqueeze(1)
    return math.sqrt(float(((quantized - y).square() * c).sum() / (y.square() * c).sum()))


class TestObjective:
    @pytest.mark.parametrize(("act", "weight"), [(8, 8), (8, 4), (None, 4)])
    def test_is_that_of_the_definition(self, act: int | None, weight: int) -> None:
        x, w = inputs(), weights()
        found = evidence(x, w)
        objective = Objective(found, exact if act is None else symmetric_rows(act), symmetric_rows(weight))
        a, b = x.abs().amax(0), w.abs().amax(0)
        scales = torch.stack([exponent_scale(a, b, alpha, 1 - alpha) for alpha in (0.0, 0.3, 0.6, 1.0)])
        wanted = [naive_error(found.tokens, found.counts, w, scale, act, weight) for scale in scales]
        # A value next to the middle of two codes may be rounded otherwise in float32.
        assert objective.errors(scales) == pytest.approx(wanted, rel=1e-3)

    def test_all_tokens_count_alike_whichever_were_kept(self) -> None:
        x, w = inputs(4000), weights()
        found = Evidence.of(sample(x), w, CPU)
        assert len(found.tokens) == smoothing_search.TOKENS
        scale = exponent_scale(x.abs().amax(0), w.abs().amax(0), 0.5, 0.5)
        error = Objective(found, symmetric_rows(8), symmetric_rows(8)).errors(scale.unsqueeze(0))
        assert error == pytest.approx([naive_error(x, torch.ones(len(x)), w, scale, 8, 8)], rel=0.05)

    def test_chunks_do_not_matter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x, w = inputs(), weights()
        scales = torch.rand(9, 24) + 0.5
        whole = int8_objective(x, w).errors(scales)
        monkeypatch.setattr(smoothing_search, "_CANDIDATE_BYTES", 1)
        assert int8_objective(x, w).errors(scales) == pytest.approx(whole, rel=1e-6)

    def test_a_scale_that_is_no_number_is_never_best(self) -> None:
        scales = torch.stack([torch.ones(24), torch.full((24,), float("nan")), torch.zeros(24)])
        errors = int8_objective(inputs(), weights()).errors(scales)
        assert math.isfinite(errors[0])
        assert errors[1:] == [math.inf, math.inf]

    def test_outputs_of_nothing_have_no_error(self) -> None:
        assert int8_objective(inputs(), torch.zeros(3, 24)).errors(torch.ones(1, 24)) == [0.0]

    def test_no_tokens(self) -> None:
        with pytest.raises(UnsupportedError, match="no token was seen"):
            Evidence.of(TokenSample(8), weights(), CPU)


class TestWeightSample:
    def test_maxima_are_of_all_rows_and_the_extreme_rows_are_in_it(self) -> None:
        parts = [weights(300, seed=1), weights(100, seed=2), weights(7, seed=3)]
        parts[1][41] *= 100
        parts[2][2] *= 1e-3
        sources = [(str(i), Rows(part.bfloat16())) for i, part in enumerate(parts)]
        found = WeightSample.of(sources, limit=20)
        whole = torch.cat(parts).bfloat16().float()
        assert torch.equal(found.maxima, whole.abs().amax(0))
        assert found.rows.shape == (20, 24)
        assert found.rows.dtype == torch.float32
        sizes = sorted(float(row.abs().max()) for row in found.rows)
        every = sorted(float(row.abs().max()) for row in whole)
        assert sizes == [every[round(i * 406 / 19)] for i in range(20)]
        assert {tuple(row) for row in found.rows.tolist()} <= {tuple(row) for row in whole.tolist()}
        assert sum(source.read for _, source in sources) == 407 + 20

    def test_few_rows_are_all_in_it(self) -> None:
        w = weights(9)
        source = Rows(w)
        assert torch.equal(WeightSample.of([("w", source)], limit=9).rows, w)
        assert source.read == 18

    def test_bad_weights(self) -> None:
        w = weights(9)
        w[4, 2] = math.nan
        with pytest.raises(InvalidModelError, match=r"layers\.0\.up\.weight: .*NaN or infinity"):
            WeightSample.of([("layers.0.up.weight", Rows(w))])


class TestScales:
    @given(POSITIVE, POSITIVE, st.floats(0, 1), st.floats(0, 1))
    def test_exponents(self, act: float, weight: float, alpha: float, beta: float) -> None:
        scale = float(exponent_scale(torch.tensor([act]), torch.tensor([weight]), alpha, beta))
        assert scale == pytest.approx(max(act**alpha / weight**beta, 1e-5), rel=1e-5)

    def test_a_channel_without_a_scale_serves_the_side_that_is_left(self) -> None:
        act, weight = torch.tensor([4.0, 16.0, 0.0, 5.0, 0.0]), torch.tensor([1.0, 1.0, 1.25, 0.0, 0.0])
        scale = exponent_scale(act, weight, 1.0, 0.5)
        # Live scales are 4 and 16; smoothed inputs lie at 1, smoothed weights at 8 in the geometric mean.
        assert scale.tolist() == pytest.approx([4.0, 16.0, 6.4, 5.0, 8.0])
        assert exponent_scale(act * torch.tensor([1, 1, 1, 9, 1]), weight, 1.0, 0.5)[3] == 16
        assert exponent_scale(act, weight * torch.tensor([1, 1, 9, 1, 1]), 1.0, 0.5)[2] == 4
        assert exponent_scale(act, weight, 0.0, 0.0).tolist() == [1.0] * 5
        assert exponent_scale(torch.zeros(2), torch.ones(2), 0.5, 0.5).tolist() == [1.0, 1.0]

    @given(st.lists(POSITIVE, min_size=1, max_size=8), st.floats(0, 1))
    def test_awq_is_centred(self, magnitudes: list[float], ratio: float) -> None:
        scale = awq_scales(torch.tensor(magnitudes), ratio)
        assert float(scale.max() * scale.min()) == pytest.approx(1, rel=1e-5)
        for (a, s), (b, t) in pairwise(zip(magnitudes, scale.tolist(), strict=True)):
            assert s / t == pytest.approx(max(a**ratio, 1e-4) / max(b**ratio, 1e-4), rel=1e-5)

    @given(st.lists(st.floats(0, 2.0**90, width=32), min_size=1, max_size=8))
    def test_awq_of_nothing_is_exactly_one(self, magnitudes: list[float]) -> None:
        assert set(awq_scales(torch.tensor(magnitudes), 0.0).tolist()) == {1.0}

    def test_awq_leaves_dead_channels_in_the_middle(self) -> None:
        assert awq_scales(torch.tensor([0.0, 4.0, 16.0]), 0.5).tolist() == pytest.approx([1.0, 0.5**0.5, 2**0.5])

    def test_grids(self) -> None:
        assert len(GRID) == 21
        assert GRID[:2] == (0.0, 0.05)
        assert GRID[-1] == 1.0
        assert ratio_grid(4) == (0.0, 0.25, 0.5, 0.75)
        assert ratio_grid(1) == (0.0,)


def scale_of(x: Tensor, w: Tensor) -> Callable[[float, float], Tensor]:
    return lambda alpha, beta: exponent_scale(x.abs().amax(0), w.abs().amax(0), alpha, beta)


class Table:
    """An objective whose errors are looked up: a candidate is its two exponents."""

    def __init__(self, error: Callable[[float, float], float]) -> None:
        self.error = error
        self.asked: list[tuple[float, float]] = []

    def errors(self, columns: Tensor) -> list[float]:
        points = [(round(a, 4), round(b, 4)) for a, b in columns.tolist()]
        self.asked += points
        return [self.error(*point) for point in points]


def pair(alpha: float, beta: float) -> Tensor:
    return torch.tensor([alpha, beta])


class TestSearch:
    @settings(max_examples=20)
    @given(st.integers(0, 1000))
    def test_no_evaluated_point_is_better(self, seed: int) -> None:
        x, w = inputs(60, seed=seed), weights(12, seed=seed + 1)
        objective, scale = int8_objective(x, w), scale_of(x, w)
        found = search_exponents(objective, scale)
        points = [(0.0, 0.0), *((a, 1 - a) for a in GRID), *((found.alpha, b) for b in GRID)]
        errors = objective.errors(torch.stack([scale(*point) for point in points]))
        # Products of matrices are not rounded alike in batches of different sizes.
        assert found.after <= min(errors) * (1 + 1e-5)
        assert found.before == pytest.approx(errors[0], rel=1e-5)
        assert objective.errors(scale(found.alpha, found.beta).unsqueeze(0)) == pytest.approx([found.after], rel=1e-5)

    @given(st.integers(0, 1000))
    def test_of_two_lines(self, seed: int) -> None:
        """Against the same search written down plainly, on errors that have nothing to do with each other."""
        table = Table(lambda alpha, beta: float(hash((seed, alpha, beta)) % 9))
        found = search_exponents(table, pair)  # pyright: ignore[reportArgumentType]
        best, error = (0.0, 0.0), table.error(0.0, 0.0)
        first = min(GRID, key=lambda a: table.error(a, round(1 - a, 2)))
        for point in [*((a, round(1 - a, 2)) for a in GRID), *((first, b) for b in GRID)]:
            if table.error(*point) < error:
                best, error = point, table.error(*point)
        assert ((found.alpha, found.beta), found.after) == (best, error)
        assert len(table.asked) == len(set(table.asked))

    def test_equal_errors_change_nothing(self) -> None:
        found = search_exponents(Table(lambda alpha, beta: 0.5), pair)  # pyright: ignore[reportArgumentType]
        assert (found.alpha, found.beta, found.before, found.after) == (0.0, 0.0, 0.5, 0.5)
        line = Table(lambda alpha, beta: 0.5)
        assert search_alpha(line, lambda a: pair(a, 0.0)).alpha == 0  # pyright: ignore[reportArgumentType]
        assert search_ratio(line, lambda a: pair(a, 0.0), 7).alpha == 0  # pyright: ignore[reportArgumentType]

    def test_the_second_line_starts_from_the_best_of_the_first(self) -> None:
        """Even where no smoothing beats the whole first line: with another beta the same alpha may be better still."""
        errors = {(0.0, 0.0): 1.0, (0.4, 0.6): 2.0, (0.4, 0.1): 0.5}
        table = Table(lambda alpha, beta: errors.get((alpha, beta), 3.0))
        found = search_exponents(table, pair)  # pyright: ignore[reportArgumentType]
        assert (found.alpha, found.beta, found.before, found.after) == (0.4, 0.1, 1.0, 0.5)

    def test_outliers_are_found_and_moved(self) -> None:
        x, w = inputs(), weights()
        found = search_exponents(int8_objective(x, w), scale_of(x, w))
        assert found.alpha > 0.2
        assert found.after < 0.6 * found.before

    @pytest.mark.parametrize("dead", ["input", "weight"])
    def test_a_dead_channel_changes_nothing(self, dead: str) -> None:
        x, w = inputs() * 1e-3, weights() * 30  # all scales far from one
        plain = search_exponents(int8_objective(x, w), scale_of(x, w))
        more_x, more_w = torch.cat([x, x[:, :1]], 1), torch.cat([w, w[:, :1]], 1)
        (more_x if dead == "input" else more_w)[:, -1] = 0
        found = search_exponents(int8_objective(more_x, more_w), scale_of(more_x, more_w))
        assert found.after == pytest.approx(plain.after, rel=0.05)
        assert (found.alpha, found.beta) == pytest.approx((plain.alpha, plain.beta), abs=0.051)

    def test_half_precision_inputs_give_what_float32_gives(self) -> None:
        x, w = inputs().bfloat16(), weights().bfloat16()
        half = WeightSample.of([("w", Rows(w))])
        full = WeightSample.of([("w", Rows(w.float()))])
        results = []
        for kept, found in ((sample(x), half), (sample(x.float()), full)):
            objective = Objective(Evidence.of(kept, found.rows, CPU), symmetric_rows(8), symmetric_rows(8))
            results.append(search_exponents(objective, scale_of(x.float(), w.float())))
        assert results[0] == results[1]

    def test_permuted_channels_give_the_permuted_scale(self) -> None:
        x, w = inputs(), weights()
        order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
        found = search_exponents(int8_objective(x, w), scale_of(x, w))
        other = search_exponents(int8_objective(x[:, order], w[:, order]), scale_of(x[:, order], w[:, order]))
        assert other.after == pytest.approx(found.after, rel=1e-3)
        assert (other.alpha, other.beta) == (found.alpha, found.beta)

    def test_awq_beats_or_equals_plain_rounding(self) -> None:
        x, w = inputs(), weights()
        magnitude = x.abs().mean(0)
        objective = Objective(evidence(x, w), exact, symmetric_rows(4))
        found = search_ratio(objective, lambda ratio: awq_scales(magnitude, ratio), 20)
        assert found.before == pytest.approx(naive_error(x, torch.ones(len(x)), w, torch.ones(24), None, 4), rel=1e-3)
        every = objective.errors(torch.stack([awq_scales(magnitude, ratio) for ratio in ratio_grid(20)]))
        assert found.after <= min(every) * (1 + 1e-5)
        assert found.after < 0.9 * found.before
        assert found.alpha == pytest.approx(ratio_grid(20)[min(range(20), key=every.__getitem__)])
