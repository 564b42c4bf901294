"""Folders of recipes, one sub-folder per model pedigree, and the choice of the one that fits best."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from slim_core.errors import EnvVarError, SlimError, UnsupportedError
from slim_core.practices.quant_types import DEFAULT_QUANT_TYPE, QUANT_TYPES, QuantType, parse_quant_type
from slim_core.recipe.load import Recipe, load_recipe
from slim_core.recipe.schema import Metadata
from slim_core.recipe.wording import nearest_name, one_of

__all__ = ["CUSTOM_VARIABLE", "DEFAULT_PEDIGREE", "Practice", "PracticeLibrary", "Selection", "practice_folders"]

CUSTOM_VARIABLE = "MSMODELSLIM_CUSTOM_PRACTICE_REPO"
DEFAULT_PEDIGREE = "default"
# What the services take, where that is not a language model; for questions.
_KINDS = {"multimodal_vlm_modelslim_v1": "vision-language model", "multimodal_sd_modelslim_v1": "diffusion model"}


@dataclass(frozen=True)
class Practice:
    """One recipe of the library; its ``spec`` is validated by whoever runs it."""

    pedigree: str
    path: Path
    recipe: Recipe

    @property
    def config_id(self) -> str:
        """Name of the practice."""
        return self.recipe.metadata.config_id

    @property
    def metadata(self) -> Metadata:
        """What the practice says about itself."""
        return self.recipe.metadata

    @property
    def quant_type(self) -> str | None:
        """The quantization type that the label stands for, if it is one of the protocol's."""
        return next((name for name in QUANT_TYPES if parse_quant_type(name).fits(self.metadata.label)), None)


@dataclass(frozen=True)
class Selection:
    """A chosen practice; ``question`` is what the user must agree to first, None if nothing needs asking."""

    practice: Practice
    question: str | None


def practice_folders(bundled: Iterable[Path]) -> list[Path]:
    """The user's own folder, if the environment names one, ahead of the bundled ones.

    Raises:
        EnvVarError: ``MSMODELSLIM_CUSTOM_PRACTICE_REPO`` names something that is no folder.
    """
    folders = list(bundled)
    if value := os.environ.get(CUSTOM_VARIABLE):
        custom = Path(value)
        if not custom.is_dir():
            raise EnvVarError(
                f"{value!r} is not a folder", where=CUSTOM_VARIABLE, remedy="create it or unset the variable"
            )
        folders.insert(0, custom)
    return folders


class PracticeLibrary:
    """Practices of several folders, each laid out as ``<folder>/<pedigree>/<name>.yaml``.

    Files are read when their pedigree is asked for. A file that cannot be read is left out and noted in
    :attr:`warnings`. Where two folders hold the same ``config_id``, the earlier folder counts in :meth:`show`.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = tuple(folders)
        self._read: dict[str, list[Practice]] = {}
        self._broken: dict[Path, SlimError] = {}

    @property
    def warnings(self) -> list[str]:
        """One line for each file read so far that is no usable practice."""
        return [f"practice ignored: {error}" for error in self._broken.values()]

    def pedigrees(self) -> list[str]:
        """Names of all pedigrees, sorted."""
        found = {entry.name for folder in self.folders if folder.is_dir() for entry in folder.iterdir()}
        return sorted(name for name in found if not name.startswith((".", "__")) and self._folders_of(name))

    def list(self) -> list[Practice]:
        """All practices: by pedigree, then as they are tried (score descending, ``config_id`` ascending)."""
        return [practice for pedigree in self.pedigrees() for practice in self._practices(pedigree)]

    def show(self, config_id: str) -> Practice:
        """The practice of this name (its ``config_id`` or else the stem of its file).

        Raises:
            UnsupportedError: there is none.
            SchemaValidateError, SecurityError: its file is broken.
        """
        practices = self.list()
        rank = {folder: i for i, folder in enumerate(self.folders)}
        practices.sort(key=lambda practice: rank[practice.path.parent.parent])
        for names in ([p.config_id for p in practices], [p.path.stem for p in practices]):
            if config_id in names:
                return practices[names.index(config_id)]
        for path, error in self._broken.items():
            if path.stem == config_id:
                raise error
        known = [practice.config_id for practice in practices]
        near = nearest_name(config_id, known)
        raise UnsupportedError(
            f"no practice {config_id!r}", remedy=f"did you mean {near!r}?" if near else f"known: {one_of(known)}"
        )

    def select(
        self,
        pedigree: str,
        model_type: str,
        quant_type: str | None,
        tags: Sequence[str] = (),
        takes: Callable[[str], bool] | None = None,
    ) -> Selection:
        """The practice for a model type, by the matching rules of the protocol.

        The model's pedigree is searched for ``quant_type`` (w8a8 if None), then the folder ``default``, then both again
        for w8a8. Everything but a verified practice of the very type that was asked for comes with a question.

        Args:
            pedigree: the folder of the model type.
            model_type: as the practices list it.
            quant_type: the type that is asked for.
            tags: engine and hardware that a practice must be verified with.
            takes: whether the service of an ``apiversion`` takes the model at hand. Asked where the folder ``default``
                has practices of several services; if none takes it, or this is None, the score alone decides.

        Raises:
            SchemaValidateError: the quantization type is unknown.
            UnsupportedError: the library has no folder for the pedigree, or nothing fits.
        """
        wanted = parse_quant_type(DEFAULT_QUANT_TYPE if quant_type is None else quant_type)
        if not self._folders_of(pedigree):
            near = nearest_name(pedigree, self.pedigrees())
            raise UnsupportedError(
                f"the practice library has no folder {pedigree!r} for {model_type}",
                where=one_of(str(folder) for folder in self.folders),
                remedy="give a recipe with --config_path" + (f"; the nearest folder is {near!r}" if near else ""),
            )
        assumed = "" if quant_type else f"No quant_type was given, {wanted.name} is assumed. "
        if found := self._in_pedigree(pedigree, model_type, wanted, tags, takes):
            practice, standby = found
            if standby or assumed or pedigree == DEFAULT_PEDIGREE:
                return Selection(practice, _question(practice, model_type, wanted, tags, assumed, standby))
            return Selection(practice, None)
        if found := self._in_pedigree(DEFAULT_PEDIGREE, model_type, wanted, tags, takes):
            return Selection(found[0], _question(found[0], model_type, wanted, tags, assumed))
        if wanted.name != DEFAULT_QUANT_TYPE:
            fallback = parse_quant_type(DEFAULT_QUANT_TYPE)
            instead = f"There is no practice for {model_type} with {wanted.name}, only with {fallback.name}. "
            for folder in (pedigree, DEFAULT_PEDIGREE):
                if found := self._in_pedigree(folder, model_type, fallback, tags, takes):
                    practice, standby = found
                    return Selection(practice, _question(practice, model_type, fallback, tags, instead, standby))
        raise self._nothing(pedigree, model_type, wanted)

    def _in_pedigree(
        self,
        pedigree: str,
        model_type: str,
        wanted: QuantType,
        tags: Sequence[str],
        takes: Callable[[str], bool] | None,
    ) -> tuple[Practice, bool] | None:
        """The first match, or else the first standby (True)."""
        found: dict[str, list[Practice]] = {"match": [], "standby": [], "no": []}
        for practice in self._practices(pedigree):
            found[_verdict(practice, model_type, wanted, tags)].append(practice)
        if matches := found["match"]:
            several = len({practice.recipe.apiversion for practice in matches}) > 1
            if pedigree == DEFAULT_PEDIGREE and several and takes is not None:
                return next((one for one in matches if takes(one.recipe.apiversion)), matches[0]), False
            return matches[0], False
        return (found["standby"][0], True) if found["standby"] else None

    def _practices(self, pedigree: str) -> list[Practice]:
        if pedigree not in self._read:
            practices: list[Practice] = []
            for folder in self._folders_of(pedigree):
                for path in sorted(folder.glob("*.yaml")):
                    try:
                        practices.append(Practice(pedigree, path, load_recipe(path)))
                    except SlimError as error:
                        self._broken[path] = error
            practices.sort(key=lambda practice: (-practice.metadata.score, practice.config_id))
            self._read[pedigree] = practices
        return self._read[pedigree]

    def _folders_of(self, pedigree: str) -> list[Path]:
        if pedigree in ("", "..") or Path(pedigree).name != pedigree:
            return []
        return [folder / pedigree for folder in self.folders if (folder / pedigree).is_dir()]

    def _nothing(self, pedigree: str, model_type: str, wanted: QuantType) -> UnsupportedError:
        names = {practice.quant_type or "" for practice in self._practices(pedigree)} - {""}
        remedy = f"pedigree {pedigree!r} has practices for: {one_of(sorted(names))}; or give --config_path"
        if broken := [path.name for path in self._broken if path.parent.name in (pedigree, DEFAULT_PEDIGREE)]:
            remedy += f"; ignored as unreadable: {one_of(broken)}"
        return UnsupportedError(f"no practice for {model_type} with {wanted.name}", remedy=remedy)


def _verdict(practice: Practice, model_type: str, wanted: QuantType, tags: Sequence[str]) -> str:
    """``match``, ``standby`` (right model, but not verified with these tags) or ``no``."""
    metadata = practice.metadata
    if not wanted.fits(metadata.label):
        return "no"
    if practice.pedigree == DEFAULT_PEDIGREE:
        return "match"
    if metadata.verified_model_types:
        return "match" if model_type in metadata.verified_model_types else "no"
    if model_type not in metadata.verified_tags:
        return "no"
    requested = {tag.lower() for tag in tags}
    scenarios = metadata.verified_tags[model_type]
    if not requested or any(requested <= {tag.lower() for tag in scenario} for scenario in scenarios):
        return "match"
    return "standby"


def _question(
    practice: Practice, model_type: str, wanted: QuantType, tags: Sequence[str], lead: str, standby: bool = False
) -> str:
    if practice.pedigree == DEFAULT_PEDIGREE:
        kind = _KINDS.get(practice.recipe.apiversion, "model")
        state = f"The {wanted.name} practice {practice.config_id!r} fits any {kind} but was not made for {model_type}."
    elif standby:
        state = f"Practice {practice.config_id!r} fits {model_type}, but is not verified with {' + '.join(tags)}."
    else:
        state = f"Practice {practice.config_id!r} fits {model_type}."
    return f"{lead}{state} Quantize with {practice.config_id!r}?"
