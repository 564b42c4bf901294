"""A recipe of an outdated protocol, told in a newer one. Imports no torch."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from slim_core.recipe import Recipe, dump_yaml

__all__ = ["Migration"]

_WIDTH = 120


@dataclass(frozen=True)
class Migration:
    """What a recipe became.

    Args:
        source: the recipe as it was.
        recipe: its equivalent; :attr:`Recipe.document` holds it as plain data. Not validated: what it asks for may not
            be installed here.
        approximations: settings that have no exact equivalent, and what takes their place.
        dropped: fields without effect.
        differences: what else differs in the output, whatever the recipe says.
    """

    source: Recipe
    recipe: Recipe
    approximations: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()

    def notice(self) -> str:
        """The warning that running the old recipe deserves."""
        path = self.source.document.path
        name = self.source.document.name if path is None else shlex.quote(str(path))
        parts = [
            f"{self.source.document.name}: {self.source.apiversion} is deprecated; the recipe is run as "
            f"{self.recipe.apiversion}, in the form that `slim recipe migrate {name}` prints"
        ]
        if self.dropped:
            parts.append(f"fields without effect: {', '.join(self.dropped)}")
        return "; ".join([*parts, *self.differences])

    def text(self) -> str:
        """The new recipe as YAML, below comments that say where it comes from and what is not the same."""
        path = self.source.document.path
        name = path.name if path else self.source.document.name
        lines = [f"# Migrated by Slim from {name}, a recipe of {self.source.apiversion}."]
        lines += _comment("Not exactly the same:", self.approximations)
        lines += _comment("Left out, since they have no effect:", self.dropped)
        lines += _comment("What differs in the output:", self.differences)
        return "\n".join(lines) + "\n\n" + dump_yaml(self.recipe.document.data)


def _comment(title: str, items: Sequence[str]) -> Iterator[str]:
    if not items:
        return
    yield "#"
    yield f"# {title}"
    for item in items:
        # A name can hold what would end the comment.
        text = " ".join(item.split())
        yield from textwrap.wrap(
            text,
            _WIDTH,
            initial_indent="# - ",
            subsequent_indent="#   ",
            break_long_words=False,
            break_on_hyphens=False,
        )
