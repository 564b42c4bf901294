"""Whether rotated weights compute on rotated hidden states what the original ones compute, run in float32."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

from torch import Tensor

from slim_core.checkpoint.source import LazyTensor
from slim_core.model.residual import BlockRoles, BlockTrial
from slim_core.rotation.inputs import InputRotations, rotating
from slim_core.rotation.matrices import Rotation

__all__ = ["TOLERANCE", "BlockWitness", "relative_error"]

TOLERANCE = 3e-4
"""Of the largest value. Rounding leaves 1e-5 at most; what is left out or turned the wrong way is of order 1."""
_DRAWS = 3


class BlockWitness:
    """What a block adds to its hidden states, all of it and by each of its writers alone, to be compared with.

    Args:
        roles: of the block's matrices.
    """

    def __init__(self, trial: BlockTrial, roles: BlockRoles) -> None:
        self._trial = trial
        self._roles = roles
        self._references: dict[tuple[int, tuple[str, ...]], Tensor] = {}

    def objection(
        self,
        values: Mapping[str, LazyTensor],
        rotation: Rotation | None = None,
        online: InputRotations | None = None,
    ) -> str | None:
        """Why the block with other values does not compute the same; None if it does.

        Draws other hidden states before it objects, since a router may have found two experts equal.

        Args:
            rotation: by which the hidden states are rotated that the other values work on.
            online: rotations of the inputs of its linears.
        """
        found: str | None = None
        for draw in range(_DRAWS):
            self._trial.draw(draw)
            found = self._disagreement(draw, values, rotation, online or {})
            if found is None:
                break
        self._trial.draw(0)
        return found

    def _disagreement(
        self, draw: int, values: Mapping[str, LazyTensor], rotation: Rotation | None, online: InputRotations
    ) -> str | None:
        every = {name for together in self._roles.writers for name in together}
        hidden = self._trial.hidden if rotation is None else rotation.right(self._trial.hidden)
        for speaking in ((), *self._roles.writers):
            silenced = every - set(speaking) if speaking else set[str]()
            if (draw, speaking) not in self._references:
                self._references[draw, speaking] = self._trial.added(silenced=silenced)
            reference = self._references[draw, speaking]
            with rotating(self._trial.root, online) if online else nullcontext():
                added = self._trial.added(hidden, values=values, silenced=silenced)
            expected = reference if rotation is None else rotation.right(reference)
            if not (error := relative_error(added, expected)) <= TOLERANCE:
                where = f"what {speaking[0]} adds" if speaking else "what it adds"
                return f"{where} to the hidden states is off by {error:.1e} of its size"
        return None


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value that is expected."""
    largest = float(expected.abs().max())
    return float((found - expected).abs().max()) / largest if largest else float(found.abs().max())
