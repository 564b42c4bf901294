"""What a model's own processor makes of a picture and a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from slim_core.errors import InvalidDatasetError, InvalidModelError, SlimError
from slim_core.model.streamed import StreamedModel
from slim_core.model.tower_inputs import TowerInputs
from slim_llm.vocabulary import check_token_ids
from slim_vlm.dataset import ImageSample
from slim_vlm.images import open_image
from slim_vlm.processor import has_template, open_processor

__all__ = ["Preparation", "conversation"]

_PIXELS = "pixel_values"
_FOR_TRAINING = ("labels",)  # PaliGemma's makes them whether they are asked for or not
_PATCH = 14


def conversation(sample: ImageSample, image: Any) -> list[dict[str, Any]]:
    """The chat of a sample: one message of the user, the picture and then the prompt."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": sample.text}]
    return [{"role": "user", "content": content}]


def _question(image: Any) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]
    return [{"role": "user", "content": content}]


class _RefusalError(Exception):
    """What a processor does not take, before it is known whose fault that is."""


class Preparation:
    """Makes the inputs of a model from samples, with the processor that lies in the model folder."""

    def __init__(self, model: StreamedModel, *, trust_remote_code: bool = False) -> None:
        self._model = model
        self._trust = trust_remote_code
        self._counted: dict[tuple[int, int], int] = {}

    @classmethod
    def of(cls, model: StreamedModel, *, trust_remote_code: bool = False) -> Preparation:
        """The one that the model was opened with, if it was, so that its processor is not loaded again."""
        given = model.tower_example
        return given if isinstance(given, Preparation) else Preparation(model, trust_remote_code=trust_remote_code)

    def __call__(self) -> dict[str, Any]:
        """:meth:`example`, as a model's ``tower_example``."""
        return self.example()

    @cached_property
    def processor(self) -> Any:
        return open_processor(self._model.folder, trust_remote_code=self._trust)

    def inputs(self, sample: ImageSample) -> TowerInputs:
        """Keyword arguments of the model for one forward.

        Raises:
            InvalidDatasetError: the picture cannot be opened, or the processor refuses the sample.
            InvalidModelError: the processor refuses any sample, or gives ids that the model does not know.
        """
        made = self.encoded(sample, conversation(sample, open_image(sample)), add_generation_prompt=True)
        return self.forward_inputs(made)

    def forward_inputs(self, made: Mapping[str, Any]) -> TowerInputs:
        """What a processor made, for a forward without cache and without loss, its numbers in the model's dtype."""
        pixels = [name for name in made if name.startswith(_PIXELS)]
        given = {name: self._in_dtype(value) for name, value in made.items() if name not in _FOR_TRAINING}
        return TowerInputs({**given, "use_cache": False}, pixels)

    def _in_dtype(self, value: Any) -> Any:
        numbers = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self._dtype) if numbers else value

    @cached_property
    def _dtype(self) -> torch.dtype:
        return next(parameter.dtype for parameter in self._model.module.parameters() if parameter.is_floating_point())

    def encoded(self, sample: ImageSample, chat: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
        """What the processor makes of a chat: token ids and what belongs to its images.

        Raises:
            InvalidDatasetError: the processor refuses this sample.
            InvalidModelError: it refuses any, or gives ids that the model does not know.
        """
        try:
            return self._encoded(chat, options)
        except _RefusalError as error:
            self.example()  # what is refused as well cannot be the fault of the sample
            raise InvalidDatasetError(
                str(error), where=sample.where, remedy="change the picture or the prompt"
            ) from error

    def _encoded(self, chat: list[dict[str, Any]], options: Mapping[str, Any]) -> dict[str, Any]:
        try:
            made = self._made(chat, options)
        except SlimError:
            raise
        except Exception as error:  # templates and processors raise whatever they like
            raise _RefusalError(f"the model's processor raises {type(error).__name__}: {error}") from error
        if "input_ids" not in made:  # as an encoder-decoder for documents has it
            raise _RefusalError(f"the model's processor makes no input_ids of a prompt, but only {', '.join(made)}")
        check_token_ids(self._model, [made])
        if not any(name.startswith(_PIXELS) for name in made):
            raise _RefusalError(f"the model's processor makes no pixels of the picture, but only {', '.join(made)}")
        return dict(made)

    def _made(self, chat: list[dict[str, Any]], options: Mapping[str, Any]) -> Mapping[str, Any]:
        if has_template(self.processor):
            return self.processor.apply_chat_template(
                chat, tokenize=True, return_dict=True, return_tensors="pt", **options
            )
        parts = [part for message in chat for part in message["content"]]
        images = [part["image"] for part in parts if part["type"] == "image"]
        text = " ".join(part["text"] for part in parts if part["type"] == "text")
        return self.processor(images=images, text=text, return_tensors="pt")

    def example(self) -> dict[str, Any]:
        """Keyword arguments of the model for a small picture, always the same one.

        Raises:
            InvalidModelError: the processor refuses it, or gives ids that the model does not know.
        """
        picture = Image.linear_gradient("L").resize((64, 96)).convert("RGB")
        try:
            return self.forward_inputs(self._encoded(_question(picture), {"add_generation_prompt": True}))
        except _RefusalError as error:
            raise InvalidModelError(
                f"given a plain picture and a question, {error}",
                where=str(self._model.folder),
                remedy="check the chat template, which must have a place for images, and the other processor files",
            ) from error

    def image_tokens(self, size: tuple[int, int]) -> int:
        """How many tokens the processor makes of a picture of this width and height, by its own account.

        Where it gives none: of a picture of one colour and what the chat template puts around it.
        """
        if size not in self._counted:
            width, height = size
            count = getattr(self.processor, "_get_num_multimodal_tokens", None)
            if count is not None:
                self._counted[size] = int(count(image_sizes=[(height, width)])["num_image_tokens"][0])
            else:
                made = self._encoded(_question(Image.new("RGB", size)), {"add_generation_prompt": True})
                self._counted[size] = made["input_ids"].numel()
        return self._counted[size]

    def patches(self, made: TowerInputs) -> int:
        """How many patches the pictures of a sample are cut into."""
        config = self._model.config.get("vision_config") or {}
        size = config.get("patch_size") or _PATCH
        area = size * size if isinstance(size, int) else size[0] * size[-1]
        # Patches laid out in rows, or pictures (..., channels, height, width).
        return sum(len(x) if x.dim() < 4 else x[..., 0, :, :].numel() // area for x in made.for_towers())

    def text_tokens(self, text: str) -> int:
        return len(self.processor.tokenizer(text)["input_ids"])
