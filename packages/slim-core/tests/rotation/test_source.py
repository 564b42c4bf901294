"""The transformed view of a checkpoint: equal to naive float64 arithmetic, bounded in memory, and a proper source."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from slim_core.checkpoint.reader import Checkpoint
from slim_core.checkpoint.source import TensorMeta, TensorSource
from slim_core.errors import InvalidModelError, UnsupportedError
from slim_core.quantization.row_blocks import for_each_block
from slim_core.rotation import source as transformed
from slim_core.rotation.chains import Chain, Fill, FoldNormBias, FuseNorm, RotateLeft, RotateRight, Step
from slim_core.rotation.dense import DenseRotation
from slim_core.rotation.matrices import Concatenated, Hadamard, Identity, Kronecker, Rotation, repeated_to
from slim_core.rotation.source import TransformedSource

OUT, IN = 20, 24


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthogonal(n: int) -> Tensor:
    return torch.linalg.qr(normal(n, n, seed=n)).Q


TENSORS = {
    "w": normal(OUT, IN, seed=1),
    "c": normal(OUT, seed=2),
    "norm": normal(IN, seed=3) + 1,
    "first": normal(10, seed=4),
    "second": normal(14, seed=5),
    "shift": normal(IN, seed=6),
    "embed": normal(50, OUT, seed=8),
    "other": normal(3, 4, 5, seed=9),
}


def checkpoint(folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Tensor) -> Checkpoint:
    tensors = {**{name: tensor.to(dtype) for name, tensor in TENSORS.items()}, **changes}
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint(folder)


RIGHT: list[Rotation] = [Hadamard(24), DenseRotation(orthogonal(24)), repeated_to(Hadamard(8), 24), Identity(24)]
LEFT: list[Rotation] = [Hadamard(20), repeated_to(Hadamard(4), 20), Concatenated((Hadamard(12), Identity(8)))]
matrix_steps = st.lists(
    st.one_of(
        st.sampled_from(RIGHT).map(RotateRight),
        st.sampled_from(LEFT).map(RotateLeft),
        st.sampled_from([FuseNorm(("norm",)), FuseNorm(("norm",), plus_one=True), FuseNorm(("first", "second"))]),
    ),
    min_size=1,
    max_size=4,
)
vector_steps = st.lists(
    st.one_of(
        st.sampled_from(LEFT).map(RotateLeft),
        st.sampled_from([FoldNormBias("w", "shift"), Fill(0.5)]),
    ),
    min_size=1,
    max_size=4,
)


def naive(inner: TensorSource, start: Tensor, steps: list[Step]) -> Tensor:
    """Step after step in float64, with the matrices themselves."""
    x = start.double()
    for step in steps:
        match step:
            case FuseNorm(norms, plus_one):
                x = x @ torch.diag(torch.cat([inner.load(norm).double() for norm in norms]) + plus_one)
            case RotateRight(rotation):
                x = x @ rotation.dense()
            case RotateLeft(rotation):
                x = rotation.dense().T @ x
            case FoldNormBias(weight, bias):
                x = x + inner.load(weight).double() @ inner.load(bias).double()
            case Fill(value):
                x = torch.full_like(x, value)
    return x


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32, torch.float16], ids=str)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return checkpoint(tmp_path_factory.mktemp("stored"), request.param)


@given(matrix_steps, st.integers(-25, 25), st.integers(-25, 25))
def test_matrices(stored: Checkpoint, steps: list[Step], start: int, stop: int) -> None:
    view = TransformedSource(stored, {"w": Chain(tuple(steps))})
    want = naive(stored, stored.load("w"), steps)
    rows = view.rows("w", start, stop)
    assert rows.dtype == torch.float32
    assert torch.allclose(rows.double(), want[start:stop], rtol=0, atol=1e-5 * float(want.abs().max()))
    loaded = view.load("w")
    assert loaded.dtype == stored.load("w").dtype
    assert torch.equal(loaded, view.rows("w", 0, OUT).to(loaded.dtype))


@given(vector_steps, st.booleans(), st.integers(-25, 25), st.integers(-25, 25))
def test_vectors(stored: Checkpoint, steps: list[Step], new: bool, start: int, stop: int) -> None:
    """Biases that are there, and biases that come into being."""
    name, before = ("c", stored.load("c")) if not new else ("new", torch.zeros(OUT))
    steps = [FoldNormBias("w", "shift"), *steps] if new else steps
    view = TransformedSource(stored, {name: Chain(tuple(steps))})
    want = naive(stored, before, steps)
    rows = view.rows(name, start, stop)
    assert torch.allclose(rows.double(), want[start:stop], rtol=0, atol=1e-5 * float(want.abs().max()) + 1e-9)
    assert torch.equal(view.load(name), view.rows(name, 0, OUT).to(stored.load("c").dtype))
    assert view.meta(name) == TensorMeta(name, stored.load("c").dtype, (OUT,))


def test_the_checkpoint_is_only_read(stored: Checkpoint) -> None:
    before = {name: stored.load(name).clone() for name in stored}
    chains = {
        "w": Chain((RotateRight(Identity(IN)), RotateLeft(Hadamard(OUT)))),
        "c": Chain((RotateLeft(Identity(OUT)),)),
        "norm": Chain((Fill(1.0),)),
        "embed": Chain((RotateRight(Identity(OUT)),)),
    }
    view = TransformedSource(stored, chains)
    for name in chains:
        view.load(name)
        view.rows(name, 0, 5)
    assert all(torch.equal(stored.load(name), before[name]) for name in stored)


def test_a_source_like_any_other(tmp_path: Path) -> None:
    inner = checkpoint(tmp_path)
    chains = {
        "w": Chain((FuseNorm(("norm",)), RotateRight(Hadamard(IN)))),
        "head": Chain((RotateRight(Hadamard(OUT)),), origin="embed"),
        "copy": Chain(origin="other"),
        "norm": Chain((Fill(0.0),)),
    }
    view = TransformedSource(inner, chains)
    assert list(view) == [*inner, "head", "copy"]
    assert all(name in view for name in view)
    assert "absent" not in view
    assert 3 not in view
    assert view.meta("head") == TensorMeta("head", torch.bfloat16, (50, OUT))
    assert view.meta("c") == inner.meta("c")
    assert view.stored("w") is view.stored("head") is view.stored("norm") is None
    assert view.stored("c") == inner.stored("c")
    assert view.stored("copy") == inner.stored("other")
    assert torch.equal(view.load("copy"), inner.load("other"))
    assert torch.equal(view.rows("copy", 1, 3), inner.load("other")[1:3])
    assert torch.equal(view.load("embed"), inner.load("embed"))
    assert torch.equal(view.rows("c", 3, 5), inner.load("c")[3:5])
    assert torch.equal(view.load("norm"), torch.zeros(IN).bfloat16())
    assert view.chains["w"] == Chain((FuseNorm(("norm",)), RotateRight(Hadamard(IN))), origin="w")
    for use in (view.meta, view.load, view.stored, lambda name: view.rows(name, 0, 1)):
        with pytest.raises(InvalidModelError, match="no tensor 'absent'"):
            use("absent")


def test_reading_ahead_and_releasing_reach_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = checkpoint(tmp_path)
    chains = {
        "w": Chain((FuseNorm(("first", "second")), RotateLeft(Hadamard(OUT)))),
        "head": Chain((RotateRight(Hadamard(OUT)),), origin="embed"),
        "new": Chain((FoldNormBias("w", "shift"),)),
    }
    view = TransformedSource(inner, chains)
    seen: list[Any] = []
    for method in ("prefetch", "release"):
        monkeypatch.setattr(inner, method, lambda names: seen.append(list(names)))
    monkeypatch.setattr(inner, "release_rows", lambda *args: seen.append(args))
    view.prefetch(name for name in ("w", "c"))
    view.release(["head", "new"])
    view.release_rows("head", 2, 5)
    view.release_rows("c", 1, 2)
    view.release_rows("w", 0, 4)  # the whole matrix may be made again
    assert seen == [["w", "first", "second", "c"], ["embed", "w", "shift"], ("embed", 2, 5), ("c", 1, 2)]
    monkeypatch.undo()
    before = view.load("w")
    view.prefetch(view)
    view.release(view)
    assert torch.equal(view.load("w"), before)


class Counting:
    """A source that notes what is read of it."""

    def __init__(self, inner: TensorSource) -> None:
        self._inner = inner
        self.read: list[tuple[str, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __contains__(self, name: object) -> bool:
        return name in self._inner

    def __iter__(self) -> Any:
        return iter(self._inner)

    def load(self, name: str) -> Tensor:
        tensor = self._inner.load(name)
        self.read.append((name, len(tensor)))
        return tensor

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        tensor = self._inner.rows(name, start, stop)
        self.read.append((name, len(tensor)))
        return tensor


def test_rows_read_rows_and_large_tensors_are_made_in_blocks(tmp_path: Path) -> None:
    wide = 2048
    inner = Counting(checkpoint(tmp_path, large=normal(600, wide, dtype=torch.bfloat16)))
    view = TransformedSource(inner, {"large": Chain((RotateRight(Hadamard(wide)),))})
    view.rows("large", 7, 12)
    assert inner.read == [("large", 5)]
    inner.read.clear()
    loaded = view.load("large")
    assert {name for name, _ in inner.read} == {"large"}
    assert max(count for _, count in inner.read) * wide * 4 <= 1 << 21
    assert sum(count for _, count in inner.read) == 600
    assert torch.equal(loaded, view.rows("large", 0, 600).bfloat16())


def test_the_last_whole_matrix_is_kept_until_another_one_or_its_release(tmp_path: Path) -> None:
    inner = Counting(checkpoint(tmp_path))
    chain = Chain((RotateLeft(Hadamard(OUT)),))
    view = TransformedSource(inner, {"w": chain, "second_w": Chain(chain.steps, origin="w")})

    def reads() -> int:
        count = len(inner.read)
        inner.read.clear()
        return count

    first = view.rows("w", 0, 4)
    assert reads() == 1
    view.rows("w", 4, 20)
    view.load("w")
    assert reads() == 0
    view.rows("second_w", 0, 4)
    view.rows("w", 0, 4)
    assert reads() == 2
    view.release(["embed"])
    view.rows("w", 0, 4)
    assert reads() == 0
    view.release(["w"])
    assert torch.equal(view.rows("w", 0, 4), first)
    assert reads() == 1
    view.release(["w"])
    view.load("w")
    view.load("w")  # is not kept by loading
    assert reads() == 2


@pytest.mark.parametrize("threads", [1, 3])
def test_from_several_threads(tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of two matrices that alternate, as two processors side by side would ask for them; none waits for ever."""

    def count() -> int:
        """Of the threads that torch may use; each of a pool works alone."""
        return 1 if threading.current_thread().name.startswith("slim-") else threads

    monkeypatch.setattr(torch, "get_num_threads", count)
    monkeypatch.setattr(transformed, "rows_per_block", lambda width, device: 3)
    chains = {
        "w": Chain((RotateRight(Hadamard(IN)), RotateLeft(Hadamard(OUT)))),
        "embed": Chain((RotateLeft(DenseRotation(orthogonal(50))),)),
        "c": Chain((FoldNormBias("w", "shift"), RotateLeft(Hadamard(OUT)))),
    }
    view = TransformedSource(checkpoint(tmp_path), chains)
    want = {name: view.rows(name, 0, 100) for name in chains}

    def ask(i: int) -> bool:
        name = ("w", "embed", "c")[i % 3]
        start = i % 17
        return torch.equal(view.rows(name, start, start + 3), want[name][start : start + 3])

    assert all(for_each_block(ask, range(60)))
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(60)))
    assert torch.equal(view.load("w"), want["w"].bfloat16())


def test_views_on_views_keep_float32(tmp_path: Path) -> None:
    """The second sees rows that were not rounded: undoing a rotation gives the stored values back."""
    inner = checkpoint(tmp_path)
    there = TransformedSource(inner, {"w": Chain((RotateRight(DenseRotation(orthogonal(IN))),))})
    back = TransformedSource(there, {"w": Chain((RotateRight(DenseRotation(orthogonal(IN).T.contiguous())),))})
    assert torch.allclose(back.rows("w", 0, OUT), inner.load("w").float(), atol=1e-6)


def test_a_model_with_tied_embeddings_is_unchanged(tmp_path: Path) -> None:
    """A residual block, GQA-like value heads, 1 + w norms, a bias everywhere; the head untied through the view."""
    hidden, heads, dim, inner_size, vocabulary = 24, 3, 4, 12, 30
    tensors = {
        "embed": normal(vocabulary, hidden, seed=1),
        "norm1": normal(hidden, seed=2) / 5,
        "norm1.bias": normal(hidden, seed=3),
        "v": normal(heads * dim, hidden, seed=4),
        "v.bias": normal(heads * dim, seed=5),
        "o": normal(hidden, heads * dim, seed=6),
        "o.bias": normal(hidden, seed=7),
        "norm2": normal(hidden, seed=8) / 5,
        "up": normal(inner_size, hidden, seed=9),
        "down": normal(hidden, inner_size, seed=10),
        "norm3": normal(hidden, seed=11) / 5,
    }
    save_file({name: tensor.float() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    source = Checkpoint(tmp_path)

    def logits(source: TensorSource, head: str, untied: bool) -> Tensor:
        def w(name: str) -> Tensor:
            return source.load(name).double()

        def norm(x: Tensor, name: str) -> Tensor:
            bias = w(f"{name}.bias") if f"{name}.bias" in source else 0.0
            return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-5) * (1 + w(name)) + bias

        x = w("embed")[torch.tensor([3, 5, 8])]
        mixed = normal(3, 3, seed=50).softmax(1)
        x = x + mixed @ (norm(x, "norm1") @ w("v").T + w("v.bias")) @ w("o").T + w("o.bias")
        x = x + torch.relu(norm(x, "norm2") @ w("up").T + (w("up.bias") if untied else 0)) @ w("down").T
        return norm(x, "norm3") @ w(head).T

    q, u = Hadamard(hidden), Kronecker(Identity(heads), Hadamard(dim))
    view = TransformedSource(
        source,
        {
            "embed": Chain((RotateRight(q),)),
            "v": Chain((FuseNorm(("norm1",), plus_one=True), RotateRight(q), RotateLeft(u))),
            "v.bias": Chain((FoldNormBias("v", "norm1.bias"), RotateLeft(u))),
            "o": Chain((RotateRight(u), RotateLeft(q))),
            "o.bias": Chain((RotateLeft(q),)),
            "up": Chain((FuseNorm(("norm2",), plus_one=True), RotateRight(q))),
            "up.bias": Chain((FoldNormBias("up", "norm1.bias"), Fill(0.0))),
            "down": Chain((RotateLeft(q),)),
            "norm1.bias": Chain((Fill(0.0),)),
            **{f"norm{i}": Chain((Fill(0.0),)) for i in (1, 2, 3)},
            "head": Chain((FuseNorm(("norm3",), plus_one=True), RotateRight(q)), origin="embed"),
        },
    )
    before, after = logits(source, "embed", untied=False), logits(view, "head", untied=True)
    assert torch.allclose(after, before, rtol=0, atol=1e-5 * float(before.abs().max()))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_would_spread(tmp_path: Path, value: float) -> None:
    broken = {name: TENSORS[name].float() for name in ("w", "norm", "shift")}
    for tensor in broken.values():
        tensor[17] = value
    inner = checkpoint(tmp_path, torch.float32, **broken, v=torch.ones(3, IN), gain=torch.ones(IN))
    clean = Chain((RotateRight(Hadamard(OUT)),))
    cases = {
        "w": [Chain((RotateRight(Hadamard(IN)),)), Chain((RotateLeft(Hadamard(OUT)),))],
        "c": [Chain((FoldNormBias("w", "gain"),))],
    }
    for name, chains in cases.items():
        for chain in chains:
            view = TransformedSource(inner, {name: chain, "embed": clean})
            view.load("embed")
            for use in (view.load, lambda name, view=view: view.rows(name, 0, OUT)):
                with pytest.raises(InvalidModelError, match="w: holds NaN or infinity in row 17"):
                    use(name)
    view = TransformedSource(inner, {"c": Chain((FoldNormBias("w", "shift"),))})
    with pytest.raises(InvalidModelError, match="shift: holds NaN or infinity in row 17"):
        view.load("c")
    view = TransformedSource(inner, {"u": Chain((FuseNorm(("norm",)),), origin="v")})
    with pytest.raises(InvalidModelError, match="norm: holds NaN or infinity in row 17"):
        view.load("u")


def test_float16_that_overflows(tmp_path: Path) -> None:
    large = torch.full((4, 16), 60000.0)
    inner = checkpoint(tmp_path, torch.float16, large=large.half(), gain=torch.full((16,), 3.0).half())
    view = TransformedSource(inner, {"large": Chain((FuseNorm(("gain",)),))})
    assert torch.equal(view.rows("large", 0, 4), large.half().float() * 3)
    with pytest.raises(UnsupportedError, match="large: is too large for float16 once it is transformed"):
        view.load("large")
