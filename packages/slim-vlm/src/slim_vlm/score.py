"""Scoring of vision-language models and of the files written for them: how well they predict given answers."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from slim_core.devices import resolve_devices
from slim_core.errors import InvalidDatasetError
from slim_core.evaluation.perplexity import EvalResult, evaluate
from slim_core.model.streamed import StreamedModel
from slim_core.progress import Progress
from slim_core.savers.mindie_folder import open_quantized
from slim_core.service import EvalRequest
from slim_llm.models.loading import open_tokenizer
from slim_llm.score import open_written, text_windows
from slim_llm.vocabulary import check_token_ids, max_positions
from slim_vlm.dataset import ImageSample, find_dataset, read_samples
from slim_vlm.images import check_images, open_image
from slim_vlm.inputs import ImageInputs
from slim_vlm.models import IMAGE_TEXT, open_vlm
from slim_vlm.preparation import Preparation, conversation
from slim_vlm.recipe import SpecVlm

__all__ = ["score"]


class _Answers(Preparation):
    """Makes inputs that end with the answer, and remembers its tokens.

    A chat template closes an answer; the tokens that it does so with are predicted and scored too.
    """

    def __init__(self, model: StreamedModel, samples: Sequence[ImageSample], *, trust_remote_code: bool) -> None:
        super().__init__(model, trust_remote_code=trust_remote_code)
        self.processor = Preparation.of(model, trust_remote_code=trust_remote_code).processor
        self._places = {id(sample): place for place, sample in enumerate(samples)}
        self._last_only = "logits_to_keep" in signature(type(model.module).forward).parameters
        self.answers: dict[int, Tensor] = {}

    def inputs(self, sample: ImageSample) -> Any:
        chat = conversation(sample, open_image(sample))
        asked = self.encoded(sample, chat, add_generation_prompt=True)["input_ids"][0]
        answer = {"role": "assistant", "content": [{"type": "text", "text": sample.answer}]}
        made = self.encoded(sample, [*chat, answer])
        ids = made["input_ids"][0]
        # A template may open an answer with more than it gives for a generation, or leave white space out.
        same = min(len(asked), len(ids))
        begins = same if torch.equal(asked[:same], ids[:same]) else int((asked[:same] != ids[:same]).int().argmax())
        if begins >= len(ids):
            raise InvalidDatasetError(
                "the model's chat template makes no tokens of the answer",
                where=sample.where,
                remedy="change the answer",
            )
        self.answers[self._places[id(sample)]] = ids[begins:]
        last = {"logits_to_keep": len(ids) - begins + 1} if self._last_only else {}
        return self.forward_inputs({**made, **last})


def score(request: EvalRequest, progress: Progress) -> EvalResult:
    """Perplexity of answers, given images and prompts, or of a text; of a model and, if ``request.quantized`` is given,
    of the files written for it.
    """
    if request.dataset is None and request.text is None:
        raise InvalidDatasetError(
            "nothing to score",
            where="--dataset",
            remedy="give pictures with prompts and answers, or a UTF-8 text file with --text",
        )
    devices = resolve_devices(request.device, explicit="device" in request.model_fields_set)
    trust = request.trust_remote_code
    model = open_vlm(request.model_path, trust_remote_code=trust)
    quantized = None
    if request.quantized is not None:
        folder = open_quantized(request.quantized)
        quantized = (open_written(model, folder, trust, IMAGE_TEXT), folder)
    if request.dataset is None:
        tokenizer = open_tokenizer(request.model_path, trust_remote_code=trust)
        windows = text_windows(request, tokenizer, max_positions(model))
        check_token_ids(model, windows)
        return evaluate(model, windows, devices.only(), progress, quantized)
    prompt = SpecVlm.model_fields["default_text"].default
    samples = read_samples(find_dataset(request.dataset), prompt, answers=True)[: request.max_windows]
    check_images(samples)
    answers = _Answers(model, samples, trust_remote_code=trust)
    inputs = ImageInputs(samples, answers)
    return evaluate(model, inputs, devices.only(), progress, quantized, targets=answers.answers.__getitem__)
