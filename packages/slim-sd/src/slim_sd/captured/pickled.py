"""What the pickle of a file of calibration inputs may name, read off it without loading it."""

from __future__ import annotations

import pickletools

from slim_core.errors import SecurityError, UnsupportedError

__all__ = ["DELETE", "refuse_code"]

DELETE = "delete the file, so that the next run captures anew"

_STORAGES = (
    *("Double", "Float", "Half", "BFloat16", "ComplexFloat", "ComplexDouble"),
    *("Long", "Int", "Short", "Char", "Byte", "Bool"),
)
_ALLOWED = {
    "torch._utils _rebuild_tensor_v2",
    "collections OrderedDict",
    "torch Size",
    *(f"torch {kind}Storage" for kind in _STORAGES),
}
_REFUSED_TENSORS = {
    "torch._utils _rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils _rebuild_nested_tensor": "a nested tensor",
    "torch._utils _rebuild_qtensor": "a quantized tensor",
    "torch._utils _rebuild_meta_tensor_no_storage": "a tensor without data",
    "torch._utils _rebuild_tensor_v3": "a tensor of an unusual type",
    "torch._utils _rebuild_parameter": "a parameter",
    "torch._tensor _rebuild_from_type_v2": "a subclass of a tensor",
}
_CALLS = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "BUILD", "EXT1", "EXT2", "EXT4", "PERSID"}
"""Ways to name or call something of which ``torch.save`` needs none for tensors in plain containers."""


def refuse_code(content: bytes, where: str) -> None:
    """Refuse a pickle that names anything but dense tensors and plain containers.

    ``weights_only`` would also let pass what a program has allowed elsewhere, and kinds of tensors that are no
    calibration inputs.

    Args:
        content: the pickle; it is only split into its instructions.
        where: the file.

    Raises:
        SecurityError: it names something else, or calls something.
        UnsupportedError: it holds tensors that are no calibration inputs.
        ValueError: it is no pickle.
    """
    for opcode, argument, _ in pickletools.genops(content):
        name = str(argument)
        if opcode.name == "GLOBAL" and name in _REFUSED_TENSORS:
            raise UnsupportedError(
                f"the file holds {_REFUSED_TENSORS[name]}, which is no calibration input",
                where=where,
                remedy=f"only dense tensors of floats, integers and bools are; {DELETE}",
            )
        if opcode.name in _CALLS or (opcode.name == "GLOBAL" and name not in _ALLOWED):
            what = name.replace(" ", ".") if opcode.name == "GLOBAL" else f"something ({opcode.name})"
            raise SecurityError(
                f"the file wants {what} to be run when it is read; it was not",
                where=where,
                remedy=f"only tensors, numbers, text, None, lists, tuples and dicts are read; {DELETE}",
            )
