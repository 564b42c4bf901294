"""One component of a Diffusers folder, loaded from its files alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slim_core.checkpoint.header import read_header
from slim_core.errors import InvalidModelError, UnsupportedError

__all__ = ["load_component", "quiet_libraries"]

_AGAIN = "download the folder again"
_ALONE = {"local_files_only": True, "trust_remote_code": False}  # else classes chosen by name ask whether to run code


def load_component(path: Path, library: str, name: str, dtype: torch.dtype | None = None) -> Any:
    """A text encoder, tokenizer, VAE, scheduler or processor.

    Args:
        path: the folder of the component; its name is that of the component.
        library: ``diffusers`` or ``transformers``.
        name: the class.
        dtype: of the parameters of a model; None is that of its files.

    Returns:
        The component; models are in evaluation mode, and every parameter comes from safetensors files.

    Raises:
        InvalidModelError: files are missing, broken or incomplete; the message names component and folder.
        UnsupportedError: the installed library has no such class.
    """
    import diffusers
    import transformers
    from safetensors import SafetensorError

    kind: Any = getattr({"diffusers": diffusers, "transformers": transformers}[library], name, None)
    if not isinstance(kind, type):
        raise UnsupportedError(
            f"component {path.name!r}: the installed {library} has no {name!r}",
            where=str(path),
            remedy=f"install the version of {library} that the model was published for",
        )
    try:
        if issubclass(kind, nn.Module):
            return _model(kind, path, library, dtype)
        loader: Any = kind
        if not issubclass(kind, transformers.ProcessorMixin):
            made = loader.from_pretrained(str(path), local_files_only=True)
            if issubclass(kind, transformers.PreTrainedTokenizerBase) and _knows_nothing(made):
                raise ValueError("it makes the same of every text")
            return made
        if not _takes_videos():
            return _processor_of_pictures(loader, path)
        return loader.from_pretrained(str(path), **_ALONE)
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RuntimeError,
        ImportError,
        SafetensorError,
    ) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InvalidModelError(
            f"component {path.name!r} ({name}) cannot be loaded: {reason}", where=str(path), remedy=_AGAIN
        ) from error


def _knows_nothing(tokenizer: Any) -> bool:
    """Whether it has no vocabulary: transformers makes such a one of a folder without files."""
    return set(tokenizer("A red fox").input_ids) == set(tokenizer("7 days, so far").input_ids)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep diffusers and transformers from drawing bars while they load, as Slim shows its own progress, and
    transformers from remarking that torchvision is missing, which is not needed."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    shown = [module for module in (of_diffusers, of_transformers) if module.is_progress_bar_enabled()]
    for module in shown:
        module.disable_progress_bar()
    level = of_transformers.get_verbosity()
    of_transformers.set_verbosity_error()
    try:
        yield
    finally:
        of_transformers.set_verbosity(level)
        for module in shown:
            module.enable_progress_bar()


def _model(kind: Any, path: Path, library: str, dtype: torch.dtype | None) -> nn.Module:
    single = {"torch_dtype" if library == "diffusers" else "dtype": dtype or _stored_dtype(path)}
    model, report = kind.from_pretrained(
        str(path), local_files_only=True, use_safetensors=True, output_loading_info=True, **single
    )
    for problem in ("missing", "mismatched"):
        names = sorted(str(entry) for entry in report[f"{problem}_keys"])
        if names:
            raise InvalidModelError(
                f"component {path.name!r} ({kind.__name__}): {problem} tensor {names[0]!r}",
                where=str(path),
                remedy=_AGAIN,
            )
    return model.eval().requires_grad_(False)


def _stored_dtype(path: Path) -> torch.dtype:
    """The dtype of the first floating tensor of a component."""
    for file in sorted(path.glob("*.safetensors")):
        for tensor in read_header(file):
            if tensor.dtype.is_floating_point:
                return tensor.dtype
    raise InvalidModelError(
        f"component {path.name!r} has no safetensors weights",
        where=str(path),
        remedy="use a copy of the model with safetensors weights",
    )


def _takes_videos() -> bool:
    """Whether transformers can make processors of videos, which it does with torchvision only."""
    from transformers.utils import is_torchvision_available

    return is_torchvision_available()


def _processor_of_pictures(kind: Any, path: Path) -> Any:
    """A processor without its part for videos."""
    from transformers import AutoImageProcessor, AutoTokenizer

    loaders: dict[str, Any] = {"tokenizer": AutoTokenizer, "image_processor": AutoImageProcessor}

    def check(self: Any, argument_name: str, argument: Any) -> Any:
        return None if argument is None else kind.check_argument_for_proper_class(self, argument_name, argument)

    members = {"check_argument_for_proper_class": check, "__module__": kind.__module__}
    narrowed: Any = type(kind.__name__, (kind,), members)
    parts = [
        None if part == "video_processor" else loaders[part].from_pretrained(str(path), **_ALONE)
        for part in narrowed.get_attributes()
    ]
    settings, _ = narrowed.get_processor_dict(str(path), local_files_only=True)
    return narrowed.from_args_and_dict(parts, settings)
