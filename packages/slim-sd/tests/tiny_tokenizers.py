"""Real tokenizers of a few hundred tokens for the text encoders of tiny pipelines, built offline."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

__all__ = ["clip_tokenizer", "llama_tokenizer", "qwen_tokenizer", "t5_tokenizer"]

QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
QWEN_SPECIAL += ("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
LLAMA_SPECIAL = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>")


def _corpus() -> list[str]:
    """Plain prompts, and the templates that the pipelines put round them."""
    from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video

    return [
        str(pipeline_hunyuan_video.DEFAULT_PROMPT_TEMPLATE["template"]),
        "Describe the image by detailing the color, shape, size, texture, quantity, text and spatial relationships.",
        "Describe the key features of the input image, then explain how the instruction should alter the image.",
        "A red fox walks through fresh snow, morning light, slow camera movement, highly detailed.",
        "Two cats in boxing gloves fight on a stage under a spotlight; the crowd cheers.",
        "一只狐狸在雪地里慢慢地走，清晨的阳光照在树上。",
    ]


def _byte_level(size: int, special: tuple[str, ...] = ()) -> tuple[dict[str, int], list[tuple[str, str]]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        _corpus(), trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    state = json.loads(tokenizer.to_str())["model"]
    vocab: dict[str, int] = state["vocab"]
    for token in special:
        vocab[token] = len(vocab)
    return vocab, [tuple(pair) for pair in state["merges"]]


def t5_tokenizer() -> Any:
    """Pieces with scores, ``</s>`` at the end; unknown characters are ``<unk>``."""
    from transformers import T5TokenizerFast

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    vocab = [(piece, score) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=512)


def clip_tokenizer() -> Any:
    """Byte pairs with the ends of words marked; 77 tokens at most."""
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*letters, *(f"{letter}</w>" for letter in letters)])}
    merges = [("t", "h"), ("th", "e</w>"), ("i", "n</w>"), ("a", "n"), ("o", "u")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocab[token] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def qwen_tokenizer() -> Any:
    """Byte pairs, with the tokens of chats and of pictures."""
    from transformers import Qwen2Tokenizer

    vocab, merges = _byte_level(480)
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        model_max_length=4096,
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(QWEN_SPECIAL)})
    return tokenizer


def llama_tokenizer() -> Any:
    """Byte pairs, with the tokens of Llama 3's messages; padded on the right, as HunyuanVideo's is."""
    from transformers import PreTrainedTokenizerFast

    vocab, merges = _byte_level(640, LLAMA_SPECIAL)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|pad|>",
        additional_special_tokens=list(LLAMA_SPECIAL[1:3]),
        model_max_length=1024,
        padding_side="right",
    )
