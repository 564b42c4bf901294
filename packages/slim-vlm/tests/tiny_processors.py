"""Tokenizers, image processor settings and chat templates of tiny vision-language models, laid out as published.

Every family gets a real byte-level tokenizer of a few hundred tokens that has the family's special tokens, the settings
of its real image processor with small pictures, and a template of our own that puts the family's placeholders where its
published one does. What the processor class makes of the placeholders is its own business.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

__all__ = ["ORDINARY", "PROCESSORS", "TinyProcessor", "picture", "token_id", "write_processor"]

ORDINARY = 384  # tokens that are no special ones; the special ones follow them
_SENTENCES = (
    "Describe this image in detail. What is written in the table, and which bar of the chart is the tallest?",
    "A red square stands beside a blue circle; the caption says that both were drawn by a script.",
    "The picture shows a street in winter. Two children walk to school across the snow.",
    "请描述这张图片。表格里写了什么？图中最高的柱子是哪一个？",
    "def area(width, height):\n    return width * height\n",
)
_STATISTICS = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
_HALVES = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_ROW_TAGS = tuple(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4))


@dataclass(frozen=True)
class TinyProcessor:
    """What one family has beside its weights.

    Attributes:
        special: its special tokens; the first one is the first id after the ordinary tokens.
        template: a chat template.
        template_file: ``chat_template.jinja``, or ``chat_template.json`` as older checkpoints have it.
        image: ``preprocessor_config.json``.
        processor: ``processor_config.json``, or None if the checkpoint has none.
        video: it has ``video_preprocessor_config.json`` too.
        named: tokens that the tokenizer offers as attributes.
        begins: tokens that are put before every text.
    """

    special: tuple[str, ...]
    template: str
    image: dict[str, Any]
    processor: dict[str, Any] | None = None
    template_file: str = "chat_template.jinja"
    video: bool = False
    named: dict[str, str] = field(default_factory=dict[str, str])
    begins: tuple[str, ...] = ()
    tokenizer: dict[str, Any] = field(default_factory=dict[str, Any])


def _chat(image: str, before: str, after: str, reply: str, start: str = "") -> str:
    """A template: ``before`` and ``after`` go round every message, and ``ROLE`` in them is the role."""
    role = "' ~ message['role'] ~ '"
    return (
        f"{start}{{%- for message in messages -%}}{{{{- '{before.replace('ROLE', role)}' -}}}}"
        "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
        "{%- for part in message['content'] -%}"
        f"{{%- if part['type'] == 'image' -%}}{{{{- '{image}' -}}}}"
        "{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
        f"{{%- endfor -%}}{{%- endif -%}}{{{{- '{after.replace('ROLE', role)}' -}}}}{{%- endfor -%}}"
        f"{{%- if add_generation_prompt -%}}{{{{- '{reply}' -}}}}{{%- endif -%}}"
    )


def _chatml(image: str) -> str:
    return _chat(image, "<|im_start|>ROLE\\n", "<|im_end|>\\n", "<|im_start|>assistant\\n")


_QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>")
_QWEN_TOKENS += ("<|image_pad|>", "<|video_pad|>")
_GLM_TOKENS = ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|begin_of_image|>")
_GLM_TOKENS += ("<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|image|>", "<|video|>")


def _qwen(processor_class: str, image_processor: str, pixels: dict[str, Any], statistics: dict[str, Any]) -> Any:
    return TinyProcessor(
        special=_QWEN_TOKENS,
        template=_chatml("<|vision_start|><|image_pad|><|vision_end|>"),
        template_file="chat_template.json",
        image={"patch_size": 8, "temporal_patch_size": 2, "merge_size": 2, **pixels, **statistics}
        | {"image_processor_type": image_processor, "processor_class": processor_class},
        video=processor_class.startswith("Qwen3"),
        tokenizer={"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    )


def _glm(name: str, vision: str) -> TinyProcessor:
    return TinyProcessor(
        special=_GLM_TOKENS,
        template=_chat(
            "<|begin_of_image|><|image|><|end_of_image|>", "<|ROLE|>\\n", "", "<|assistant|>\\n", start="[gMASK]<sop>"
        ),
        # Its image processor counts the pixels of both frames of a temporal patch.
        image={"size": {"shortest_edge": 2048, "longest_edge": 6144}, "patch_size": 8, "temporal_patch_size": 2}
        | {"merge_size": 2, "image_processor_type": vision, "processor_class": name, **_STATISTICS},
        video=True,
        tokenizer={"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    )


_QWEN2_PIXELS = {"min_pixels": 1024, "max_pixels": 3072}
_QWEN3_PIXELS = {"size": {"shortest_edge": 1024, "longest_edge": 3072}}
_GEMMA_NAMES = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
_INTERN_NAMES = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
_SQUARE = {"height": 32, "width": 32}

PROCESSORS: dict[str, TinyProcessor] = {
    "qwen2_vl": _qwen("Qwen2VLProcessor", "Qwen2VLImageProcessor", _QWEN2_PIXELS, _STATISTICS),
    "qwen2_5_vl": _qwen("Qwen2_5_VLProcessor", "Qwen2VLImageProcessor", _QWEN2_PIXELS, _STATISTICS),
    "qwen3_vl": _qwen("Qwen3VLProcessor", "Qwen2VLImageProcessorFast", _QWEN3_PIXELS, _HALVES),
    "qwen3_vl_moe": _qwen("Qwen3VLProcessor", "Qwen2VLImageProcessorFast", _QWEN3_PIXELS, _HALVES),
    "qwen3_5": _qwen("Qwen3VLProcessor", "Qwen2VLImageProcessorFast", _QWEN3_PIXELS, _HALVES),
    "glm4v": _glm("Glm4vProcessor", "Glm4vImageProcessor"),
    "glm4v_moe": _glm("Glm4vProcessor", "Glm4vImageProcessor"),
    "glm46v": _glm("Glm46VProcessor", "Glm46VImageProcessor"),
    "internvl": TinyProcessor(
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
        template=_chatml("<IMG_CONTEXT>\\n"),
        image={"size": _SQUARE, "crop_to_patches": False, "min_patches": 1, "max_patches": 4, **_STATISTICS}
        | {"image_processor_type": "GotOcr2ImageProcessorFast", "processor_class": "InternVLProcessor"},
        processor={"image_seq_length": 4, "processor_class": "InternVLProcessor"},
        video=True,
        named=_INTERN_NAMES | {"video_token": "<video>"},
        tokenizer={"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    ),
    "gemma3": TinyProcessor(
        special=("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", *_GEMMA_NAMES.values()),
        template=_chat(
            "<start_of_image>", "<start_of_turn>ROLE\\n", "<end_of_turn>\\n", "<start_of_turn>model\\n", start="<bos>"
        ),
        template_file="chat_template.json",
        image={"size": _SQUARE, "image_seq_length": 4, **_HALVES}
        | {"image_processor_type": "Gemma3ImageProcessor", "processor_class": "Gemma3Processor"},
        processor={"image_seq_length": 4, "processor_class": "Gemma3Processor"},
        named=_GEMMA_NAMES,
        begins=("<bos>",),
        tokenizer={"eos_token": "<eos>", "bos_token": "<bos>", "pad_token": "<pad>", "unk_token": "<unk>"},
    ),
    "llava": TinyProcessor(
        special=("<unk>", "<s>", "</s>", "<image>", "<pad>"),
        template=_chat("<image>\\n", "ROLE: ", " ", "ASSISTANT:"),
        template_file="chat_template.json",
        image={"size": {"shortest_edge": 32}, "crop_size": _SQUARE, **_STATISTICS}
        | {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor"},
        processor={"image_token": "<image>", "num_additional_image_tokens": 1, "patch_size": 8}
        | {"processor_class": "LlavaProcessor", "vision_feature_select_strategy": "default"},
        begins=("<s>",),
        tokenizer={"eos_token": "</s>", "bos_token": "<s>", "pad_token": "<pad>", "unk_token": "<unk>"},
    ),
    "mistral3": TinyProcessor(
        special=("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"),
        template=_chat("[IMG]", "[INST]", "[/INST]", "", start="<s>"),
        template_file="chat_template.json",
        image={"size": {"longest_edge": 64}, "patch_size": 8, **_STATISTICS}
        | {"image_processor_type": "PixtralImageProcessor", "processor_class": "PixtralProcessor"},
        processor={"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
        | {"patch_size": 8, "spatial_merge_size": 2, "processor_class": "PixtralProcessor"},
        begins=("<s>",),
        tokenizer={"eos_token": "</s>", "bos_token": "<s>", "pad_token": "<pad>", "unk_token": "<unk>"},
    ),
    "idefics3": TinyProcessor(
        special=(
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<fake_token_around_image>",
            "<image>",
            "<end_of_utterance>",
            "<global-img>",
            *_ROW_TAGS,
        ),
        template=_chat("<image>", "ROLE: ", "<end_of_utterance>\\n", "assistant:", start="<|begin_of_text|>"),
        template_file="chat_template.json",
        image={"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}, "do_image_splitting": True}
        | {"image_processor_type": "Idefics3ImageProcessor", "processor_class": "Idefics3Processor", **_HALVES},
        processor={"image_seq_len": 4, "processor_class": "Idefics3Processor"},
        begins=("<|begin_of_text|>",),
        tokenizer={"eos_token": "<|end_of_text|>", "bos_token": "<|begin_of_text|>", "pad_token": "<|end_of_text|>"},
    ),
    "kimi_k25": TinyProcessor(
        special=(
            "[BOS]",
            "[EOS]",
            "<|im_user|>",
            "<|im_assistant|>",
            "<|im_middle|>",
            "<|im_end|>",
            "<|media_begin|>",
            "<|media_content|>",
            "<|media_end|>",
            "<|media_pad|>",
            "<|kimi_k25_video_placeholder|>",
            "[PAD]",
        ),
        template=_chat(
            "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>",
            "<|im_ROLE|>ROLE<|im_middle|>",
            "<|im_end|>",
            "<|im_assistant|>assistant<|im_middle|>",
        ),
        image={"patch_size": 8, "merge_size": 2, "max_patches": 48, "processor_class": "Kimi_K25Processor"}
        | {"image_processor_type": "Kimi_K25ImageProcessor", **_HALVES},
        video=True,
        tokenizer={"eos_token": "<|im_end|>", "bos_token": "[BOS]", "pad_token": "[PAD]"},
    ),
    "aya_vision": TinyProcessor(
        special=(
            "<PAD>",
            "<UNK>",
            "<BOS_TOKEN>",
            "<|START_OF_TURN_TOKEN|>",
            "<|END_OF_TURN_TOKEN|>",
            "<image>",
            "<|IMG_PATCH|>",
            "<|START_OF_IMG|>",
            "<|END_OF_IMG|>",
            "<|IMG_LINE_BREAK|>",
            "TILE_GLOBAL",
            "TILE",
        ),
        template=_chat(
            "<image>", "<|START_OF_TURN_TOKEN|>ROLE: ", "<|END_OF_TURN_TOKEN|>", "<|START_OF_TURN_TOKEN|>chatbot: "
        ),
        template_file="chat_template.json",
        image={"size": _SQUARE, "crop_to_patches": True, "min_patches": 1, "max_patches": 4, **_HALVES}
        | {"image_processor_type": "GotOcr2ImageProcessor", "processor_class": "AyaVisionProcessor"},
        processor={"patch_size": 8, "img_size": 32, "downsample_factor": 2, "processor_class": "AyaVisionProcessor"},
        begins=("<BOS_TOKEN>",),
        tokenizer={"eos_token": "<|END_OF_TURN_TOKEN|>", "bos_token": "<BOS_TOKEN>", "pad_token": "<PAD>"},
    ),
}


def token_id(family: str, token: str) -> int:
    """The id of a special token of the family."""
    return ORDINARY + PROCESSORS[family].special.index(token)


def write_processor(family: str, folder: Path) -> None:
    """Write the files of tokenizer and processor beside a model."""
    tiny = PROCESSORS[family]
    tokenizer = _tokenizer()
    tokenizer.add_special_tokens(list(tiny.special))
    if tiny.begins:
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single=[*tiny.begins, "$A"],
                    pair=[*tiny.begins, "$A", "$B"],
                    special_tokens=[(token, token_id(family, token)) for token in tiny.begins],
                ),
            ]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 4096, **tiny.tokenizer, **tiny.named}
    settings |= {"clean_up_tokenization_spaces": False, "processor_class": tiny.image["processor_class"]}
    settings["added_tokens_decoder"] = {
        str(ORDINARY + index): {"content": token, "special": True} for index, token in enumerate(tiny.special)
    }
    if tiny.named:
        settings["extra_special_tokens"] = tiny.named
    _write(folder / "tokenizer_config.json", settings)
    _write(folder / "preprocessor_config.json", tiny.image)
    if tiny.processor is not None:
        _write(folder / "processor_config.json", tiny.processor)
    if tiny.video:
        name = tiny.image["processor_class"].replace("Processor", "VideoProcessor")
        _write(folder / "video_preprocessor_config.json", tiny.image | {"video_processor_type": name})
    if tiny.template_file.endswith(".json"):
        _write(folder / tiny.template_file, {"chat_template": tiny.template})
    else:
        (folder / tiny.template_file).write_text(tiny.template, encoding="utf-8")


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ORDINARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    assert tokenizer.get_vocab_size() == ORDINARY
    return tokenizer


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of coarse random patches, RGB."""
    generator = torch.Generator().manual_seed(1000 * seed + 100 * width + height)
    coarse = (torch.rand(4, 4, 3, generator=generator) * 255).byte().numpy()
    return Image.fromarray(coarse, "RGB").resize((width, height), Image.Resampling.BICUBIC)
