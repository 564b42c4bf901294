"""Weights that a model class keeps in float32, whatever the dtype of the rest.

Routers' biases, decay rates and gates of some classes lose what they are for in bfloat16: another expert is chosen, and
calibration sees inputs that inference does not. transformers' ``from_pretrained`` heeds that, ``from_config`` does not.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["keep_float32"]

_SIXTEEN_BITS = (torch.float16, torch.bfloat16)
# The attributes of a model class that name them, and for which dtypes of the model.
_NAMED = {
    "_keep_in_fp32_modules": (torch.float16,),
    "_keep_in_fp32_modules_strict": _SIXTEEN_BITS,
}


def keep_float32(module: nn.Module) -> None:
    """Give parameters and persistent buffers the dtype that they have after ``from_pretrained``.

    Args:
        module: a transformers model, its parameters on ``meta``; changed in place, ties are kept.
    """
    config: Any = getattr(module, "config", None)
    dtype = getattr(config, "dtype", None)
    patterns = [
        str(pattern).replace("*", ".*")
        for name, dtypes in _NAMED.items()
        if dtype in dtypes
        for pattern in getattr(module, name, None) or ()
    ]
    if not patterns:
        return
    wanted = re.compile("|".join(f"(?:{pattern})" for pattern in patterns))
    stored = set(module.state_dict(keep_vars=True))
    tensors: list[tuple[str, Tensor]] = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in tensors:
        if name in stored and tensor.dtype in _SIXTEEN_BITS and wanted.search(name):
            tensor.data = tensor.data.to(torch.float32)
