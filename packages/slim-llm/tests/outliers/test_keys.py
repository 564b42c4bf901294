"""``kv_smooth`` on real architectures: keys reach equally far, and the model computes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from slim_core.errors import UnsupportedError
from slim_core.evaluation.verify import verify_folder

BLOCKS, SAMPLES = 3, 5
KEYS: dict[str, Any] = {"type": "kv_smooth"}


ModelFolder = Callable[..., Path]
Quantize = Callable[..., Any]
Stranger = Any  # of conftest.py


def keys_of(net: Any, ids: list[list[int]]) -> dict[int, Tensor]:
    """The keys of all samples as they enter the cache, by layer, ``(kv_heads, tokens, dim)``."""
    found: dict[int, list[Tensor]] = {}
    for each in ids:
        cache = DynamicCache(config=net.config)
        with torch.no_grad():
            net(input_ids=torch.tensor([each]), past_key_values=cache, use_cache=True)
        for number, layer in enumerate(cache.layers):
            found.setdefault(number, []).append(layer.keys[0])  # pyright: ignore
    return {number: torch.cat(parts, 1) for number, parts in found.items()}


HALF, INTERLEAVED_HALF = [0, 1, 2, 3] * 2, [0, 0, 1, 1, 2, 3, 4, 5]
PARTIAL = [0, 1, 0, 1, 2, 3, 4, 5]
PAIRS = {
    "llama": (HALF, False),
    "qwen2": (HALF, False),
    "qwen3": (HALF, True),
    "gemma3": (HALF, True),
    "phi3": (HALF, False),
    "glm4": (INTERLEAVED_HALF, False),
    "glm4_moe": (PARTIAL, False),
    "minimax_m2": (PARTIAL, False),
    "olmo2": (HALF, False),
    "qwen3_moe": (HALF, True),
}


@pytest.mark.parametrize("family", PAIRS)
def test_smoothed_keys_reach_equally_far_and_the_model_computes_the_same(
    stranger: Stranger,
    model_folder: ModelFolder,
    quantize: Quantize,
    dataset: Path,
    token_ids: list[list[int]],
    tmp_path: Path,
    family: str,
) -> None:
    model = model_folder(family, torch.float32)
    quantize(model, tmp_path / "out", process=[KEYS], dataset={"path": str(dataset), "max_length": 8})
    smooth = stranger.opened(tmp_path / "out")
    assert stranger.far(stranger.logits(stranger.opened(model), token_ids), stranger.logits(smooth, token_ids)) <= 1e-4
    pairing, shared = PAIRS[family]
    short = [ids[:8] for ids in token_ids]  # what was calibrated, within every sliding window
    for keys in keys_of(smooth, short).values():
        absmax = keys.abs().amax(1)
        members = [[c for c, one in enumerate(pairing) if one == pair] for pair in range(max(pairing) + 1)]
        largest = torch.stack([absmax[:, channels].amax(1) for channels in members], 1)
        for reach in [largest.amax(0)] if shared else largest:
            assert torch.allclose(reach, reach[0].expand_as(reach), rtol=1e-4)
    assert not verify_folder(tmp_path / "out", model).problems


def test_attentions_of_a_fused_and_partly_rotated_model(
    stranger: Stranger, quantize: Quantize, token_ids: list[list[int]], tmp_path: Path, model_folder: ModelFolder
) -> None:
    """GPT-NeoX: query, key and value of a head side by side in one matrix, a quarter of the head rotated."""
    folder = tmp_path / "model"
    settings = {"vocab_size": 3072, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.GPTNeoXConfig(**settings, num_attention_heads=4, max_position_embeddings=64)
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(float(parameter.dim() == 1), 0.2)
    net.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model_folder("llama", torch.float32) / name).read_bytes())
    result = quantize(folder, tmp_path / "out", process=[KEYS])
    assert result.block_forwards == 2 * SAMPLES
    smooth = stranger.opened(tmp_path / "out")
    assert stranger.far(stranger.logits(stranger.opened(folder), token_ids), stranger.logits(smooth, token_ids)) <= 1e-4
    for number, keys in keys_of(smooth, token_ids).items():
        absmax = keys.abs().amax(1)
        absmax[:, :2] = absmax[:, :2].amax(1, keepdim=True)  # the one pair that is rotated
        assert torch.allclose(absmax, absmax[:, :1].expand_as(absmax), rtol=1e-4), number


def test_latent_attention_has_no_keys_to_smooth(model_folder: ModelFolder, quantize: Quantize, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError) as caught:
        quantize(model_folder("deepseek_v3", torch.float32), tmp_path / "out", process=[KEYS])
    assert caught.value.where == "spec.process[0]"
    assert "model.layers.0.self_attn: it caches a compressed latent that has no keys to scale" in caught.value.what
    assert caught.value.remedy == "leave this processor out"


def test_which_attentions_are_smoothed(
    stranger: Stranger, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    model = model_folder("qwen2", torch.float32)
    before = stranger.tensors(model)
    for name, fields, layers, told in (
        ("one", {"include": ["*.1.self_attn"]}, {1}, []),
        ("but", {"exclude": ["model.layers.1.*", "*.k_proj"]}, {0, 2}, ["exclude: pattern '*.k_proj' matches no"]),
        ("none", {"include": []}, set[int](), ["spec.process[0] smooths nothing"]),
    ):
        result = quantize(model, tmp_path / name, process=[KEYS | fields])
        after = stranger.tensors(tmp_path / name)
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        parts = [f"{side}_proj.{part}" for side in "qk" for part in ("weight", "bias")]
        assert changed == {f"model.layers.{layer}.self_attn.{part}" for layer in layers for part in parts}
        found = [text for text in result.warnings if "spec.process[0]" in text]
        assert len(found) == len(told)
        assert all(part in text for part, text in zip(told, found, strict=True))
        assert result.block_forwards == (BLOCKS * SAMPLES if layers else 0)
        assert [(note.source, note.targets, note.type) for note in result.smoothed] == [
            (f"model.layers.{layer}.self_attn.k_proj", (f"model.layers.{layer}.self_attn.q_proj",), "query-key")
            for layer in sorted(layers)
        ]
        assert all(note.tokens and note.scale_min < 1 < note.scale_max for note in result.smoothed)
        assert all(note.act_spread_after < note.act_spread_before for note in result.smoothed)
