"""The processor of a model folder, with or without torchvision.

transformers asks for torchvision as soon as a processor class also takes videos, and for one class (Pixtral's, which
Mistral 3 uses too) because of a function that needs none. Pictures alone need only pillow.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from slim_core.errors import InvalidModelError, UnsupportedError

__all__ = ["has_template", "open_processor"]

_PIXTRAL = "transformers.models.pixtral"
_SETTINGS = ("processor_config.json", "preprocessor_config.json")
_TYPES = "mm_token_type_ids"  # which tokens of a prompt stand for what modality
_NAMING_FILES = (*_SETTINGS, "tokenizer_config.json")


def open_processor(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Load tokenizer, image processor and chat template of a model folder as the processor class of its family.

    Without torchvision the processor takes pictures and no videos; in all else it is the same.

    Raises:
        InvalidModelError: files of the processor are missing or cannot be read, or there is no chat template.
        UnsupportedError: the image processor of this family exists for torchvision only, and that is not installed.
    """
    from transformers import AutoProcessor

    if not any((folder / name).exists() for name in _SETTINGS):
        raise InvalidModelError(
            f"there is no {' and no '.join(_SETTINGS)}, so nothing says what the model makes of pictures",
            where=str(folder),
            remedy="copy the processor files of the model into the folder",
        )
    try:
        try:
            found: Any = AutoProcessor.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
        except (ImportError, ValueError) as error:  # which of them depends on the part that is missing
            if "torchvision" not in str(error).lower():
                raise
            found = _without_torchvision(folder)
    except UnsupportedError:
        raise
    except Exception as error:  # the libraries below raise whatever they like
        raise InvalidModelError(
            f"the processor of the model cannot be loaded: {type(error).__name__}: {error}",
            where=str(folder),
            remedy="copy its files (processor or preprocessor configuration, tokenizer, chat template) into the folder",
        ) from error
    if not hasattr(found, "image_processor"):
        raise InvalidModelError(
            f"there is no image processor, only a {type(found).__name__}",
            where=str(folder),
            remedy="copy the model's preprocessor_config.json or processor_config.json into the folder",
        )
    _check_texts(found, folder)
    if _TYPES in getattr(found, "model_input_names", ()):  # its model asks for them, which not every class heeds
        found.return_mm_token_type_ids = True
    return found


def _check_texts(processor: Any, folder: Path) -> None:
    """Refuse a tokenizer without its files, which transformers lets pass, and a missing chat template, unless the
    processor was made for plain prompts."""
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is not None and tokenizer("What?")["input_ids"] == tokenizer("Describe it.")["input_ids"]:
        raise InvalidModelError(
            "the tokenizer makes the same of every text, so its files are missing",
            where=str(folder),
            remedy="copy the tokenizer files into the model folder",
        )
    if not has_template(processor) and not _writes_places(processor):
        raise InvalidModelError(
            "the model has no chat template, which says where in a prompt a picture stands",
            where=str(folder),
            remedy="copy its chat_template.jinja or chat_template.json into the folder",
        )


def has_template(processor: Any) -> bool:
    """Whether chats can be given to a processor, by a template or in a way of its own."""
    from transformers import ProcessorMixin

    inherited = getattr(type(processor), "apply_chat_template", None) is ProcessorMixin.apply_chat_template
    return not inherited or bool(getattr(processor, "chat_template", None))


def _writes_places(processor: Any) -> bool:
    """Whether a processor says by itself where in a plain prompt a picture stands, or its model needs no such place."""
    token = getattr(processor, "image_token", None)
    if token is None:
        return True
    try:
        made = processor(images=[Image.new("RGB", (64, 96))], text="What?", return_tensors="pt")
    except Exception:  # noqa: BLE001 - a processor that wants the place to be named says so in whatever way it likes
        return False
    return processor.tokenizer.convert_tokens_to_ids(str(token)) in made["input_ids"]


def _without_torchvision(folder: Path) -> Any:
    import transformers

    loaders = {
        "tokenizer": transformers.AutoTokenizer,
        "image_processor": transformers.AutoImageProcessor,
        "feature_extractor": transformers.AutoFeatureExtractor,
    }
    cls = _for_pictures(_processor_class(folder))
    parts: list[Any] = []
    for name in cls.get_attributes():
        if name == "video_processor":
            parts.append(None)
            continue
        try:
            if name not in loaders:
                raise ValueError(f"it has a part {name!r}")
            parts.append(loaders[name].from_pretrained(folder, local_files_only=True))
        except (ImportError, ValueError) as error:
            raise UnsupportedError(
                f"{cls.__name__} cannot be loaded without torchvision: {error}",
                where=str(folder),
                remedy="pip install torchvision",
            ) from error
    settings, _ = cls.get_processor_dict(folder, local_files_only=True)
    return cls.from_args_and_dict(parts, settings)


def _processor_class(folder: Path) -> Any:
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name

    named = (_entry(folder / file, "processor_class") for file in _NAMING_FILES)
    name = next(filter(None, named), None) or PROCESSOR_MAPPING_NAMES.get(_entry(folder / "config.json", "model_type"))
    if name == "PixtralProcessor":
        return _pixtral()
    cls: Any = processor_class_from_name(name) if name else None
    if cls is None:
        raise ValueError(f"no processor class is named in {', '.join(_NAMING_FILES)}")
    return cls


def _entry(path: Path, key: str) -> Any:
    return json.loads(path.read_text("utf-8")).get(key) if path.is_file() else None


def _pixtral() -> Any:
    """The class itself. Its module wants one function of the image processor for torchvision, which the one for pillow
    has as well."""
    wanted = f"{_PIXTRAL}.image_processing_pixtral"
    sys.modules[wanted] = importlib.import_module(f"{_PIXTRAL}.image_processing_pil_pixtral")
    try:
        return importlib.import_module(f"{_PIXTRAL}.processing_pixtral").PixtralProcessor
    finally:
        del sys.modules[wanted]


def _for_pictures(cls: Any) -> Any:
    """The class, but its video processor may be None."""

    def check(self: Any, argument_name: str, argument: Any) -> Any:
        if argument_name == "video_processor" and argument is None:
            return None
        return cls.check_argument_for_proper_class(self, argument_name, argument)

    return type(cls.__name__, (cls,), {"check_argument_for_proper_class": check, "__module__": cls.__module__})
