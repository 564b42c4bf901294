"""The gptq weight method, against the textbook algorithm in float64 and against rounding to nearest."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from slim_core.errors import InvalidModelError
from slim_core.quantization.affine import affine_parameters, by_groups, quantize_groups
from slim_core.quantization.building import needs_of
from slim_core.quantization.kinds import LayerForm, LayerKind
from slim_core.quantization.methods import gptq_factor, quantize_weight
from slim_core.quantization.methods.gptq import GptqOptions, Grid, gptq_weight, solve
from slim_core.quantization.methods.gptq_factor import Factor, factorise
from slim_core.quantization.methods.minmax import minmax_weight
from slim_core.quantization.methods.ssz import ssz_weight
from slim_core.quantization.statistics import Hessian, InputObserver, InputStatistics, Need
from slim_core.quantization.weights import InMemory, QuantizedWeight
from slim_core.recipe.qconfig import LinearQConfig, WeightConfig

SCHEMES = [(bits, symmetric, size) for bits in (4, 8) for symmetric in (True, False) for size in (0, 8)]
OUT, WIDTH = 12, 40
ORDERS = [True, False]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(tokens: int = 300, width: int = WIDTH, seed: int = 1) -> Tensor:
    """Correlated activations with two large channels."""
    x = normal(tokens, 6, seed=seed) @ normal(6, width, seed=seed + 1) + 0.3 * normal(tokens, width, seed=seed + 2)
    x[:, [3, width - 5]] *= 8
    return x


def observed(x: Tensor) -> Hessian:
    hessian = Hessian()
    hessian.update(x)
    return hessian


def gptq(
    matrix: Tensor,
    hessian: Hessian | None,
    bits: int = 4,
    symmetric: bool = True,
    group_size: int = 0,
    **options: object,
) -> QuantizedWeight:
    return gptq_weight(
        InMemory(matrix),
        hessian,
        bits=bits,
        symmetric=symmetric,
        group_size=group_size,
        options=GptqOptions(**options),  # pyright: ignore
        name="a.weight",
        linear="a",
    )


def loss(matrix: Tensor, found: QuantizedWeight, x: Tensor) -> float:
    """Squared error of the output, in float64."""
    groups = found.scale.shape[1]
    scale, offset = (p.double().repeat_interleave(matrix.shape[1] // groups, 1) for p in (found.scale, found.offset))
    error = (found.codes.double() - offset) * scale - matrix.double()
    return float((x.double() @ error.T).square().sum())


def textbook(matrix: Tensor, hessian: Tensor, grid: Grid, damping: float, order: Tensor) -> Tensor:
    """Codes by the published algorithm, column by column with the inverse Hessian; all in float64."""
    w, half, size = matrix.double().clone()[:, order], 2 ** (grid.bits - 1), matrix.shape[1] // len(grid.scale)
    h = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order]), upper=True)
    codes = torch.zeros_like(w)
    for k, column in enumerate(order.tolist()):
        scale, offset = grid.scale[column // size], grid.offset[column // size]
        codes[:, column] = torch.clamp(torch.round(w[:, k] / scale + offset), -half, half - 1)
        error = (w[:, k] - (codes[:, column] - offset) * scale) / upper[k, k]
        w[:, k:] -= error.unsqueeze(1) * upper[k, k:]
    return codes.to(torch.int8)


def plain_grid(matrix: Tensor, bits: int, symmetric: bool, group_size: int) -> Grid:
    rows = by_groups(matrix, matrix.shape[1] // group_size if group_size else 1)
    scale, offset = affine_parameters(rows.amin(2), rows.amax(2), bits, symmetric)
    return Grid(scale.double().T.contiguous(), offset.double().T.contiguous(), symmetric, bits)


def in_float64(factor: Factor, hessian: Tensor, damping: float) -> Factor:
    """The same factor, without the rounding to float32."""
    h = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    lower = torch.linalg.cholesky(h[factor.order][:, factor.order])
    roots = lower.diagonal()
    return Factor(factor.order, lower.T / roots.unsqueeze(1), roots.square(), damping)


@pytest.mark.parametrize(("bits", "symmetric", "group_size"), SCHEMES)
@pytest.mark.parametrize("actorder", ORDERS)
@pytest.mark.parametrize("block_size", [1, 7, 16, 128])
def test_solve_is_the_textbook(bits: int, symmetric: bool, group_size: int, actorder: bool, block_size: int) -> None:
    """Block sizes that do not divide the width, are larger and smaller than groups: the very same codes."""
    matrix, hessian = normal(OUT, WIDTH), observed(inputs()).mean("a")
    assert hessian is not None
    grid = plain_grid(matrix, bits, symmetric, group_size)
    factor = factorise(hessian, 0.01, actorder)
    assert factor is not None
    columns = matrix.double()[:, factor.order].T.contiguous()
    codes = solve(columns, in_float64(factor, hessian, 0.01), grid, block_size)
    assert torch.equal(codes.T, textbook(matrix, hessian, grid, 0.01, factor.order.flip(0)))
    scale, offset = (p.T.repeat_interleave(group_size or WIDTH, 1) for p in (grid.scale, grid.offset))
    left = matrix.double() - (codes.T.double() - offset) * scale
    assert torch.allclose(columns.T, left[:, factor.order], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("bits", "symmetric", "group_size"), SCHEMES)
@pytest.mark.parametrize("actorder", ORDERS)
@pytest.mark.parametrize("seed", [0, 10, 20])
def test_output_error_is_below_that_of_rounding_to_nearest(
    bits: int, symmetric: bool, group_size: int, actorder: bool, seed: int
) -> None:
    matrix, x = normal(OUT, WIDTH, seed=seed), inputs(seed=seed + 1)
    hessian = observed(x)
    found = gptq(matrix, hessian, bits, symmetric, group_size, actorder=actorder)
    options = {"bits": bits, "symmetric": symmetric, "group_size": group_size, "name": "w"}
    for other in (minmax_weight(InMemory(matrix), **options), ssz_weight(InMemory(matrix), **options)):  # pyright: ignore
        assert loss(matrix, found, x) < 0.6 * loss(matrix, other, x)
    fresh = inputs(seed=seed + 1)[:150] + 0.1 * normal(150, WIDTH, seed=99)
    assert loss(matrix, found, fresh) < loss(matrix, minmax_weight(InMemory(matrix), **options), fresh)  # pyright: ignore


@pytest.mark.parametrize(("bits", "symmetric", "group_size"), SCHEMES)
def test_codes_scales_and_layout(bits: int, symmetric: bool, group_size: int) -> None:
    matrix, half = normal(OUT, WIDTH), 2 ** (bits - 1)
    found = gptq(matrix, observed(inputs()), bits, symmetric, group_size)
    groups = WIDTH // group_size if group_size else 1
    assert found.codes.shape == (OUT, WIDTH)
    assert found.codes.dtype == torch.int8
    assert found.codes.is_contiguous()
    assert -half <= int(found.codes.min()) <= int(found.codes.max()) < half
    assert found.scale.shape == found.offset.shape == (OUT, groups)
    assert found.scale.dtype == found.offset.dtype == torch.float32
    assert bool((found.offset == found.offset.round()).all())
    assert bool(found.offset.any()) != symmetric
    error = found.dequantized().double() - matrix.double()
    assert found.sqnr_db == pytest.approx(
        float(10 * torch.log10(matrix.double().square().sum() / error.square().sum())), abs=1e-3
    )
    assert float(error.abs().max()) < 40 * float(found.scale.max())  # columns came back to their places


@pytest.mark.parametrize(("bits", "symmetric", "group_size"), SCHEMES)
@pytest.mark.parametrize("actorder", ORDERS)
def test_without_correlation_it_is_rounding_to_nearest(
    bits: int, symmetric: bool, group_size: int, actorder: bool
) -> None:
    matrix, hessian = normal(OUT, WIDTH), Hessian(torch.diag(torch.arange(1.0, WIDTH + 1)), 10)
    found = gptq(matrix, hessian, bits, symmetric, group_size, actorder=actorder)
    assert torch.equal(found.codes, quantize_groups(matrix, found.scale, found.offset, bits))
    same = gptq(matrix, Hessian(torch.eye(WIDTH), 10), bits, symmetric, group_size, actorder=actorder)
    assert torch.equal(same.codes, quantize_groups(matrix, same.scale, same.offset, bits))


@pytest.mark.parametrize("actorder", ORDERS)
@pytest.mark.parametrize("group_size", [0, 8])
def test_block_size_does_not_matter(actorder: bool, group_size: int) -> None:
    matrix, x = normal(OUT, WIDTH), inputs()
    whole = gptq(matrix, observed(x), 4, True, group_size, actorder=actorder, block_size=1000)
    for block_size in (1, 3, 8, 13, 40):
        found = gptq(matrix, observed(x), 4, True, group_size, actorder=actorder, block_size=block_size)
        assert loss(matrix, found, x) == pytest.approx(loss(matrix, whole, x), rel=0.02)
        assert float((found.codes == whole.codes).float().mean()) > 0.97


@pytest.mark.parametrize("actorder", ORDERS)
def test_threads_do_not_matter(actorder: bool) -> None:
    matrix, x, before = normal(OUT, WIDTH), inputs(), torch.get_num_threads()
    found: list[QuantizedWeight] = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(gptq(matrix, observed(x), 4, False, 8, actorder=actorder, block_size=5))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert loss(matrix, found[1], x) == pytest.approx(loss(matrix, found[0], x), rel=0.02)
    assert float((found[0].codes == found[1].codes).float().mean()) > 0.97


def test_order_is_that_of_the_inputs_and_improves_the_result() -> None:
    ordered = unordered = 0.0
    for seed in range(6):
        matrix, x = normal(OUT, WIDTH, seed=seed), inputs(seed=seed + 30)
        ordered += loss(matrix, gptq(matrix, observed(x), 4, True, 8), x)
        unordered += loss(matrix, gptq(matrix, observed(x), 4, True, 8, actorder=False), x)
    assert ordered < 0.95 * unordered
    diagonal = torch.tensor([2.0, 5.0, 1.0, 5.0])
    factor, plain = factorise(torch.diag(diagonal), 0.01, True), factorise(torch.diag(diagonal), 0.01, False)
    assert factor is not None
    assert plain is not None
    assert factor.order.flip(0).tolist() == [1, 3, 0, 2]
    assert plain.order.flip(0).tolist() == [0, 1, 2, 3]
    assert torch.allclose(factor.importance, diagonal + 0.01 * 3.25)


@pytest.mark.parametrize("group_size", [0, 8])
def test_permuting_inputs_permutes_the_result(group_size: int) -> None:
    matrix, x = normal(OUT, WIDTH), inputs()
    groups = torch.randperm(WIDTH // (group_size or 1), generator=torch.Generator().manual_seed(5))
    order = (groups.unsqueeze(1) * (group_size or 1) + torch.arange(group_size or 1)).flatten()
    found, moved = (
        gptq(matrix, observed(x), 4, True, group_size),
        gptq(matrix[:, order], observed(x[:, order]), 4, True, group_size),
    )
    assert float((moved.codes == found.codes[:, order]).float().mean()) > 0.97
    assert loss(matrix[:, order], moved, x[:, order]) == pytest.approx(loss(matrix, found, x), rel=0.02)


@pytest.mark.parametrize("in_groups", [0, 8])
@given(power=st.integers(-8, 60), input_power=st.integers(-20, 20))
def test_powers_of_two(in_groups: int, power: int, input_power: int) -> None:
    matrix, hessian = normal(3, 16), observed(inputs(width=16))
    assert hessian.total is not None
    plain = gptq(matrix, hessian, 4, True, in_groups)
    scaled = gptq(matrix * 2.0**power, Hessian(hessian.total * 4.0**input_power, hessian.tokens), 4, True, in_groups)
    assert torch.equal(scaled.codes, plain.codes)
    assert torch.equal(scaled.scale, plain.scale * 2.0**power)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "symmetric", "group_size"), SCHEMES)
def test_half_precision_is_that_of_the_float32_upcast(
    dtype: torch.dtype, bits: int, symmetric: bool, group_size: int
) -> None:
    matrix, x = normal(OUT, WIDTH).to(dtype), inputs().to(dtype)
    before = matrix.clone()
    half = gptq(matrix, observed(x), bits, symmetric, group_size)
    full = gptq(matrix.float(), observed(x.float()), bits, symmetric, group_size)
    assert torch.equal(half.codes, full.codes)
    assert torch.equal(half.scale, full.scale)
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("actorder", ORDERS)
@pytest.mark.parametrize("group_size", [0, 8])
def test_dead_inputs_are_rounded_to_nearest(actorder: bool, group_size: int, caplog: pytest.LogCaptureFixture) -> None:
    matrix, x = normal(OUT, WIDTH), inputs()
    dead = [0, 9, 17]
    x[:, dead] = 0
    matrix[:, 9] *= 3
    found = gptq(matrix, observed(x), 8, True, group_size, actorder=actorder)
    rounded = quantize_groups(matrix, found.scale, found.offset, 8)
    assert torch.equal(found.codes[:, dead], rounded[:, dead])
    assert bool(found.codes[:, dead].any())
    assert not torch.equal(found.codes, rounded)
    assert "a: 3 of its 40 inputs were zero in every sample; their weights are rounded to nearest" in caplog.text


@pytest.mark.parametrize(("bits", "symmetric", "group_size"), SCHEMES)
@pytest.mark.parametrize("hessian", [None, Hessian(), Hessian(torch.zeros(WIDTH, WIDTH), 7)])
def test_without_knowledge_of_the_inputs_the_weight_is_rounded(
    bits: int, symmetric: bool, group_size: int, hessian: Hessian | None, caplog: pytest.LogCaptureFixture
) -> None:
    matrix = normal(OUT, WIDTH)
    found = gptq(matrix, hessian, bits, symmetric, group_size)
    plain = ssz_weight(InMemory(matrix), bits=bits, symmetric=symmetric, group_size=group_size, name="w")
    assert torch.equal(found.codes, plain.codes)
    assert torch.equal(found.scale, plain.scale)
    why = "its inputs were zero in every sample" if hessian is not None and hessian.tokens else "no calibration sample"
    assert f"a: {why}" in caplog.text
    assert "its weight is rounded to nearest instead" in caplog.text


def test_a_matrix_that_is_no_hessian_cannot_be_factorised(caplog: pytest.LogCaptureFixture) -> None:
    wrong = torch.eye(WIDTH)
    wrong[0, 1] = wrong[1, 0] = 50
    matrix = normal(OUT, WIDTH)
    found = gptq(matrix, Hessian(wrong, 3))
    assert torch.equal(found.codes, ssz_weight(InMemory(matrix), bits=4, symmetric=True, name="w").codes)
    assert "a: the second moments of its inputs cannot be factorised" in caplog.text


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("percdamp", [1e-30, 1e-9, 0.01])
def test_singular_hessians(tokens: int, percdamp: float, caplog: pytest.LogCaptureFixture) -> None:
    """Fewer tokens than inputs: more damping helps, and that is told."""
    matrix, x = normal(OUT, WIDTH), inputs(tokens)
    hessian = observed(x)
    found = gptq(matrix, hessian, percdamp=percdamp)
    assert loss(matrix, found, x) < 0.5 * loss(
        matrix, minmax_weight(InMemory(matrix), bits=4, symmetric=True, name="w"), x
    )
    assert ("a: gptq needed a damping of" in caplog.text) == (percdamp < 1e-8)  # the sums are rounded to float32


def test_float64_before_more_damping() -> None:
    ones = torch.ones(WIDTH, WIDTH)
    assert torch.linalg.cholesky_ex(ones + 1e-8 * torch.eye(WIDTH)).info > 0
    factor = factorise(ones, 1e-8, actorder=True)
    assert factor is not None
    assert factor.damping == 1e-8
    assert factor.coefficients.dtype == factor.pivots.dtype == torch.float32


@given(st.integers(0, 100), st.booleans(), st.sampled_from([1e-6, 0.01, 1.0]))
def test_the_factor_is_that_of_the_damped_hessian(seed: int, actorder: bool, damping: float) -> None:
    hessian = observed(inputs(50, 9, seed)).mean("a")
    assert hessian is not None
    before = hessian.clone()
    factor = factorise(hessian, damping, actorder)
    assert factor is not None
    assert torch.equal(hessian, before)
    upper = factor.coefficients.triu(1) + torch.eye(9)
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(9)
    product = upper.T @ torch.diag(factor.pivots) @ upper
    assert torch.allclose(product, damped[factor.order][:, factor.order], rtol=1e-4, atol=1e-4 * float(damped.max()))
    assert torch.equal(factor.importance[factor.order], factor.pivots)


def test_linears_that_share_an_input_share_the_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []

    def counted(hessian: Tensor, damping: float, actorder: bool) -> Factor | None:
        calls.append(actorder)
        return factorise(hessian, damping, actorder)

    monkeypatch.setattr(gptq_factor, "factorise", counted)
    block, observer = nn.ModuleDict({"q": nn.Linear(8, 4), "k": nn.Linear(8, 6), "o": nn.Linear(8, 4)}), InputObserver()
    for name, linear in block.items():
        observer.watch(name, linear, {Need.HESSIAN})
    for seed in range(2):
        x = normal(2, 5, 8, seed=seed)
        block["q"](x), block["k"](x), block["o"](x + 1)
    seen = observer.statistics
    assert seen["q"] is seen["k"]
    assert seen["q"].hessian.shared
    assert not seen["o"].hessian.shared
    total = seen["q"].hessian.total
    assert total is not None
    before = total.clone()
    found = [gptq(normal(4, 8), seen[name].hessian) for name in ("q", "k", "o")]
    assert calls == [True, True]  # q with k, and o
    assert torch.equal(total, before)
    assert torch.equal(found[0].codes, found[1].codes)
    gptq(normal(4, 8), seen["q"].hessian, actorder=False)
    assert calls == [True, True, False]
    gptq(normal(4, 8), seen["o"].hessian)
    assert not seen["o"].hessian.derived
    seen["q"].hessian.update(normal(3, 8))
    gptq(normal(4, 8), seen["q"].hessian)
    seen["q"].hessian.merge(observed(normal(3, 8)))
    gptq(normal(4, 8), seen["q"].hessian)
    assert calls[3:] == [True, True, True]


def test_splitting_the_samples_changes_nothing() -> None:
    x = inputs()
    parts = Hessian()
    for part in x.split([1, 99, 0, 200]):
        parts.merge(observed(part.reshape(1, -1, WIDTH)))
    whole, matrix = observed(x), normal(OUT, WIDTH)
    assert parts.tokens == whole.tokens == 300
    assert loss(matrix, gptq(matrix, parts), x) == pytest.approx(loss(matrix, gptq(matrix, whole), x), rel=0.02)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity(bad: float) -> None:
    x, matrix = inputs(), normal(OUT, WIDTH)
    x[5, 3] = bad
    with pytest.raises(InvalidModelError, match=r"^a: its activations hold NaN or infinity"):
        gptq(matrix, observed(x))
    matrix[2, 3] = bad
    with pytest.raises(InvalidModelError, match=r"^a\.weight: the weight holds NaN or infinity in row 2"):
        gptq(matrix, observed(inputs()))


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (1, 9), (9, 1)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_small_and_empty_matrices(shape: tuple[int, int], symmetric: bool, caplog: pytest.LogCaptureFixture) -> None:
    found = gptq(normal(*shape), observed(normal(20, shape[1])), 8, symmetric)
    assert found.codes.shape == shape
    assert found.scale.shape == (shape[0], 1)
    assert not caplog.records


def test_zero_weights() -> None:
    matrix = normal(OUT, WIDTH)
    matrix[4] = 0
    found = gptq(matrix, observed(inputs()), 4, False, 8)
    assert not bool(found.dequantized()[4].any())
    assert gptq(torch.zeros(2, WIDTH), observed(inputs())).sqnr_db == math.inf


def test_settings_of_the_recipe() -> None:
    def config(**ext: object) -> WeightConfig:
        return WeightConfig.model_validate({"dtype": "int4", "method": "gptq", "ext": ext})

    assert GptqOptions.of(config().ext) == GptqOptions(0.01, 128, True)
    assert GptqOptions.of(config(percdamp=0.1, block_size=3, actorder=False).ext) == GptqOptions(0.1, 3, False)
    assert needs_of(LinearQConfig(weight=config())) == {Need.HESSIAN}
    matrix, seen = normal(OUT, WIDTH), InputStatistics(frozenset({Need.HESSIAN}))
    seen.update(inputs())
    form = LayerForm(LayerKind.W4A16, 8, symmetric=False)
    found = quantize_weight(
        InMemory(matrix), config(percdamp=0.1, actorder=False), form, tensor="a.weight", linear="a", seen=seen
    )
    assert isinstance(found, QuantizedWeight)
    wanted = gptq(matrix, observed(inputs()), 4, False, 8, percdamp=0.1, actorder=False)
    assert torch.equal(found.codes, wanted.codes)
    assert not torch.equal(found.codes, gptq(matrix, observed(inputs()), 4, False, 8).codes)


@pytest.mark.parametrize("in_place", [True, False])
def test_nothing_is_left_behind(in_place: bool) -> None:
    """Not until the garbage collector comes by: the factor is as large as the Hessian."""
    matrix, factor = normal(OUT, WIDTH), factorise(observed(inputs()).total, 0.01, not in_place)  # pyright: ignore
    assert factor is not None
    left = weakref.ref(factor.coefficients)
    grid = Grid(torch.ones(WIDTH // 8, OUT), torch.zeros(WIDTH // 8, OUT), True, 4)
    gc.disable()
    try:
        solve(matrix.T.contiguous(), factor, grid, 128, in_place=in_place)
        del factor
        assert left() is None
    finally:
        gc.enable()
