"""Calibration inputs of a run: found where the recipe keeps them, or captured from the model's own pipeline."""

from __future__ import annotations

import gc
import hashlib
import os
import shutil
from contextlib import ExitStack, suppress
from functools import cached_property
from pathlib import Path

from slim_core.checkpoint.header import read_header
from slim_core.checkpoint.reader import Checkpoint
from slim_core.devices import resolve_devices
from slim_core.errors import InvalidDatasetError
from slim_core.logging import get_logger
from slim_core.memory import give_back_freed_memory
from slim_core.model.streamed import StreamedModel
from slim_core.recipe import Recipe
from slim_core.savers.side_files import FILE_MODE
from slim_core.service import QuantRequest
from slim_sd.captured.files import find_records, records_file, sidecar_file
from slim_sd.captured.recorder import Recorder, forward_parameters
from slim_sd.captured.records import Records, open_records
from slim_sd.pipeline.folders import transformer_folders
from slim_sd.pipeline.generation import Generation, planned_generation
from slim_sd.pipeline.sampling import Sampler
from slim_sd.recipe import SpecSd, dump_folder
from slim_sd.wan import files as wan_files

__all__ = ["Calibration", "expert_name"]

_logger = get_logger(__name__)
_SAMPLED_BYTES = 4096  # of every tensor, for what a model is recognised by


def expert_name(component: str) -> str:
    """What a transformer is called where a pipeline has several: folders and files have that name."""
    return wan_files.EXPERTS.get(component, component)


class Calibration:
    """The captured calls of all transformers of a model; each file is opened, and the pipeline run, at most once.

    They are looked for in ``dump_data_dir``; without one in ``save_path``, and beside it, where a capture waits until
    the output that it belongs to is complete.
    """

    def __init__(self, request: QuantRequest, recipe: Recipe, spec: SpecSd) -> None:
        self._request = request
        self._recipe = recipe
        self._spec = spec
        self._opened: dict[str, Records] = {}

    @cached_property
    def components(self) -> list[str]:
        return list(transformer_folders(self._request.model_path))

    @property
    def _experts(self) -> list[str]:
        return [expert_name(name) for name in self.components] if len(self.components) > 1 else []

    def _expert(self, component: str) -> str | None:
        return expert_name(component) if self._experts else None

    @property
    def waiting_folder(self) -> Path:
        """Where a capture is kept until ``save_path`` is there."""
        target = self._request.save_path
        return target.parent / f".{target.name}.slim-calib"

    @property
    def _folders(self) -> list[Path]:
        given = dump_folder(self._spec)
        return [self._request.save_path, self.waiting_folder] if given is None else [given]

    def _find(self, component: str) -> Path | None:
        expert = self._expert(component)
        found = (find_records(folder, expert, self._experts) for folder in self._folders)
        return next((path for path in found if path is not None), None)

    def is_there(self, component: str) -> bool:
        """Whether a file of captured calls is there, for this transformer."""
        return self._find(component) is not None

    @cached_property
    def generation(self) -> Generation:
        """What the pipeline is told while it is captured.

        Raises:
            SchemaValidateError: the recipe does not say, or what it says does not fit the model.
        """
        return planned_generation(self._request.model_path, self._recipe, self._spec)

    def expected_tokens(self) -> list[int]:
        """Tokens of each call that a capture will make."""
        steps = self._spec.multimodal_sd_config.dump_config.time_steps
        calls, all_steps = self.generation.calls, int(self.generation.arguments.get("num_inference_steps") or 0)
        if steps is not None and all_steps > steps:
            calls = calls * steps // all_steps
        return [self.generation.tokens] * calls

    def records(self, component: str, model: StreamedModel) -> Records:
        """The captured calls of a transformer, of the chosen time steps; captured now if they are not there.

        Raises:
            InvalidDatasetError: they are missing and may not be captured, or they do not fit the model.
            SlimError: whatever stands in the way of the pipeline.
        """
        if component not in self._opened:
            if not all(self.is_there(name) for name in self.components):
                self._capture()
            path = self._find(component)
            assert path is not None
            told = bool(self._spec.multimodal_sd_config.given)
            opened = open_records(
                path,
                parameters=forward_parameters(model.module),
                fingerprint=self._fingerprint,
                settings=self.generation.facts if told else None,
                reuse=self._request.reuse_calib,
                config=model.config,
                dtype=model.dtype,
            )
            self._opened[component] = opened.evenly(self._spec.multimodal_sd_config.dump_config.time_steps)
            _logger.info("calibrating on %d calls of %s", len(self._opened[component]), path)
        return self._opened[component]

    @cached_property
    def _fingerprint(self) -> str:
        """Of the transformers' tensors: names, dtypes, shapes and the first bytes of each."""
        digest = hashlib.sha256()
        for component, folder in transformer_folders(self._request.model_path).items():
            digest.update(component.encode())
            for file in sorted(Checkpoint(folder).files):
                with file.open("rb") as stream:
                    for tensor in read_header(file):
                        digest.update(f"{tensor.name} {tensor.dtype} {tensor.shape}".encode())
                        digest.update(os.pread(stream.fileno(), min(tensor.nbytes, _SAMPLED_BYTES), tensor.begin))
        return digest.hexdigest()

    def _capture(self) -> None:
        """Run the pipeline and record all transformers."""
        where = self._folders[-1]
        if not self._spec.multimodal_sd_config.dump_config.enable_dump:
            name = records_file(where, self._expert(self.components[0])).name
            raise InvalidDatasetError(
                f"there is no {name}, and enable_dump is false",
                where=str(self._folders[0]),
                remedy="set enable_dump: true to capture it, or use data-free processors only",
            )
        generation = self.generation
        device = resolve_devices(self._request.device, explicit="device" in self._request.model_fields_set).first
        _logger.info("capturing calibration inputs: the pipeline runs once, unquantized (%s)", generation.arguments)
        with ExitStack() as stack:
            stack.callback(self._forget_empty_folder)
            sampler = stack.enter_context(Sampler(self._request.model_path, generation, device))
            for name, model in sampler.models.items():
                path = records_file(where, self._expert(name))
                recorder = Recorder(model.module, path, fingerprint=self._fingerprint, settings=generation.facts)
                stack.enter_context(recorder)
            sampler.generate()
        del sampler
        gc.collect()
        give_back_freed_memory()

    def _forget_empty_folder(self) -> None:
        """Of a capture that failed nothing is left."""
        with suppress(OSError):
            self.waiting_folder.rmdir()

    def remarks(self, component: str, *, needed: bool) -> list[str]:
        """What a plan should say of the captured calls of a transformer."""
        path = self._find(component)
        if not needed:
            return [] if path is None else [f"no calibration inputs are needed: {path} is not read"]
        if path is not None or not self._spec.multimodal_sd_config.dump_config.enable_dump:
            return []
        name = records_file(self._folders[0], self._expert(component))
        return [f"{name} is not there: the pipeline is run once, unquantized, to capture it"]

    def keep(self, folder: Path) -> None:
        """Put the files that belong with the output into its folder, before it takes its place."""
        if dump_folder(self._spec) is not None:
            return
        for component in self.components:
            path = self._find(component)
            for file in () if path is None else (path, sidecar_file(path)):
                if file.exists():
                    _link_or_copy(file, folder / file.name)
                    (folder / file.name).chmod(FILE_MODE)

    def tidy_up(self) -> None:
        """The output is in place, and what waited for it with it."""
        shutil.rmtree(self.waiting_folder, ignore_errors=True)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
