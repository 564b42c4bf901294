"""Which lists of a transformer hold its blocks, and in what order they run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from slim_core.errors import SlimError
from slim_core.progress import SilentProgress
from slim_core.recipe import recipe_from_dict
from slim_core.service import QuantRequest
from slim_sd.captured.recorder import forward_parameters
from slim_sd.loading import open_transformer
from slim_sd.service import DiffusionService

ACT: dict[str, Any] = {"scope": "per_tensor", "dtype": "int8", "symmetric": False, "method": "minmax"}
WEIGHT: dict[str, Any] = {"scope": "per_channel", "dtype": "int8", "symmetric": True, "method": "minmax"}
LUMINA: dict[str, Any] = {
    "in_channels": 4,
    "hidden_size": 64,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "num_attention_heads": 2,
    "num_kv_heads": 2,
    "multiple_of": 16,
    "axes_dim_rope": (8, 12, 12),
    "axes_lens": (64, 64, 64),
    "cap_feat_dim": 32,
}
LATTE: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 2,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": 24,
    "num_embeds_ada_norm": 100,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "sample_size": 8,
    "video_length": 2,
}
SKIPPING: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "joint_attention_dim": 24,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 16,
    "pos_embed_max_size": 8,
}

Z_IMAGE: dict[str, Any] = {
    "in_channels": 4,
    "dim": 64,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 24,
    "axes_dims": [8, 12, 12],
    "axes_lens": [64, 64, 64],
}


def build(name: str, config: dict[str, Any], folder: Path) -> Path:
    """A model with a transformer and nothing else."""
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        getattr(diffusers, name)(**config).save_pretrained(folder / "transformer")
    index = {"_class_name": "DiffusionPipeline", "transformer": ["diffusers", name]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def quantize(model: Path, out: Path, calls: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Static, on calls that were written by hand; gives the scales of inputs."""
    from safetensors.torch import load_file

    parameters = forward_parameters(open_transformer(model, "transformer").module)
    kept = out.with_name("kept")
    kept.mkdir()
    torch.save([[call.get(name) for name in parameters] for call in calls], kept / "calib_data.pth")
    spec = {
        "process": [{"type": "linear_quant", "qconfig": {"act": ACT, "weight": WEIGHT}}],
        "multimodal_sd_config": {"dump_config": {"dump_data_dir": str(kept), "enable_dump": False}},
    }
    recipe = recipe_from_dict({"apiversion": "multimodal_sd_modelslim_v1", "spec": spec})
    request = QuantRequest(model_path=model, save_path=out, model_type="tiny", device="cpu")
    DiffusionService().quantize(request, recipe, SilentProgress())
    (file,) = out.glob("*.safetensors")
    return {name: value for name, value in load_file(file).items() if name.endswith("input_scale")}


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def largest_inputs(model: Path, calls: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Of every linear, as the plain forward of diffusers has them."""
    import diffusers

    name = json.loads((model / "transformer" / "config.json").read_text())["_class_name"]
    module: nn.Module = getattr(diffusers, name).from_pretrained(model / "transformer").eval()
    seen: dict[str, tuple[float, float]] = {}

    def note(linear: str, x: torch.Tensor) -> None:
        low, high = seen.get(linear, (0.0, 0.0))
        seen[linear] = min(low, float(x.min())), max(high, float(x.max()))

    for linear, part in module.named_modules():
        if isinstance(part, nn.Linear):
            part.register_forward_pre_hook(lambda _, given, linear=linear: note(linear, given[0]))
    with torch.no_grad():
        for call in calls:
            module(**call)
    return seen


def assert_scales(model: Path, calls: list[dict[str, Any]], scales: dict[str, torch.Tensor]) -> None:
    wanted = largest_inputs(model, calls)
    assert scales
    for name, scale in scales.items():
        low, high = wanted[name.removesuffix(".input_scale")]
        # Written as a number of bfloat16, with eight bits.
        assert float(scale) == pytest.approx((high - low) / 255, rel=2**-7)


@pytest.mark.usefixtures("no_plots")
def test_lists_are_in_the_order_of_the_forward(tmp_path: Path) -> None:
    """Lumina registers that of the picture first and runs that of the text first."""
    model = build("Lumina2Transformer2DModel", LUMINA, tmp_path / "model")
    assert open_transformer(model, "transformer").block_lists == ("context_refiner", "noise_refiner", "layers")
    calls = [
        {
            "hidden_states": drawn(1, 4, 8, 8),
            "timestep": torch.tensor([0.5]),
            "encoder_hidden_states": drawn(1, 5, 32),
            "encoder_attention_mask": torch.ones(1, 5, dtype=torch.bool),
        }
    ]
    scales = quantize(model, tmp_path / "out", calls)
    assert any(name.startswith("context_refiner.0.") for name in scales)
    assert_scales(model, calls, scales)


@pytest.mark.usefixtures("no_plots")
def test_layers_that_some_calls_skip(tmp_path: Path) -> None:
    """As SD3.5 is guided; only calls that run a block count for it."""
    model = build("SD3Transformer2DModel", SKIPPING, tmp_path / "model")
    call = {
        "hidden_states": drawn(1, 4, 8, 8),
        "encoder_hidden_states": drawn(1, 5, 24),
        "pooled_projections": drawn(1, 16),
        "timestep": torch.tensor([500.0]),
    }
    calls = [call | {"skip_layers": [1]}, call | {"hidden_states": 3 * call["hidden_states"], "skip_layers": [0]}, call]
    assert_scales(model, calls, quantize(model, tmp_path / "out", calls))


@pytest.mark.usefixtures("no_plots")
def test_lists_that_take_turns(tmp_path: Path) -> None:
    """A block of space, a block of time, and so on."""
    model = build("LatteTransformer3DModel", LATTE, tmp_path / "model")
    lists = ("transformer_blocks", "temporal_transformer_blocks")
    running = [unit.name for unit in open_transformer(model, "transformer").running]
    assert running == [f"{name}.{i}" for i in range(2) for name in lists]
    call = {
        "hidden_states": drawn(1, 4, 2, 8, 8),
        "timestep": torch.tensor([50]),
        "encoder_hidden_states": drawn(1, 5, 24),
    }
    assert_scales(model, [call], quantize(model, tmp_path / "out", [call]))


@pytest.mark.usefixtures("no_plots")
def test_latents_by_another_name_and_in_a_list(tmp_path: Path) -> None:
    model = build("ZImageTransformer2DModel", Z_IMAGE, tmp_path / "model")
    call = {"x": [drawn(4, 1, 8, 8)], "t": torch.tensor([0.5]), "cap_feats": [drawn(5, 24)]}
    assert_scales(model, [call], quantize(model, tmp_path / "out", [call]))


@pytest.mark.usefixtures("no_plots")
def test_another_order_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Slim does not know the order of lists, it says so."""
    monkeypatch.setattr("slim_sd.loading._IN_TURNS", frozenset())
    model = build("LatteTransformer3DModel", LATTE, tmp_path / "model")
    call = {
        "hidden_states": drawn(1, 4, 2, 8, 8),
        "timestep": torch.tensor([50]),
        "encoder_hidden_states": drawn(1, 5, 24),
    }
    with pytest.raises(SlimError, match=r"exclude the linear or quantize it per_token|run its blocks once each"):
        quantize(model, tmp_path / "out", [call])
    assert not (tmp_path / "out").exists()
