#!/usr/bin/env python3
"""Make examples/tiny-qwen3: a small trained Qwen3 model to try quantization on.

The script does everything from text to model folder, on a CPU, offline:

1. corpus     Python's documentation, cleaned to plain text, and the standard
              library's docstrings as short chat exchanges (``tiny_corpus.py``).
              Some pages are kept out of the training text and become
              ``heldout.txt``.
2. tokenizer  a byte-level BPE with Qwen's pre-tokenization, trained on that text.
3. training   AdamW on next-token prediction, bf16 autocast, fp32 master weights.
              Progress is kept in ``--work`` and taken up again on the next start.
4. outliers   a function-preserving rescaling gives the model what large language
              models have of themselves: a few activation channels far larger than the
              rest. All factors are powers of two, so the rescaled model computes
              bit for bit the same logits (the script checks this).
5. export     config, bf16 safetensors, tokenizer and chat template.

Usage (Debian 12; ``apt-get install python3.11-doc`` first):

    python examples/train_tiny_qwen3.py --work /tmp/tiny-qwen3-work

Needs torch, transformers (5.x), tokenizers, safetensors and numpy.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from pathlib import Path

import numpy as np
import tiny_corpus
import torch
from tiny_corpus import END_OF_TEXT, IM_END, IM_START
from torch.nn import functional

HERE = Path(__file__).resolve().parent

SPECIAL_TOKENS = [END_OF_TEXT, IM_START, IM_END]

MODEL_CONFIG = {
    "vocab_size": 3072,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
}
CONTEXT = 512

# Where the outliers go, and how large they become (powers of two only).
OUTLIERS = {
    # The same hidden channels in every layer, as in large models: channel -> factor.
    "norm": {37: 64.0, 101: 16.0, 166: 32.0, 229: 16.0},
    # Channels between up_proj and down_proj: layer -> {channel: factor}.
    "mlp": {1: {50: 16.0, 301: 8.0}, 3: {211: 16.0}, 5: {7: 8.0, 129: 16.0}},
    # Channels of a key/value head, between v_proj and o_proj:
    # layer -> {(kv head, channel): factor}.
    "value": {0: {(1, 12): 8.0}, 2: {(0, 33): 8.0}, 4: {(1, 57): 8.0}},
}

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

# Qwen2's and Qwen3's pre-tokenization pattern.
PRETOKENIZE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# ------------------------------------------------------------------------- tokenizer


def train_tokenizer(texts: list[str]):
    """A byte-level BPE with Qwen's pre-tokenization; special tokens take the last ids."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=MODEL_CONFIG["vocab_size"] - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    plain = [re.sub(r"<\|\w+\|>", "\n", text) for text in texts]
    tokenizer.train_from_iterator(plain, trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL_TOKENS])
    if tokenizer.get_vocab_size() != MODEL_CONFIG["vocab_size"]:
        raise SystemExit(f"the tokenizer got {tokenizer.get_vocab_size()} tokens")
    return tokenizer


def write_tokenizer(tokenizer, folder: Path) -> None:
    """tokenizer.json, and a tokenizer_config.json as the Qwen3 models have it."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token)): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for token in SPECIAL_TOKENS
        },
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": IM_END,
        "errors": "replace",
        "extra_special_tokens": {},
        "model_max_length": 131072,  # as Qwen; config.json has the real limit
        "pad_token": END_OF_TEXT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


# -------------------------------------------------------------------------- training


def new_model(tokenizer):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        **MODEL_CONFIG,
        bos_token_id=tokenizer.token_to_id(END_OF_TEXT),
        eos_token_id=tokenizer.token_to_id(IM_END),
        pad_token_id=tokenizer.token_to_id(END_OF_TEXT),
    )
    return Qwen3ForCausalLM(config)


def next_token_loss(model, batch: torch.Tensor, autocast: bool) -> torch.Tensor:
    """Mean negative log-likelihood of batch[:, 1:] given what comes before."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


@torch.no_grad()
def perplexity(model, tokens: np.ndarray, chunk: int = CONTEXT, limit: int | None = None) -> float:
    """Perplexity over consecutive chunks that do not overlap, each seen on its own."""
    was_training = model.training
    model.eval()
    total = count = 0
    for start in range(0, len(tokens) - chunk + 1, chunk):
        ids = torch.from_numpy(tokens[start : start + chunk].astype(np.int64))[None]
        total += next_token_loss(model, ids, autocast=False).item() * (chunk - 1)
        count += chunk - 1
        if limit and count >= limit * (chunk - 1):
            break
    model.train(was_training)
    return math.exp(total / count)


def epoch_blocks(documents: list[np.ndarray], seed: int, epoch: int) -> np.ndarray:
    """One pass over the documents in a new order, cut into blocks of CONTEXT + 1 tokens."""
    rng = np.random.default_rng([seed, epoch])
    stream = np.concatenate([documents[i] for i in rng.permutation(len(documents))])
    stream = stream[rng.integers(CONTEXT) :]
    starts = np.arange(0, len(stream) - CONTEXT - 1, CONTEXT)
    return np.stack([stream[s : s + CONTEXT + 1] for s in rng.permutation(starts)])


def learning_rate(step: int, options: argparse.Namespace) -> float:
    """Linear warm-up, a plateau, and a cosine fall to a hundredth over the last part.

    The plateau lets a run be prolonged or cut short: only the fall depends on the end.
    """
    warm_up = min(1.0, (step + 1) / options.warmup)
    fall_start = options.steps * (1 - options.fall)
    progress = max(0.0, (step - fall_start) / (options.steps - fall_start))
    return options.lr * warm_up * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(tokenizer, documents, held_out_tokens, options):
    """Train, or go on with the training that --work holds; returns model and statistics."""
    torch.manual_seed(options.seed)
    model = new_model(tokenizer).train()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=options.lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    checkpoint_path = options.work / "checkpoint.pt"
    step, seconds, loss_mean = 0, 0.0, None
    if checkpoint_path.exists():
        checkpoint = torch.load(checkpoint_path, weights_only=True)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        step, seconds = checkpoint["step"], checkpoint["seconds"]
        loss_mean = checkpoint["loss"]
    epoch, blocks, used = -1, np.zeros((0, CONTEXT + 1), dtype=np.uint16), 0
    skip = step * options.batch
    started = time.monotonic()

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "seconds": seconds + time.monotonic() - started,
            "loss": loss_mean,
        }
        torch.save(state, checkpoint_path.with_suffix(".new"))
        checkpoint_path.with_suffix(".new").replace(checkpoint_path)

    while step < options.steps:
        # The data order depends on the seed alone, so a resumed run sees the same.
        while used + options.batch > len(blocks) or skip > 0:
            if used + options.batch > len(blocks):
                epoch, used = epoch + 1, 0
                blocks = epoch_blocks(documents, options.seed, epoch)
            if skip > 0:
                used += options.batch
                skip -= options.batch
        batch = torch.from_numpy(blocks[used : used + options.batch].astype(np.int64))
        used += options.batch
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        loss = next_token_loss(model, batch, autocast=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        loss_mean = loss.item() if loss_mean is None else 0.98 * loss_mean + 0.02 * loss.item()
        if step % options.log_every == 0:
            spent = seconds + time.monotonic() - started
            print(
                f"step {step}/{options.steps} epoch {epoch} loss {loss_mean:.4f} "
                f"lr {learning_rate(step, options):.2e} {spent:.0f} s "
                f"{step * options.batch * CONTEXT / spent:.0f} tokens/s",
                flush=True,
            )
        if step % options.save_every == 0 or step == options.steps:
            save()
            held_out = perplexity(model, held_out_tokens, limit=16)
            print(f"step {step}: held-out perplexity {held_out:.3f} (16 chunks)", flush=True)
    statistics = {
        "steps": step,
        "tokens": step * options.batch * CONTEXT,
        "epochs": round(step * options.batch * CONTEXT / sum(map(len, documents)), 2),
        "seconds": round(seconds + time.monotonic() - started),
        "train_loss": round(loss_mean, 4),
    }
    return model, statistics


# -------------------------------------------------------------------------- outliers


@torch.no_grad()
def inject_outliers(model, outliers: dict) -> None:
    """Make some activation channels large without changing what the model computes.

    Each channel's producer (an RMSNorm weight, or a row of up_proj or v_proj) is
    multiplied by a power of two and every consumer's matching input column divided
    by it. This is SmoothQuant's rescaling run backwards.
    """
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    head_dim = model.config.head_dim
    for index, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        for channel, factor in outliers["norm"].items():
            layer.input_layernorm.weight[channel] *= factor
            layer.post_attention_layernorm.weight[channel] *= factor
            for linear in (
                attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj,
            ):  # fmt: skip
                linear.weight[:, channel] /= factor
        for channel, factor in outliers["mlp"].get(index, {}).items():
            mlp.up_proj.weight[channel] *= factor
            mlp.down_proj.weight[:, channel] /= factor
        for (kv_head, channel), factor in outliers["value"].get(index, {}).items():
            attention.v_proj.weight[kv_head * head_dim + channel] *= factor
            for query_head in range(kv_head * groups, (kv_head + 1) * groups):
                attention.o_proj.weight[:, query_head * head_dim + channel] /= factor


def export(model, tokenizer, held_out_tokens, folder: Path) -> dict:
    """Round to bf16, inject the outliers, check that nothing changed, and save."""
    from transformers import GenerationConfig

    model = model.eval().to(torch.bfloat16)
    probe = torch.from_numpy(held_out_tokens[: 4 * CONTEXT].astype(np.int64)).view(4, CONTEXT)
    with torch.no_grad():
        before = model.float()(input_ids=probe, use_cache=False).logits
        inject_outliers(model.to(torch.bfloat16), OUTLIERS)
        after = model.float()(input_ids=probe, use_cache=False).logits
    difference = (after - before).abs().max().item()
    print(f"largest logit change through the outliers (float32): {difference}")
    if difference > 1e-4:
        raise SystemExit("the outliers changed what the model computes")
    value = perplexity(model, held_out_tokens)
    folder.mkdir(parents=True, exist_ok=True)
    model = model.to(torch.bfloat16)
    model.config.use_cache = True
    model.config.dtype = torch.bfloat16
    end_of_text, im_end = (tokenizer.token_to_id(t) for t in (END_OF_TEXT, IM_END))
    model.generation_config = GenerationConfig(
        bos_token_id=end_of_text, eos_token_id=[im_end, end_of_text], pad_token_id=end_of_text
    )
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    write_tokenizer(tokenizer, folder)
    return {"logit_change": difference, "held_out_perplexity": round(value, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tiny_corpus.add_arguments(parser)
    parser.add_argument("--work", type=Path, required=True, help="folder for the tokenizer and the training's progress")
    parser.add_argument("--out", type=Path, default=HERE / "tiny-qwen3", help="model folder")
    parser.add_argument("--heldout", type=Path, default=HERE / "heldout.txt", help="where the held-out text is written")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument(
        "--stop-at",
        type=int,
        help="export what --work holds at once, untrained further, when it has at least this many steps",
    )
    parser.add_argument("--batch", type=int, default=8, help=f"sequences of {CONTEXT} tokens")
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--warmup", type=int, default=150, help="steps")
    parser.add_argument("--fall", type=float, default=0.335, help="share of steps with falling rate")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()  # fmt: skip
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)

    from tokenizers import Tokenizer

    corpus = tiny_corpus.read_corpus(options.docs, options.stdlib)
    texts, held_out = corpus.texts, corpus.held_out
    options.heldout.write_text(held_out, encoding="utf-8")
    print(
        f"{len(corpus.pages)} pages ({sum(map(len, corpus.pages.values())):,} characters), "
        f"{len(corpus.exchanges)} docstrings ({sum(map(len, corpus.exchanges)):,} characters), "
        f"held out {len(held_out):,} characters"
    )
    tokenizer_path = options.work / "tokenizer.json"
    if not tokenizer_path.exists():
        train_tokenizer(texts).save(str(tokenizer_path))
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    documents = [np.array([*encoding.ids, end_of_text], dtype=np.uint16) for encoding in tokenizer.encode_batch(texts)]
    held_out_tokens = np.array(tokenizer.encode(held_out).ids, dtype=np.uint16)
    print(
        f"{sum(map(len, documents)):,} training tokens, {len(held_out_tokens):,} held-out tokens, "
        f"{len(held_out.encode()) / len(held_out_tokens):.3f} bytes per token",
        flush=True,
    )
    if options.stop_at is not None:
        done = torch.load(options.work / "checkpoint.pt", weights_only=True)["step"]
        if done < options.stop_at:
            raise SystemExit(f"only {done} steps so far")
        options.steps = done
    model, statistics = train(tokenizer, documents, held_out_tokens, options)
    statistics |= export(model, tokenizer, held_out_tokens, options.out)
    print(json.dumps(statistics, indent=2))


if __name__ == "__main__":
    main()
