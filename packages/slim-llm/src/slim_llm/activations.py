"""What the calibration samples of a language model keep in memory."""

from __future__ import annotations

import torch

from slim_core.model.streamed import StreamedModel

__all__ = ["token_bytes"]


def token_bytes(model: StreamedModel) -> int:
    """Bytes that one token keeps while its sample waits between two blocks.

    Its hidden state, the embedding that the model's forward began with and still holds, the rotary tables, and what an
    image brings into later blocks (deepstack).
    """
    text = model.config.get("text_config") or model.config
    hidden = int(text.get("hidden_size") or text.get("n_embd") or text.get("d_model") or 0)
    heads = int(text.get("num_attention_heads") or 0)
    rotated = int(text.get("qk_rope_head_dim") or text.get("head_dim") or (hidden // heads if heads else 0))
    later = len((model.config.get("vision_config") or {}).get("deepstack_visual_indexes") or ())
    return (2 * (hidden + rotated) + later * hidden) * (model.dtype or torch.float32).itemsize
