"""Random checkpoints of real shapes, written without holding them in memory.

python benchmarks/synthetic.py qwen3-4b /tmp/qwen3-4b
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch

from slim_core.checkpoint.source import TensorMeta
from slim_core.checkpoint.writer import ShardedWriter, lay_out

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-qwen3"

SHAPES = {
    # name: hidden, intermediate, blocks, heads, kv heads, vocabulary, tied
    "tiny": (256, 768, 4, 4, 2, 4096, False),
    "wide-2": (1024, 4096, 2, 16, 8, 8192, False),
    "wide-8": (1024, 4096, 8, 16, 8, 8192, False),
    "wide-32": (1024, 4096, 32, 16, 8, 8192, False),
    "broad-2": (2048, 8192, 2, 16, 8, 8192, False),
    "broad-8": (2048, 8192, 8, 16, 8, 8192, False),
    "broad-32": (2048, 8192, 32, 16, 8, 8192, False),
    "qwen3-0.6b": (1024, 3072, 28, 16, 8, 151936, True),
    "qwen3-4b": (2560, 9728, 36, 32, 8, 151936, True),
    "qwen2.5-14b-like": (5120, 17408, 40, 40, 8, 151936, False),
    # As many parameters in the blocks as those of moe-4, in matrices of a usual size.
    "dense-8": (2048, 7424, 8, 16, 8, 8192, False),
    "moe-4": (768, 384, 4, 8, 4, 8192, False),
    # Together with wide-2, broad-2 and moe-4: many kinds of blocks and heads that are soon worked on.
    "narrow-2": (512, 2048, 2, 8, 4, 8192, False),
    "mid-2": (1536, 8960, 2, 12, 2, 8192, False),
    "deep-12": (768, 2048, 12, 12, 4, 8192, False),
    "tied-2": (1024, 3072, 2, 16, 8, 65536, True),
    "square-2": (2048, 2048, 2, 16, 16, 8192, False),
}
EXPERTS = {"moe-4": (128, 8)}
"""How many experts a block has, and how many of them a token goes to; the intermediate size is that of one expert."""


def write_checkpoint(name: str, folder: Path, part_bytes: int = 2 << 30) -> int:
    """A Qwen3 or Qwen3-MoE checkpoint of the named shape in bf16; returns its size in bytes."""
    hidden, inner, blocks, heads, kv_heads, vocabulary, tied = SHAPES[name]
    head_dim = 128 if hidden > 512 else 64
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "rope_theta": 1000000.0,
    }
    experts, active = EXPERTS.get(name, (0, 0))
    if experts:
        config |= {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": inner,
            "num_experts": experts,
            "num_experts_per_tok": active,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for file in EXAMPLE.glob("tokenizer*"):
        shutil.copy(file, folder)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(blocks):
        at = f"model.layers.{i}."
        shapes |= {
            f"{at}self_attn.q_proj.weight": (heads * head_dim, hidden),
            f"{at}self_attn.k_proj.weight": (kv_heads * head_dim, hidden),
            f"{at}self_attn.v_proj.weight": (kv_heads * head_dim, hidden),
            f"{at}self_attn.o_proj.weight": (hidden, heads * head_dim),
            f"{at}self_attn.q_norm.weight": (head_dim,),
            f"{at}self_attn.k_norm.weight": (head_dim,),
            f"{at}input_layernorm.weight": (hidden,),
            f"{at}post_attention_layernorm.weight": (hidden,),
        }
        if experts:
            shapes[f"{at}mlp.gate.weight"] = (experts, hidden)
        for mlp in [f"{at}mlp.experts.{expert}." for expert in range(experts)] or [f"{at}mlp."]:
            shapes |= {
                f"{mlp}gate_proj.weight": (inner, hidden),
                f"{mlp}up_proj.weight": (inner, hidden),
                f"{mlp}down_proj.weight": (hidden, inner),
            }
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    metas = [TensorMeta(tensor, torch.bfloat16, shape) for tensor, shape in shapes.items()]
    shards = lay_out(metas, "model", part_bytes)
    writer = ShardedWriter(folder, shards)
    pool = (torch.randn(max(meta.numel for meta in metas) % (1 << 25) + (1 << 25)) * 0.02).bfloat16()
    for number, meta in enumerate(metas):
        if len(meta.shape) == 1:
            writer.put(meta.name, torch.ones(meta.shape, dtype=torch.bfloat16))
            continue
        shift = (number * 7919) % 4096
        repeats = -(-(meta.numel + shift) // pool.numel())
        values = pool if repeats == 1 else pool.repeat(repeats)
        writer.put(meta.name, values[shift : shift + meta.numel].view(meta.shape).clone())
    writer.finish()
    index = {meta.name: shard.file_name for shard in shards for meta in shard.tensors}
    total = sum(meta.nbytes for meta in metas)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    return total


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    print(write_checkpoint(arguments.shape, arguments.folder), "bytes")
