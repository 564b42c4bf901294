"""Names of Wan transformers: those of the original project against those of diffusers.

Recipes and written files always use the original names, which MindIE-SD's models have, whatever the layout of the
input; the model that runs is that of diffusers. The norms of a block swap their numbers: the original counts them as
they were invented, diffusers as they are called, so ``norm3`` of the original is ``norm2`` of diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from slim_core.errors import UnexpectedError

__all__ = ["diffusers_name", "original_name"]

_BLOCK = re.compile(r"(blocks\.\d+)\.(.+)", re.DOTALL)

# diffusers -> original. A key stands for itself and for everything below it.
_INSIDE = {
    "": "",
    ".to_q": ".q",
    ".to_k": ".k",
    ".to_v": ".v",
    ".to_out.0": ".o",
    ".add_k_proj": ".k_img",
    ".add_v_proj": ".v_img",
    ".norm_added_k": ".norm_k_img",
}
_OF_A_BLOCK = {
    **{f"attn1{theirs}": f"self_attn{ours}" for theirs, ours in _INSIDE.items()},
    **{f"attn2{theirs}": f"cross_attn{ours}" for theirs, ours in _INSIDE.items()},
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "norm2": "norm3",
    "norm3": "norm2",
    "scale_shift_table": "modulation",
}
_OUTSIDE = {
    "condition_embedder.text_embedder": "text_embedding",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder": "time_embedding",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder": "img_emb",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
    "norm_out": "head.norm",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}
_OF_A_BLOCK_BACK = {ours: theirs for theirs, ours in _OF_A_BLOCK.items()}
_OUTSIDE_BACK = {ours: theirs for theirs, ours in _OUTSIDE.items()}


def original_name(name: str) -> str:
    """The original project's name of a parameter, a module or anything below one, given its name in diffusers.

    What both call the same (``patch_embedding``, ``blocks.0``, ``blocks.0.norm1``) and what the original has no name
    for (``rope``, ``condition_embedder``, ``blocks.0.ffn.net``) is returned as it is.

    Raises:
        UnexpectedError: :func:`diffusers_name` would not undo it, because the name is an original one already.
    """
    return _renamed(name, (_OF_A_BLOCK, _OUTSIDE), (_OF_A_BLOCK_BACK, _OUTSIDE_BACK))


def diffusers_name(name: str) -> str:
    """The name in diffusers of a parameter or module, given the original one; the inverse of :func:`original_name`.

    Raises:
        UnexpectedError: :func:`original_name` would not undo it, because the name is one of diffusers already.
    """
    return _renamed(name, (_OF_A_BLOCK_BACK, _OUTSIDE_BACK), (_OF_A_BLOCK, _OUTSIDE))


_Tables = tuple[Mapping[str, str], Mapping[str, str]]  # of what is inside of a block, of what is outside of blocks


def _renamed(name: str, there: _Tables, back: _Tables) -> str:
    renamed = _replaced(name, *there)
    if _replaced(renamed, *back) != name:
        raise UnexpectedError(
            f"{name!r} is no name of this layout of Wan: {renamed!r} has another one", remedy="report this as a bug"
        )
    return renamed


def _replaced(name: str, inside: Mapping[str, str], outside: Mapping[str, str]) -> str:
    block = _BLOCK.fullmatch(name)
    begin, rest, table = (f"{block[1]}.", block[2], inside) if block else ("", name, outside)
    found = _longest(rest, table)
    return name if found is None else begin + table[found] + rest[len(found) :]


def _longest(name: str, table: Mapping[str, str]) -> str | None:
    """The longest key that is the name or holds it, at a dot."""
    while name not in table:
        name, dot, _ = name.rpartition(".")
        if not dot:
            return None
    return name
