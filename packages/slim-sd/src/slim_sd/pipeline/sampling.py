"""Running the pipeline of a model folder around transformers that stay in Slim's hands."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from slim_core.errors import SchemaValidateError
from slim_core.model.streamed import StreamedModel
from slim_sd.loading import Names, open_transformer
from slim_sd.pipeline.building import build_pipeline
from slim_sd.pipeline.folders import transformer_folders
from slim_sd.pipeline.generation import Generation
from slim_sd.pipeline.pictures import open_picture

__all__ = ["Sampler"]


class Sampler:
    """A context with a pipeline that is ready to generate, and the transformers in it.

    On the CPU transformers run in the dtype that they are stored in, and their weights stay in the mapped files;
    elsewhere they run in bfloat16, as Wan's own project samples.

    Args:
        models: transformers by component, once the context is entered.

    Raises:
        SlimError: see :func:`build_pipeline` and :func:`open_transformer`.
    """

    def __init__(self, folder: Path, generation: Generation, device: torch.device, names: Names = "original") -> None:
        self._folder = folder
        self._generation = generation
        self._device = device
        self._names: Names = names
        self._stack = ExitStack()
        self.models: dict[str, StreamedModel] = {}

    def __enter__(self) -> Self:
        dtype = None if self._device.type == "cpu" else torch.bfloat16
        with ExitStack() as stack:
            for component in transformer_folders(self._folder):
                model = open_transformer(self._folder, component, self._names, dtype)
                names = [name for unit in model.units for name in unit.parameters]
                model.load(names, torch.device("cpu"))
                stack.callback(model.unload, names)
                self.models[component] = model
            self.pipeline: Any = build_pipeline(
                self._folder,
                {component: model.module for component, model in self.models.items()},
                solver=self._generation.solver,
                shift=self._generation.shift,
                from_image=self._generation.from_image,
            )
            self.pipeline.set_progress_bar_config(disable=None)
            self._place()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self.pipeline
        self._stack.close()

    def _place(self) -> None:
        """Put the parts of the pipeline where they run."""
        if self._device.type == "cpu":
            return
        pipeline = self.pipeline
        if self._generation.text_on_cpu:
            pipeline._exclude_from_cpu_offload = [*pipeline._exclude_from_cpu_offload, "text_encoder"]
        if self._generation.offload:
            pipeline.enable_model_cpu_offload(device=self._device)
        else:
            pipeline.to(self._device)

    def generate(self, output: str = "latent", **options: Any) -> Any:
        """Generate once, always the same.

        Args:
            output: ``latent``, or what the pipeline calls other kinds of output.
            options: further arguments of the call.

        Returns:
            Latents ``(batch, ...)``, or pictures or videos.

        Raises:
            InvalidDatasetError: a picture cannot be read.
            SchemaValidateError: the pipeline refuses what it is told.
        """
        arguments = dict(self._generation.arguments)
        if (image := arguments.get("image")) is not None:
            several = isinstance(image, (list, tuple))
            pictures = [open_picture(Path(path)) for path in (image if several else [image])]
            arguments["image"] = pictures if several else pictures[0]
        noise = torch.Generator("cpu").manual_seed(self._generation.seed)
        try:
            with torch.no_grad():
                made = self.pipeline(**arguments, generator=noise, output_type=output, return_dict=False, **options)
        except ValueError as error:  # what pipelines raise for arguments that do not fit each other
            raise SchemaValidateError(
                f"{type(self.pipeline).__name__} does not take these settings: {error}",
                where=self._generation.where,
                remedy="change them",
            ) from error
        return made[0]
