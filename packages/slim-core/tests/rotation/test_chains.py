"""Chains: plain values, and refused where a step does not fit what it is taken on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from slim_core.checkpoint.reader import Checkpoint
from slim_core.errors import InvalidModelError, UnsupportedError
from slim_core.rotation.chains import Chain, Fill, FoldNormBias, FuseNorm, RotateLeft, RotateRight
from slim_core.rotation.matrices import Hadamard
from slim_core.rotation.source import TransformedSource

SHAPES = {
    "w": (20, 24),
    "c": (20,),
    "norm": (24,),
    "first": (10,),
    "embed": (50, 20),
    "other": (3, 4, 5),
    "deep": (20, 3, 4, 5),
}


def test_chains_are_plain_values() -> None:
    one = Chain((FuseNorm(("norm",)), RotateRight(Hadamard(24))), origin="w")
    assert one == Chain((FuseNorm(("norm",)), RotateRight(Hadamard(24))), origin="w")
    assert one != Chain((FuseNorm(("norm",)), RotateRight(Hadamard(24, seed=5))), origin="w")
    assert len({one, Chain(one.steps, "w"), Chain(one.steps, "v")}) == 2
    assert str(one) == (
        "Chain(steps=(FuseNorm(norms=('norm',), plus_one=False), "
        "RotateRight(rotation=Hadamard(order=24, seed=1234))), origin='w')"
    )


DEFECTS: list[tuple[str, Chain, type[Exception], str]] = [
    ("new", Chain((Fill(1.0),)), InvalidModelError, "new: is not in the checkpoint, and its chain names nothing"),
    ("new", Chain(), InvalidModelError, "new: is not in the checkpoint"),
    (
        "new",
        Chain((Fill(1.0),), "absent"),
        InvalidModelError,
        "new: there is no tensor 'absent', from which it is made",
    ),
    ("w", Chain((FuseNorm(("absent",)),)), InvalidModelError, "w: there is no tensor 'absent'"),
    ("c", Chain((FoldNormBias("w", "absent"),)), InvalidModelError, "c: there is no tensor 'absent'"),
    ("w", Chain((FuseNorm(("first",)),)), UnsupportedError, r"w: norms of shape \(10,\) do not fit its 24 input"),
    ("w", Chain((FuseNorm(("embed",)),)), UnsupportedError, r"w: norms of shape \(50, 20\) do not fit its 24 input"),
    ("w", Chain((RotateRight(Hadamard(20)),)), UnsupportedError, "w: a rotation of size 20 does not fit its 24 input"),
    ("w", Chain((RotateLeft(Hadamard(24)),)), UnsupportedError, "w: a rotation of size 24 does not fit its 20 output"),
    ("c", Chain((RotateLeft(Hadamard(24)),)), UnsupportedError, "c: a rotation of size 24 does not fit its 20 output"),
    (
        "c",
        Chain((RotateRight(Hadamard(20)),)),
        UnsupportedError,
        r"c: RotateRight cannot be applied to .* shape \[20\]",
    ),
    ("w", Chain((Fill(1.0),)), UnsupportedError, r"w: Fill cannot be applied to a tensor of shape \[20, 24\]"),
    ("other", Chain((RotateRight(Hadamard(4)),)), UnsupportedError, r"cannot be applied to .* shape \[3, 4, 5\]"),
    ("c", Chain((FoldNormBias("w", "first"),)), UnsupportedError, r"'first' \[10\] does not fit 'w' \[20, 24\]"),
    ("c", Chain((FoldNormBias("deep", "other"),)), UnsupportedError, "does not fit 'deep'"),
    ("c", Chain((FoldNormBias("embed", "c"),)), UnsupportedError, "does not fit 'embed'"),
    ("c", Chain((FoldNormBias("norm", "c"),)), UnsupportedError, "does not fit 'norm'"),
    ("fp8", Chain((RotateRight(Hadamard(4)),)), UnsupportedError, "fp8: is stored as float8_e4m3fn and cannot be"),
    ("new", Chain((RotateRight(Hadamard(4)),), "ints"), UnsupportedError, "ints: is stored as int8 and cannot be"),
]


@pytest.mark.parametrize(("name", "chain", "kind", "message"), DEFECTS)
def test_refused_when_the_view_is_made(
    tmp_path: Path, name: str, chain: Chain, kind: type[Exception], message: str
) -> None:
    tensors = {key: torch.zeros(shape) for key, shape in SHAPES.items()}
    tensors |= {"fp8": torch.zeros(4, 4).to(torch.float8_e4m3fn), "ints": torch.zeros(4, 4, dtype=torch.int8)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(kind, match=message):
        TransformedSource(Checkpoint(tmp_path), {name: chain})
