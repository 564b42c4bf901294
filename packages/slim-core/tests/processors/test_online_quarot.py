"""``online_quarot``: what a recipe may say, which attentions it rotates, and by what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from slim_core.checkpoint.reader import Checkpoint
from slim_core.devices import resolve_devices
from slim_core.errors import UnsupportedError
from slim_core.model.attention import AttentionInfo, Tap
from slim_core.model.skeleton import parameters_on_meta
from slim_core.model.streamed import StreamedModel
from slim_core.processors.online_quarot import OnlineQuarot, OnlineQuarotConfig
from slim_core.progress import SilentProgress
from slim_core.recipe import recipe_from_dict
from slim_core.runners.plan import make_plan
from slim_core.runners.run import run_plan
from slim_core.savers.mindie_folder import MindieFolder

HEADS, WIDTH = 2, 16


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q = nn.Linear(width, width)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn, self.cross = Attention(width), Attention(width)

    def forward(self, x: Tensor) -> Tensor:
        return x


class Model(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@dataclass
class Access:
    """Attentions that hand their taps what they are told to."""

    attentions: Sequence[AttentionInfo]
    states: tuple[Tensor | None, Tensor, Tensor] | None = None
    after: dict[str, Any] = field(default_factory=dict[str, Any])

    @contextmanager
    def tapped(self, taps: Mapping[str, Tap]) -> Iterator[None]:
        assert self.states is not None
        for name, tap in taps.items():
            self.after[name] = tap(*self.states)
        yield


def opened(folder: Path, width: int = WIDTH, dtype: torch.dtype = torch.float32, **facts: Any) -> StreamedModel:
    """The checkpoint has names of its own: ``layers.0.self`` for ``blocks.0.attn``."""
    folder.mkdir(exist_ok=True)
    stored = {called(name): value.to(dtype) for name, value in Model(width).state_dict().items()}
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    with parameters_on_meta():
        module = Model(width)
    infos = [
        AttentionInfo(
            name, called(name), HEADS, HEADS, width // HEADS, width // HEADS, also_called=(f"x.{i}",), **facts
        )
        for i in range(3)
        for name in [f"blocks.{i}.attn"]
    ]
    return StreamedModel(module, Checkpoint(folder), folder, {}, ("blocks",), called, attention=Access(infos))


def called(name: str) -> str:
    return name.replace("blocks.", "layers.").replace(".attn", ".self")


def processor(**config: Any) -> OnlineQuarot:
    return OnlineQuarot(OnlineQuarotConfig.model_validate({"type": "online_quarot", **config}), "process[0]")


def rotated(model: StreamedModel) -> list[str]:
    return [info.name for unit in model.units for info in unit.attentions if info.rotated]


@pytest.mark.parametrize(
    ("config", "which"),
    [
        ({}, [0, 1, 2]),
        ({"include": None, "exclude": None}, [0, 1, 2]),
        ({"include": ["*"]}, [0, 1, 2]),
        ({"include": ["*.attn"], "exclude": ["*blocks.0.*"]}, [1, 2]),
        ({"include": ["layers.1.self"]}, [1]),
        ({"include": ["layers.{0,2}.self.*"]}, [0, 2]),
        ({"include": ["*.q_rot"]}, [0, 1, 2]),
        ({"exclude": ["blocks.2.attn.k_rot"]}, [0, 1]),
        ({"include": ["x.2"]}, [2]),
        ({"include": ["*.cross"]}, []),
    ],
)
def test_patterns_name_attentions_or_their_matrices(tmp_path: Path, config: dict[str, Any], which: list[int]) -> None:
    one = processor(**config)
    model = one.prepare(opened(tmp_path), None)
    names = [f"blocks.{i}.attn" for i in which]
    assert rotated(model) == names
    assert model.attention is not None
    assert [info.name for info in model.attention.attentions if info.rotated] == names
    added = {name: meta for unit in model.units for name, meta in unit.added.items()}
    assert list(added) == [f"{name}.{leaf}" for name in names for leaf in ("q_rot", "k_rot")]
    for name, meta in added.items():
        assert (meta.name, meta.dtype, meta.shape) == (called(name), torch.bfloat16, (8, 8))
    assert (one.summary() == "") == (not which)
    missed = [note for note in one.notes() if "matches no attention" in note]
    assert len(missed) == ("cross" in str(config))
    assert ("spec.process[0] rotates no attention" in one.notes()) == (not which)


@pytest.mark.parametrize("block_size", [0, 3, -2, "all"])
def test_block_sizes_are_powers_of_two(block_size: Any) -> None:
    with pytest.raises(ValidationError, match="block_size"):
        processor(block_size=block_size)


@pytest.mark.parametrize(
    ("facts", "width", "config", "text"),
    [
        ({"problem": "strange"}, 16, {}, r"blocks\.0\.attn: cannot be rotated: strange .*process\[0\]"),
        ({"latent": True}, 16, {}, "its query and key cannot be reached"),
        ({"sees_query": False}, 16, {}, "its query and key cannot be reached"),
        ({"rotated": True}, 16, {}, "another online_quarot rotates it already"),
        ({}, 16, {"block_size": 16}, "heads of 8 channels cannot be rotated: a block size of 16 does not divide 8"),
        ({}, 12, {}, "heads of 6 channels cannot be rotated: no Hadamard matrix of order 6"),
    ],
)
def test_what_cannot_be_rotated(
    tmp_path: Path, facts: dict[str, Any], width: int, config: dict[str, Any], text: str
) -> None:
    with pytest.raises(UnsupportedError, match=text):
        processor(**config).prepare(opened(tmp_path, width, **facts), None)


def test_a_model_without_attentions_is_refused(tmp_path: Path) -> None:
    model = opened(tmp_path)
    model = StreamedModel(model.module, model.source, model.folder, {}, ("blocks",), called)
    with pytest.raises(UnsupportedError, match=r"spec\.process\[0\]: no attention that could be rotated"):
        processor().prepare(model, None)


@pytest.mark.parametrize(("width", "block_size"), [(16, -1), (16, 2), (24, -1), (24, 4)])
def test_states_are_multiplied_by_one_orthogonal_matrix(tmp_path: Path, width: int, block_size: int) -> None:
    """Taps see them so, and what taps leave alone is left alone."""
    model = opened(tmp_path, width)
    access: Any = model.attention
    dim, generator = width // HEADS, torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(1, HEADS, 20, dim, generator=generator) for _ in range(3))
    access.states = query, key, value
    view = processor(block_size=block_size, exclude=["*.2.*"]).prepare(model, None)
    assert view.attention is not None
    seen: dict[str, Any] = {}
    for name, passes in (("blocks.0.attn", True), ("blocks.1.attn", False), ("blocks.2.attn", True)):

        def tap(*states: Any, name: str = name, passes: bool = passes) -> Any:
            seen[name] = states
            return states if passes else None

        with view.attention.tapped({name: tap}):
            pass
    assert all(torch.equal(x, y) for x, y in zip(seen["blocks.2.attn"], access.states, strict=True))
    assert access.after["blocks.1.attn"] is None
    turned_query, turned_key, same = seen["blocks.0.attn"]
    assert access.after["blocks.0.attn"] == (turned_query, turned_key, same)
    assert torch.equal(same, value)
    matrix = torch.linalg.lstsq(query.reshape(-1, dim), turned_query.reshape(-1, dim)).solution
    assert torch.allclose(matrix @ matrix.T, torch.eye(dim), atol=4e-3)  # the matrix is kept in bfloat16
    assert torch.allclose(key @ matrix, turned_key, atol=1e-4)
    size = dim if block_size == -1 else block_size
    entry = torch.tensor(size**-0.5).bfloat16().float()  # all scores change by one factor near one
    assert torch.allclose(turned_query @ turned_key.mT, size * entry**2 * (query @ key.mT), atol=1e-4)
    outside = torch.block_diag(*[torch.ones(size, size)] * (dim // size)) == 0
    assert (matrix[outside].abs() < 1e-4).all()
    assert torch.allclose(matrix[~outside].abs(), entry, atol=1e-4)


def test_the_matrices_are_written_beside_what_is_left_as_it_is(tmp_path: Path) -> None:
    process: list[dict[str, Any]] = [
        {"type": "online_quarot", "exclude": ["*.1.*"]},
        {"type": "fa3_quant", "exclude": ["*.1.*"], "qconfig": {"dtype": "fp8_e4m3", "scope": "per_token"}},
    ]
    spec = {"process": process, "save": [{"type": "mindie_format_saver"}]}
    parsed = recipe_from_dict({"apiversion": "modelslim_v1", "spec": spec}).spec()
    model = opened(tmp_path / "model", dtype=torch.float16)
    plan = make_plan(model, parsed, resolve_devices("cpu", explicit=True))
    assert plan.refusal is None
    run_plan(plan, tmp_path / "out", fingerprint="", progress=SilentProgress())
    folder = MindieFolder(tmp_path / "out")
    names = {f"layers.{i}.self.{leaf}" for i in (0, 2) for leaf in ("q_rot", "k_rot")}
    assert {name for name in folder.source if name.endswith("_rot")} == names
    first = folder.source.load("layers.0.self.q_rot")
    assert first.dtype == torch.bfloat16
    assert all(torch.equal(folder.source.load(name), first) for name in names)
    assert {folder.description[name] for name in names} == {"FLOAT"}
    assert folder.attentions() == {"layers.0.self", "layers.2.self"}
    untouched = {name for name in folder.source if name not in names}
    assert untouched == set(model.source)
    assert all(torch.equal(folder.source.load(name), model.source.load(name)) for name in untouched)
