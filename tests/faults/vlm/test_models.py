"""Vision-language models that are not whole, and processors that do not go with them.

A row: what is done to a workplace where all is right, and kind, words, place and way out of the message.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from torch import Tensor

MODEL, DATASET = "201 InvalidModelError", "202 InvalidDatasetError"
VISION = "model.visual"
THIRD = "{dataset}:3"


def without(*names: str) -> Callable[..., None]:
    return lambda w: [(w.model / name).unlink() for name in names] and None


def template(text: str) -> Callable[..., None]:
    return lambda w: w.use_template(text)


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[..., None]:
    return lambda w: w.change(change)


def fewer_embeddings(w) -> None:
    config = json.loads((w.model / "config.json").read_text())
    config["text_config"]["vocab_size"] = 64
    w.configure(**config)
    w.change(
        lambda t: t.update(
            {n: t[n][:64].clone() for n in t if n.endswith("embed_tokens.weight") or n == "lm_head.weight"}
        )
    )


PROCESSOR_FILES = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
QKV = f"{VISION}.blocks.1.attn.qkv.weight"
COPY = "copy the processor files of the model into the folder"
TOGETHER = "the weights and config.json do not belong together"
PLACE = "check the chat template, which must have a place for images"
GIVEN = "given a plain picture and a question, the model's processor raises "
MODELS = {
    "no processor files": (
        without(*PROCESSOR_FILES),
        MODEL,
        "there is no processor_config.json and no preprocessor_config.json",
        "{model}",
        COPY,
    ),
    "no image processor": (without(*PROCESSOR_FILES[:2]), MODEL, "nothing says what", "{model}", COPY),
    "no tokenizer": (
        without(*PROCESSOR_FILES[-2:]),
        MODEL,
        "the tokenizer makes the same of every text",
        "{model}",
        "copy the tokenizer files",
    ),
    "broken processor file": (
        lambda w: (w.model / "preprocessor_config.json").write_text("{"),
        MODEL,
        "the processor of the model cannot be loaded | preprocessor_config.json' is not a valid JSON file",
        "{model}",
        "copy its files",
    ),
    "no chat template": (
        without("chat_template.json"),
        MODEL,
        "the model has no chat template",
        "{model}",
        "copy its chat_template.jinja",
    ),
    "template that drops the image": (
        template("{% for m in messages %}{{ m['content'][1]['text'] }}{% endfor %}"),
        MODEL,
        GIVEN + "ValueError",
        "{model}",
        PLACE,
    ),
    "broken template": (template("{% if %}"), MODEL, GIVEN + "TemplateSyntaxError", "{model}", PLACE),
    "template that refuses all": (
        template("{{ raise_exception('no pictures, please') }}"),
        MODEL,
        GIVEN + "TemplateError: no pictures, please",
        "{model}",
        PLACE,
    ),
    "template that refuses a prompt": (
        lambda w: w.refuse_prompts_with("colours"),
        DATASET,
        "the model's processor raises TemplateError: no",
        THIRD,
        "change the picture or the prompt",
    ),
    "vision tensor missing": (
        tensors(lambda t: t.pop(QKV)),
        MODEL,
        f"1 tensors of the model are not in the checkpoint, among them '{QKV}'",
        "{model}",
        TOGETHER,
    ),
    "vision tower missing": (
        tensors(lambda t: [t.pop(name) for name in list(t) if name.startswith(VISION)]),
        MODEL,
        f"are not in the checkpoint, among them '{VISION}.",
        "{model}",
        TOGETHER,
    ),
    "vision tensor of another shape": (
        tensors(lambda t: t.update({QKV: t[QKV][:, 1:].clone()})),
        MODEL,
        f"tensor '{QKV}' has shape [96, 31], config.json asks for [96, 32]",
        "{model}",
        TOGETHER,
    ),
    "ids beyond the embedding": (
        fewer_embeddings,
        MODEL,
        "the tokenizer gives id | but the model has 64 embeddings",
        "{model}",
        "copy the tokenizer that belongs to the model",
    ),
}


@pytest.mark.parametrize(("fault", "kind", "what", "where", "remedy"), MODELS.values(), ids=MODELS)
def test_models(workplace, refused, fault: Callable[..., object], kind, what, where, remedy) -> None:
    workplace.fill_save()
    fault(workplace)
    refused(kind, what, where, remedy, "--overwrite")


def test_bad_numbers_in_the_vision_tower(workplace, refused) -> None:
    """Found while the tower is quantized, ahead of everything else."""
    workplace.fill_save()
    workplace.change(lambda tensors: tensors[QKV].fill_(float("nan")))
    refused(
        MODEL, "the weight holds NaN or infinity in row 0", QKV, "repair the checkpoint", "--overwrite", resumable=True
    )
