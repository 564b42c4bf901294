"""Rotating a model that is made for the purpose, with whatever a decoder may have that helps or stands in the way."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from slim_core.checkpoint.reader import Checkpoint
from slim_core.errors import InvalidModelError, UnsupportedError
from slim_core.model.skeleton import parameters_on_meta
from slim_core.model.streamed import StreamedModel
from slim_core.model.structure import discover
from slim_core.rotation.matrices import Hadamard
from slim_core.rotation.model import RotatedModel, rotate_model
from slim_core.rotation.online_places import OnlineChoice

WIDTH, HEADS, DIM, INNER, WORDS = 24, 2, 8, 32, 40
EXAMPLE = {"input_ids": torch.arange(9)[None]}


class Norm(nn.Module):
    def __init__(self, width: int, traits: Collection[str] = ()) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if "norm bias" in traits else None
        self.centred, self.plus_one = "layer norm" in traits, "plus one" in traits
        self.odd = "odd norm" in traits

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        size = x.abs().mean(-1, keepdim=True) if self.odd else x.square().mean(-1, keepdim=True).sqrt()
        y = x / (size + 1e-6) * (self.weight + self.plus_one)
        return y if self.bias is None else y + self.bias


class Attention(nn.Module):
    def __init__(self, traits: Collection[str]) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.traits = HEADS, DIM, traits
        bias = "linear bias" in traits
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, nn.Linear(WIDTH, HEADS * DIM, bias=bias))
        self.o_proj = nn.Linear(HEADS * DIM, WIDTH, bias=bias)
        self.inner = nn.Linear(DIM, DIM, bias=False) if "used directly" in traits else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        k = k if self.inner is None else functional.linear(k, self.inner.weight)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        if "gate" in self.traits:
            out = out * torch.sigmoid(q.transpose(1, 2).flatten(2))
        return self.o_proj(out)


class Mlp(nn.Module):
    def __init__(self, traits: Collection[str]) -> None:
        super().__init__()
        bias = "linear bias" in traits
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, INNER, bias=bias) for _ in range(2))
        self.down_proj = nn.Linear(INNER, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, traits: Collection[str]) -> None:
        super().__init__()
        self.traits = traits
        self.input_layernorm, self.post_attention_layernorm = Norm(WIDTH, traits), Norm(WIDTH, traits)
        self.self_attn, self.mlp = Attention(traits), Mlp(traits)
        self.after_norm = Norm(WIDTH) if "post norm" in traits else nn.Identity()
        self.raw = nn.Linear(WIDTH, 1) if "raw reader" in traits else None
        self.layer_scale = nn.Parameter(torch.ones(WIDTH)) if "layer scale" in traits else None
        self.constant = nn.Parameter(torch.zeros(WIDTH)) if "constant" in traits else None
        self.calls = [0]

    def forward(self, hidden_states: Tensor) -> Any:
        self.calls[0] += 1
        h = hidden_states + self.self_attn(self.input_layernorm(hidden_states))
        made = self.after_norm(self.mlp(self.post_attention_layernorm(h)))
        if self.raw is not None:
            made = made * torch.sigmoid(self.raw(h))
        made = made if self.layer_scale is None else made * self.layer_scale
        made = made if self.constant is None else made + self.constant
        if "stateful" in self.traits:
            made = made * (1 + self.calls[0])
        if "reads itself" in self.traits:
            made = made * h.max(-1, keepdim=True).values
        return (h + made, None) if "tuple" in self.traits else h + made


@dataclass
class Output:
    logits: Tensor


class Net(nn.Module):
    def __init__(self, *traits: str) -> None:
        super().__init__()
        self.traits = traits
        self.embed_tokens = nn.Embedding(WORDS, WIDTH, padding_idx=WORDS - 1)
        self.position = nn.Embedding(30, WIDTH) if "learned positions" in traits else None
        self.start = nn.Parameter(torch.zeros(WIDTH)) if "start vector" in traits else None
        self.layers = nn.ModuleList(Block(traits) for _ in range(2))
        self.norm = nn.Identity() if "no last norm" in traits else Norm(WIDTH, traits)
        self.lm_head = nn.Linear(WIDTH, WORDS, bias=False)
        if "tied" in traits:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, input_ids: Tensor) -> Any:
        h = self.embed_tokens(input_ids) * 3.0
        if self.position is not None:
            h = h + self.position(torch.arange(input_ids.shape[1])[None])
        h = h if self.start is None else h + self.start
        for layer in self.layers:
            out = layer(h)
            h = out[0] if isinstance(out, tuple) else out
        if "no head" in self.traits:
            return Output(h[..., :5])
        logits = self.lm_head(self.norm(h))
        if "peeks" in self.traits:
            logits = logits + h.max(-1, keepdim=True).values
        return h if "no logits" in self.traits else Output(logits / 2)


def opened(folder: Path, *traits: str, dtype: torch.dtype = torch.float32, **more: Tensor) -> StreamedModel:
    generator = torch.Generator().manual_seed(len(traits))
    tensors: dict[str, Tensor] = {}
    net = Net(*traits)
    for name, parameter in net.named_parameters():
        scale = 0.3 if parameter.dim() > 1 else 0.2
        start = 1.0 if "norm.weight" in name and "plus one" not in traits else 0.0
        tensors[name] = (start + scale * torch.randn(parameter.shape, generator=generator)).to(dtype)
    folder.mkdir(exist_ok=True)
    save_file(tensors | more, folder / "model.safetensors")
    with parameters_on_meta():
        net = Net(*traits).to(dtype)
    return StreamedModel(net, Checkpoint(folder), folder, {"tie_word_embeddings": "tied" in traits})


def rotated(model: StreamedModel, **options: Any) -> RotatedModel:
    return rotate_model(model, discover(model, EXAMPLE), EXAMPLE, **options)


def logits(model: StreamedModel) -> Tensor:
    names = [name for unit in model.units for name in unit.parameters]
    model.load(names, torch.device("cpu"))
    with torch.no_grad():
        found = model.module(torch.arange(20)[None] * 7 % WORDS).logits
    model.unload(names)
    return found


def differ(one: StreamedModel, other: StreamedModel) -> float:
    first, second = logits(one), logits(other)
    return float((first - second).abs().max() / first.abs().max())


@pytest.mark.parametrize(
    "traits",
    [
        (),
        ("tied",),
        ("linear bias",),
        ("norm bias", "linear bias"),
        ("plus one",),
        ("raw reader",),
        ("tuple",),
        ("learned positions",),
        ("no last norm",),
        ("used directly",),
    ],
    ids=str,
)
def test_models_that_stay_the_same(tmp_path: Path, traits: tuple[str, ...]) -> None:
    if "norm bias" in traits:  # the head has no bias that could take that of the last norm
        traits = (*traits, "no last norm")
    model = opened(tmp_path / "m", *traits)
    result = rotated(model)
    assert result.stream == Hadamard(WIDTH)
    assert result.notes == ()
    assert differ(model, result.model) < 1e-5
    assert {parameter.device.type for parameter in model.module.parameters()} == {"meta"}
    readers = {f"layers.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "mlp.up_proj")}
    assert readers <= result.readers.keys()
    assert result.readers["layers.1.self_attn.v_proj"] == "layers.1.self_attn.q_proj"
    assert ("layers.0.raw" in result.readers) == ("raw reader" in traits)
    assert result.model.config["tie_word_embeddings"] is False
    assert model.config["tie_word_embeddings"] is ("tied" in traits)
    gain = torch.ones(WIDTH) if "no last norm" in traits else Checkpoint(tmp_path / "m").load("norm.weight")
    assert torch.equal(result.last_gain(), gain + ("plus one" in traits))


def test_every_tensor_is_changed_but_those_of_queries_and_keys(tmp_path: Path) -> None:
    model = opened(tmp_path / "m", "linear bias")
    result = rotated(model)
    same = {name for name in model.source if torch.equal(model.source.load(name), result.model.source.load(name))}
    assert {name.split(".", 2)[-1] for name in same} == (
        {"self_attn.q_proj.bias", "self_attn.k_proj.bias", "mlp.gate_proj.bias", "mlp.up_proj.bias"}
    )


def test_half_precision_rounds_and_no_more(tmp_path: Path) -> None:
    model = opened(tmp_path / "m", dtype=torch.bfloat16)
    result = rotated(model)
    assert result.model.source.meta("lm_head.weight").dtype == torch.bfloat16
    assert differ(model, result.model) < 0.1


REFUSED: dict[tuple[str, ...], tuple[str, str]] = {
    ("layer norm",): ("layers.0.input_layernorm", "it subtracts the mean of the hidden states"),
    ("odd norm",): ("layers.0.input_layernorm", "it is no root mean square norm"),
    ("post norm",): ("layers.0.mlp.down_proj", "its output passes a norm, or something else that is not linear"),
    ("layer scale",): ("layers.0", "with rotated weights the block would compute something else: what"),
    ("reads itself",): ("layers.0", "with rotated weights the block would compute something else: what it adds"),
    ("constant",): ("layers.0", "something besides its linears changes the hidden states that it hands on"),
    ("stateful",): ("layers.0", "it does not make the same of the same hidden states every time"),
    ("norm bias",): ("layers.0.input_layernorm", "it adds a bias, for which .*q_proj has no place once it is rotated"),
    ("start vector",): ("Net", "what it does between the embedding and the first block does not go with a rotation"),
    ("peeks",): ("Net", "what it does after the last block does not go with a rotation: logits are off by"),
    ("no head",): ("Net", "no head reads the hidden states directly"),
}


@pytest.mark.parametrize("traits", REFUSED, ids=str)
def test_models_that_would_not_stay_the_same(tmp_path: Path, traits: tuple[str, ...]) -> None:
    where, message = REFUSED[traits]
    model = opened(tmp_path / "m", *traits)
    before = logits(model) if "stateful" not in traits else None
    with pytest.raises(UnsupportedError, match=message) as caught:
        rotated(model)
    assert caught.value.where == where
    assert {parameter.device.type for parameter in model.module.parameters()} == {"meta"}
    if before is not None:
        assert torch.equal(logits(model), before)


def test_a_model_without_logits(tmp_path: Path) -> None:
    with pytest.raises(InvalidModelError, match="returned Tensor, which has no logits"):
        rotated(opened(tmp_path / "m", "no logits"))


def test_value_heads_that_cannot_be_rotated_are_left_alone(tmp_path: Path) -> None:
    """A gate multiplies channel by channel: a scale may pass it, a rotation may not."""
    model = opened(tmp_path / "m", "gate")
    result = rotated(model)
    assert differ(model, result.model) < 1e-5
    (note,) = result.notes
    assert note.startswith(
        "layers.0.self_attn.v_proj and what reads it are not rotated against each other: what it adds"
    )
    assert "value paths" not in result.summary
    assert "2 value paths" in rotated(opened(tmp_path / "plain")).summary


@pytest.mark.parametrize(("size", "what"), [(16, "24 channels of the hidden states"), (32, "24 channels")])
def test_blocks_that_do_not_divide(tmp_path: Path, size: int, what: str) -> None:
    with pytest.raises(UnsupportedError, match=f"block_size {size} does not divide the {what}") as caught:
        rotated(opened(tmp_path / "m"), block_size=size, where="spec.process[2]")
    assert caught.value.where == "spec.process[2]"


@pytest.mark.parametrize("size", [1, 2, 8])
def test_blocks(tmp_path: Path, size: int) -> None:
    model = opened(tmp_path / "m")
    result = rotated(model, block_size=size)
    assert differ(model, result.model) < 1e-5
    matrix = result.stream.dense()
    assert int((matrix != 0).sum(1).max()) == size
    assert torch.equal(matrix[:size, :size], matrix[-size:, -size:])


def test_hidden_states_without_a_hadamard_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.WIDTH", 22)
    with pytest.raises(UnsupportedError, match="the hidden states: no Hadamard matrix of order 22"):
        rotated(opened(tmp_path / "m"))


def test_heads_without_a_hadamard_matrix_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.DIM", 6)
    model = opened(tmp_path / "m")
    result = rotated(model)
    assert differ(model, result.model) < 1e-5
    assert "no Hadamard matrix of order 6" in result.notes[0]


def test_rotations_at_run_time(tmp_path: Path) -> None:
    model = opened(tmp_path / "m")
    before = logits(model)
    result = rotated(model, online=OnlineChoice(1, (1,)))
    assert list(result.online) == (["layers.0.self_attn.o_proj", "layers.1.self_attn.o_proj", "layers.1.mlp.down_proj"])
    assert torch.allclose(logits(result.model), before, atol=1e-5 * float(before.abs().max()))
    beside = [unit for unit in result.model.units if unit.name == "extra"]
    assert set(beside[0].tensors) == {
        *(f"layers.{i}.self_attn.o_proj.heads_rotation" for i in range(2)),
        *(f"layers.1.mlp.down_proj.kronecker_rotation_{part}" for part in "mn"),
    }


def test_a_width_that_is_no_product_of_two_orders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.INNER", 20)
    model = opened(tmp_path / "m")
    assert len(rotated(model, online=OnlineChoice(1, (7,))).online) == 2  # there is no such layer
    with pytest.raises(UnsupportedError, match="20 cannot be written as a product of two orders") as caught:
        rotated(opened(tmp_path / "n"), online=OnlineChoice(1, (1,)))
    assert caught.value.where == "layers.1.mlp.down_proj"


def test_another_rotation_of_the_stream(tmp_path: Path) -> None:
    """What a stage ahead learns is put in place of the Hadamard matrix, and only there."""
    from slim_core.rotation.dense import DenseRotation

    model = opened(tmp_path / "m", "tied")
    result = rotated(model)
    matrix = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1)).double()).Q
    other = result.model.with_source(result.source_with(DenseRotation(matrix)))
    assert other.units is result.model.units
    assert differ(model, other) < 1e-5
    expected = model.source.load("embed_tokens.weight").double() @ matrix
    assert torch.allclose(other.source.load("embed_tokens.weight").double(), expected, atol=1e-6)
    same = "layers.0.self_attn.v_proj.weight"
    left = torch.linalg.lstsq(model.source.load(same).double().T, other.source.load(same).double().T)
    assert left.solution.shape == (16, 16)


@pytest.mark.parametrize("name", ["model.layers.2.eh_proj.weight", "merger.weight"])
def test_tensors_that_nobody_uses(tmp_path: Path, name: str) -> None:
    model = opened(tmp_path / "m", **{name: torch.zeros(WIDTH, 7)})
    with pytest.raises(UnsupportedError, match="the model class does not use this tensor") as caught:
        rotated(model)
    assert caught.value.where == name
    harmless = opened(tmp_path / "h", **{name: torch.zeros(WIDTH)}, other=torch.zeros(7, 7))
    assert differ(harmless, rotated(harmless).model) < 1e-5
