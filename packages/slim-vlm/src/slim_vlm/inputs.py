"""From samples of images to the inputs of a model, made while the model is at work on others."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from slim_core.model.streamed import StreamedModel
from slim_core.model.tower_inputs import TowerInputs
from slim_core.recipe.schema import DatasetConfig
from slim_core.runners.prediction import TowerLoad
from slim_llm.activations import token_bytes
from slim_llm.vocabulary import example_input
from slim_vlm.dataset import ImageSample, find_dataset, read_samples
from slim_vlm.images import check_images
from slim_vlm.preparation import Preparation

__all__ = ["ImageInputs", "ImageSamples"]

_AHEAD = 2  # samples that are made while another one is at work


class ImageInputs(Sequence[Mapping[str, Any]]):
    """The inputs of samples in their order. The next ones are made in the background while one is used."""

    def __init__(self, samples: Sequence[ImageSample], preparation: Preparation) -> None:
        self._samples = samples
        self._preparation = preparation
        self._pool = ThreadPoolExecutor(1, "slim-images")
        self._coming: dict[int, Future[TowerInputs]] = {}

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: Any) -> Any:
        at = int(index)
        if not 0 <= at < len(self._samples):
            raise IndexError(at)
        for number in [at, *range(at + 1, min(at + 1 + _AHEAD, len(self._samples)))]:
            if number not in self._coming:
                self._coming[number] = self._pool.submit(self._preparation.inputs, self._samples[number])
        return self._coming.pop(at).result()

    def part(self, numbers: Sequence[int]) -> ImageInputs:
        """Those of some of the samples."""
        return ImageInputs([self._samples[number] for number in numbers], self._preparation)

    def close(self) -> None:
        """Give up what was begun ahead; only what is being made at this moment is still finished."""
        for future in self._coming.values():
            future.cancel()
        self._coming.clear()


class ImageSamples:
    """The samples of image sets."""

    def __init__(self, default_text: str, trust_remote_code: bool, model: StreamedModel) -> None:
        self._default_text = default_text
        self._model = model
        self._preparation = Preparation.of(model, trust_remote_code=trust_remote_code)
        self._read: dict[str, tuple[list[ImageSample], list[tuple[int, int]]]] = {}
        self._counted: dict[DatasetConfig, list[int]] = {}
        self._loads: dict[DatasetConfig, TowerLoad] = {}

    @property
    def token_bytes(self) -> int:
        return token_bytes(self._model)

    def _all(self, dataset: DatasetConfig) -> tuple[list[ImageSample], list[tuple[int, int]]]:
        """The samples of a set, and the sizes of their pictures, all of which were opened once."""
        if dataset.path not in self._read:
            samples = read_samples(find_dataset(dataset.path), self._default_text)
            self._read[dataset.path] = samples, check_images(samples)
        return self._read[dataset.path]

    def _main(self, dataset: DatasetConfig) -> list[ImageSample]:
        return self._all(dataset)[0][: dataset.num_samples]

    def inputs(self, dataset: DatasetConfig) -> ImageInputs:
        return ImageInputs(self._main(dataset), self._preparation)

    def tokens(self, dataset: DatasetConfig) -> list[int]:
        return self._count(dataset)[: len(self._main(dataset))]

    def _count(self, dataset: DatasetConfig) -> list[int]:
        """Tokens of all samples of a set: of one they are counted, of the others they follow from the sizes."""
        if dataset not in self._counted:
            samples, sizes = self._all(dataset)
            images = [self._preparation.image_tokens(size) for size in sizes]
            texts = [self._preparation.text_tokens(sample.text) for sample in samples]
            largest = max(range(len(samples)), key=lambda i: images[i] + texts[i])
            made = self._preparation.inputs(samples[largest])
            around = made["input_ids"].numel() - images[largest] - texts[largest]
            nbytes = sum(tensor.nbytes for tensor in made.for_towers())
            used = images[: len(self._main(dataset))]
            total = nbytes * sum(used) // max(images[largest], 1)
            self._loads[dataset] = TowerLoad(self._preparation.patches(made), nbytes, total)
            self._counted[dataset] = [image + text + around for image, text in zip(images, texts, strict=True)]
        return self._counted[dataset]

    def tower_load(self, dataset: DatasetConfig) -> TowerLoad:
        self._count(dataset)
        return self._loads[dataset]

    def _extra(self, dataset: DatasetConfig) -> list[int]:
        """Which samples beyond ``num_samples`` fit into ``extra_share`` times the tokens of the main ones."""
        counts, first = self._count(dataset), len(self._main(dataset))
        budget = int(dataset.extra_share * sum(counts[:first]))
        chosen: list[int] = []
        for number in range(first, len(counts)):
            if counts[number] <= budget:
                chosen.append(number)
                budget -= counts[number]
        return chosen

    def extra(self, dataset: DatasetConfig) -> ImageInputs:
        samples = self._all(dataset)[0]
        return ImageInputs([samples[number] for number in self._extra(dataset)], self._preparation)

    def extra_tokens(self, dataset: DatasetConfig) -> list[tuple[int, int]]:
        counts = self._count(dataset)
        return [(1, counts[number]) for number in self._extra(dataset)]

    def at_hand(self, dataset: DatasetConfig) -> bool:
        return True

    def identity(self, dataset: DatasetConfig, *, extra: bool = False) -> Any:
        samples = self._all(dataset)[0]
        chosen = [samples[number] for number in self._extra(dataset)] if extra else self._main(dataset)
        digests = _digests(sample.image for sample in chosen)
        return [[digests[os.path.realpath(sample.image)], sample.text] for sample in chosen]

    def example(self) -> dict[str, Any]:
        """Text alone: what is proved of a block holds for whatever hidden states it is given."""
        given = example_input(self._model)
        special = torch.tensor(sorted(_image_tokens(self._model.config)))
        given["input_ids"][torch.isin(given["input_ids"], special)] = 0
        return given


def _digests(paths: Iterable[Path]) -> dict[str, str]:
    files = dict.fromkeys(os.path.realpath(path) for path in paths)
    return {file: hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files}


def _image_tokens(config: Mapping[str, Any]) -> set[int]:
    """Ids that stand for something other than text."""
    named = {key: value for key, value in config.items() if key.endswith(("_token_id", "_token_index"))}
    text = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {value for key, value in named.items() if key not in text and isinstance(value, int)}
