#!/usr/bin/env python3
"""Make examples/tiny-qwen3-moe: a small trained mixture of experts, out of examples/tiny-qwen3.

The neurons of every MLP of the dense model are dealt to eight experts, a router with small random weights is put in
front of them, and all weights are trained further on the text that the dense model was trained on, with the auxiliary
loss that keeps experts equally busy. The outlier channels of the dense model are taken out first and put back in
afterwards, both exactly. The tokenizer and the held-out text are those of the dense model.

Usage (Debian 12; ``apt-get install python3.11-doc`` first):

    python examples/train_tiny_qwen3_moe.py --work /tmp/tiny-moe-work

Progress is kept in ``--work`` and taken up again on the next start.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import tiny_corpus
import torch
import train_tiny_qwen3 as dense
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3MoeConfig

HERE = Path(__file__).resolve().parent
EXPERTS, CHOSEN = 8, 4
BALANCE = 0.01
"""Weight of the auxiliary loss."""


def inverted(outliers: dict[str, Any]) -> dict[str, Any]:
    """The rescaling that undoes another one."""
    if not all(isinstance(value, dict) for value in outliers.values()):
        return {channel: 1 / factor for channel, factor in outliers.items()}
    return {key: inverted(value) for key, value in outliers.items()}


@torch.no_grad()
def upcycled(source: Path) -> Any:
    """The dense model as a mixture of experts that was not trained yet, float32."""
    old = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    dense.inject_outliers(old, inverted(dense.OUTLIERS))
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    same += ("max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "attention_bias")
    same += ("bos_token_id", "eos_token_id", "pad_token_id")
    width = old.config.intermediate_size // EXPERTS
    config = Qwen3MoeConfig(
        **{name: getattr(old.config, name) for name in same},
        intermediate_size=old.config.intermediate_size,
        moe_intermediate_size=width,
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        norm_topk_prob=True,
        router_aux_loss_coef=BALANCE,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict({k: v for k, v in old.state_dict().items() if ".mlp." not in k}, strict=False)
    generator = torch.Generator().manual_seed(1)
    for before, after in zip(old.model.layers, model.model.layers, strict=True):
        after.mlp.gate.weight.normal_(0, 0.02, generator=generator)
        for expert in range(EXPERTS):
            rows = slice(expert * width, (expert + 1) * width)
            halves = (before.mlp.gate_proj.weight[rows], before.mlp.up_proj.weight[rows])
            after.mlp.experts.gate_up_proj[expert] = torch.cat(halves)
            # The chosen experts share a weight of one; in the dense model every neuron had one of its own.
            after.mlp.experts.down_proj[expert] = before.mlp.down_proj.weight[:, rows] * CHOSEN
    return model


def train(model: Any, documents: list[np.ndarray], held_out: np.ndarray, options: argparse.Namespace) -> dict[str, Any]:
    """Train in place, or go on where ``--work`` left off."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    path = options.work / "checkpoint.pt"
    step, seconds, spent, mean = 0, 0.0, 0.0, None
    if path.exists():
        kept = torch.load(path, weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        step, seconds, mean = kept["step"], kept["seconds"], kept["loss"]
    began = time.monotonic()
    blocks = np.concatenate([dense.epoch_blocks(documents, options.seed, epoch) for epoch in range(2)])
    while step < options.steps:
        chosen = blocks[(step * options.batch) % (len(blocks) - options.batch) :][: options.batch]
        batch = torch.from_numpy(chosen.astype(np.int64))
        for group in optimizer.param_groups:
            group["lr"] = dense.learning_rate(step, options)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(input_ids=batch[:, :-1], use_cache=False, output_router_logits=True)
        loss = functional.cross_entropy(output.logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        (loss + BALANCE * output.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        spent = seconds + time.monotonic() - began
        if step % 20 == 0:
            print(
                f"step {step}/{options.steps} loss {mean:.4f} balance {output.aux_loss:.3f} {spent:.0f} s", flush=True
            )
        if step % options.save_every == 0 or step == options.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"step": step, "seconds": spent, "loss": mean}, path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)
            found = dense.perplexity(model, held_out, limit=8)
            print(f"step {step}: held-out perplexity {found:.3f} (8 chunks)", flush=True)
    return {"steps": step, "tokens": step * options.batch * dense.CONTEXT, "seconds": round(spent), "loss": mean}


@torch.no_grad()
def inject_outliers(model: Any, outliers: dict[str, Any]) -> None:
    """As for the dense model: exact, by powers of two; routers take part."""
    config = model.config
    groups, head_dim = config.num_attention_heads // config.num_key_value_heads, config.head_dim
    width = config.moe_intermediate_size
    for index, layer in enumerate(model.model.layers):
        attention, experts = layer.self_attn, layer.mlp.experts
        for channel, factor in outliers["norm"].items():
            layer.input_layernorm.weight[channel] *= factor
            layer.post_attention_layernorm.weight[channel] *= factor
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj, layer.mlp.gate):
                linear.weight[:, channel] /= factor
            experts.gate_up_proj[:, :, channel] /= factor
        for neuron, factor in outliers["mlp"].get(index, {}).items():
            expert, row = divmod(neuron, width)
            experts.gate_up_proj[expert, width + row] *= factor
            experts.down_proj[expert, :, row] /= factor
        for (kv_head, channel), factor in outliers["value"].get(index, {}).items():
            attention.v_proj.weight[kv_head * head_dim + channel] *= factor
            for head in range(kv_head * groups, (kv_head + 1) * groups):
                attention.o_proj.weight[:, head * head_dim + channel] /= factor


def export(model: Any, held_out: np.ndarray, source: Path, folder: Path) -> dict[str, Any]:
    """Round to bf16, put the outliers in, check that nothing changed, and save."""
    model = model.eval().to(torch.bfloat16)
    probe = torch.from_numpy(held_out[: 4 * dense.CONTEXT].astype(np.int64)).view(4, dense.CONTEXT)
    with torch.no_grad():
        before = model.float()(input_ids=probe, use_cache=False).logits
        inject_outliers(model.to(torch.bfloat16), dense.OUTLIERS)
        after = model.float()(input_ids=probe, use_cache=False).logits
    change = (after - before).abs().max().item()
    if change > 1e-4:
        raise SystemExit(f"the outliers changed what the model computes, by {change}")
    value = dense.perplexity(model, held_out)
    model = model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.config.use_cache = True
    model.generation_config = GenerationConfig.from_pretrained(source)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    (folder / "model.safetensors").chmod(0o644)
    return {"logit_change": change, "held_out_perplexity": round(value, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tiny_corpus.add_arguments(parser)
    parser.add_argument("--work", type=Path, required=True, help="folder for the training's progress")
    parser.add_argument("--source", type=Path, default=HERE / "tiny-qwen3", help="the dense model")
    parser.add_argument("--out", type=Path, default=HERE / "tiny-qwen3-moe", help="model folder")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=8, help=f"sequences of {dense.CONTEXT} tokens")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=30, help="steps")
    parser.add_argument("--fall", type=float, default=0.7, help="share of steps with falling rate")
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    options.work.mkdir(parents=True, exist_ok=True)
    corpus = tiny_corpus.read_corpus(options.docs, options.stdlib)
    tokenizer = Tokenizer.from_file(str(options.source / "tokenizer.json"))
    end = tokenizer.token_to_id(tiny_corpus.END_OF_TEXT)
    documents = [np.array([*found.ids, end], dtype=np.uint16) for found in tokenizer.encode_batch(corpus.texts)]
    tokens = np.array(tokenizer.encode(corpus.held_out).ids, dtype=np.uint16)
    model = upcycled(options.source)
    statistics = train(model, documents, tokens, options)
    print(json.dumps(statistics | export(model, tokens, options.source, options.out), indent=2))


if __name__ == "__main__":
    main()
