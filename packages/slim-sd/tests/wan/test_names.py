"""Names of Wan transformers in both layouts."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders import single_file_utils
from hypothesis import given
from hypothesis import strategies as st

from slim_core.errors import UnexpectedError
from slim_sd.wan.names import diffusers_name, original_name

CONFIGS: dict[str, dict[str, Any]] = {
    "t2v": {"in_channels": 16},
    "i2v": {"in_channels": 36, "image_dim": 32, "added_kv_proj_dim": 32},
    "flf2v": {"in_channels": 36, "image_dim": 32, "added_kv_proj_dim": 32, "pos_embed_seq_len": 10},
    "ti2v": {"in_channels": 48, "out_channels": 48},
}


def transformer(kind: str) -> WanTransformer3DModel:
    sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64, "num_layers": 2}
    with torch.device("meta"):
        return WanTransformer3DModel(text_dim=16, freq_dim=16, **sizes, **CONFIGS[kind])


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_parameter_is_renamed_as_the_library_converts_it(kind: str) -> None:
    names = list(transformer(kind).state_dict())
    originals = [original_name(name) for name in names]
    assert len(set(originals)) == len(names)
    assert [diffusers_name(name) for name in originals] == names
    # The table of diffusers knows all but the positions of first and last frames.
    known = {name: index for index, name in enumerate(originals) if name != "img_emb.emb_pos"}
    converted = single_file_utils.convert_wan_transformer_to_diffusers(dict(known))
    assert converted == {names[index]: index for index in known.values()}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_spelled_out_table_agrees(kind: str, tiny_wan: ModuleType) -> None:
    tensors = transformer(kind).state_dict()
    assert list(tiny_wan.original_transformer_names(tensors)) == [original_name(name) for name in tensors]


@pytest.mark.parametrize("kind", CONFIGS)
def test_modules_have_their_parameters_names(kind: str) -> None:
    """Every name of a module is undone, none is taken twice, and it begins the names of its parameters."""
    module = transformer(kind)
    names = [name for name, _ in module.named_modules()]
    originals = {name: original_name(name) for name in names}
    assert len(set(originals.values())) == len(names)
    assert {diffusers_name(name): name for name in originals.values()} == originals
    for name, owner in module.named_modules():
        if not any(True for _ in owner.children()):
            for parameter, _ in owner.named_parameters():
                assert original_name(f"{name}.{parameter}").startswith(originals[name])


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("blocks.3.attn1.to_q", "blocks.3.self_attn.q"),
        ("blocks.3.attn1.to_out.0.bias", "blocks.3.self_attn.o.bias"),
        ("blocks.12.attn2.add_k_proj.weight", "blocks.12.cross_attn.k_img.weight"),
        ("blocks.0.attn2.norm_added_k", "blocks.0.cross_attn.norm_k_img"),
        ("blocks.0.attn2", "blocks.0.cross_attn"),
        ("blocks.0.ffn.net.2.weight_scale", "blocks.0.ffn.2.weight_scale"),
        ("blocks.0.ffn.net.2.linear.weight", "blocks.0.ffn.2.linear.weight"),
        ("blocks.0.norm1", "blocks.0.norm1"),
        ("blocks.0.norm2.weight", "blocks.0.norm3.weight"),
        ("blocks.0.norm3", "blocks.0.norm2"),
        ("blocks.0.scale_shift_table", "blocks.0.modulation"),
        ("scale_shift_table", "head.modulation"),
        ("proj_out.weight", "head.head.weight"),
        ("condition_embedder.image_embedder.ff.net.0.proj.weight", "img_emb.proj.1.weight"),
        ("condition_embedder.time_proj", "time_projection.1"),
        ("patch_embedding.weight", "patch_embedding.weight"),
        ("rope.freqs_cos", "rope.freqs_cos"),
        ("blocks.0", "blocks.0"),
        ("blocks", "blocks"),
        ("", ""),
    ],
)
def test_names(theirs: str, ours: str) -> None:
    assert original_name(theirs) == ours
    assert diffusers_name(ours) == theirs


@pytest.mark.parametrize(
    ("rename", "name"),
    [
        (original_name, "blocks.0.self_attn.q.weight"),
        (original_name, "blocks.0.attn1.q.weight"),
        (original_name, "head.head.weight"),
        (original_name, "blocks.0.ffn.2"),
        (diffusers_name, "blocks.0.attn1.to_q.weight"),
        (diffusers_name, "blocks.0.ffn.net.2.weight"),
        (diffusers_name, "scale_shift_table"),
    ],
)
def test_a_name_of_the_other_layout_is_refused(rename: Callable[[str], str], name: str) -> None:
    with pytest.raises(UnexpectedError, match="no name of this layout"):
        rename(name)


_PARTS = st.sampled_from(
    (
        *("blocks", "0", "2", "17", "attn1", "attn2", "self_attn", "cross_attn", "to_q", "q", "k_img", "to_out", "ffn"),
        *("net", "proj", "norm2", "norm3", "head", "modulation", "scale_shift_table", "condition_embedder", "weight"),
    )
)


@given(st.lists(_PARTS, min_size=1, max_size=6).map(".".join))
def test_whatever_is_renamed_can_be_undone(name: str) -> None:
    for rename, undo in ((original_name, diffusers_name), (diffusers_name, original_name)):
        try:
            renamed = rename(name)
        except UnexpectedError:
            continue
        assert undo(renamed) == name
