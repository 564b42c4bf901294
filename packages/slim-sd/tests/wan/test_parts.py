"""What surrounds an original Wan transformer: encoders against the original formulas, scheduler, tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor
from torch.nn import functional

from slim_core.errors import InvalidModelError, SecurityError, UnsupportedError
from slim_sd.wan import parts as wan_parts
from slim_sd.wan.pth_files import load_pth

PipelineFolder = Callable[..., Path]


def naive_bucket(distance: int, buckets: int, furthest: int = 128) -> int:
    """The bucket of a relative position, by its definition."""
    half = buckets // 2
    start = half if distance > 0 else 0
    distance = abs(distance)
    exact = half // 2
    if distance < exact:
        return start + distance
    far = exact + int(np.float32(np.log(distance / exact)) / np.log(furthest / exact) * (half - exact))
    return start + min(far, half - 1)


def naive_t5(tensors: dict[str, Tensor], ids: list[int], heads: int) -> Tensor:
    """The original encoder for one text without padding, in float64."""
    t = {name: value.double() for name, value in tensors.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * t[name]

    x = t["token_embedding.weight"][ids]
    count = len(ids)
    for block in range(2):
        p = f"blocks.{block}."
        table = t[p + "pos_embedding.embedding.weight"]
        bias = torch.stack(
            [torch.stack([table[naive_bucket(j - i, len(table))] for j in range(count)]) for i in range(count)]
        ).permute(2, 0, 1)
        y = norm(x, p + "norm1.weight")
        q, k, v = ((y @ t[f"{p}attn.{n}.weight"].T).reshape(count, heads, -1).transpose(0, 1) for n in "qkv")
        weights = torch.softmax(q @ k.transpose(1, 2) + bias, dim=-1)
        x = x + (weights @ v).transpose(0, 1).reshape(count, -1) @ t[p + "attn.o.weight"].T
        y = norm(x, p + "norm2.weight")
        gate = functional.gelu(y @ t[p + "ffn.gate.0.weight"].T, approximate="tanh")
        x = x + (gate * (y @ t[p + "ffn.fc1.weight"].T)) @ t[p + "ffn.fc2.weight"].T
    return norm(x, "norm.weight")


def naive_clip(tensors: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """The original image encoder without its last block, in float64."""
    t = {name.removeprefix("visual."): value.double() for name, value in tensors.items()}
    x = functional.conv2d(pixels.double(), t["patch_embedding.weight"], stride=14).flatten(2).transpose(1, 2)
    x = torch.cat([t["cls_embedding"], x], dim=1) + t["pos_embedding"]
    width = x.shape[-1]

    def norm(x: Tensor, name: str) -> Tensor:
        return functional.layer_norm(x, (width,), t[f"{name}.weight"], t[f"{name}.bias"], 1e-5)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    x = norm(x, "pre_norm")
    for block in range(2):
        p = f"transformer.{block}."
        q, k, v = linear(norm(x, p + "norm1"), p + "attn.to_qkv").reshape(1, -1, 3, 16, width // 16).unbind(2)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        weights = torch.softmax(q @ k.transpose(2, 3) / (width // 16) ** 0.5, dim=-1)
        x = x + linear((weights @ v).transpose(1, 2).reshape(1, -1, width), p + "attn.proj")
        x = x + linear(functional.gelu(linear(norm(x, p + "norm2"), p + "mlp.0")), p + "mlp.2")
    return x


def test_the_text_encoder_computes_the_original_formula(pipeline_folder: PipelineFolder) -> None:
    folder = pipeline_folder("wan2_1_t2v", layout="original")
    encoder = wan_parts.load_text_encoder(folder)
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    ids = [7, 40, 3, 99, 12, 40, 150, 1] * 5
    found = encoder(torch.tensor([ids])).last_hidden_state[0]
    expected = naive_t5(load_pth(folder / wan_parts.TEXT_ENCODER_FILE), ids, heads=4)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_image_encoder_computes_the_original_formula(pipeline_folder: PipelineFolder) -> None:
    folder = pipeline_folder("wan2_1_i2v", layout="original")
    encoder = wan_parts.load_image_encoder(folder)
    pixels = torch.randn((1, 3, 28, 28), generator=torch.Generator().manual_seed(3))
    found = encoder(pixels, output_hidden_states=True).hidden_states
    assert found is not None
    expected = naive_clip(load_pth(folder / wan_parts.CLIP_FILE), pixels)
    torch.testing.assert_close(found[-2].double(), expected, rtol=1e-4, atol=1e-4)
    processor = wan_parts.image_processor(encoder)
    assert processor.crop_size == {"height": 28, "width": 28}


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_dtypes(stored: torch.dtype, pipeline_folder: PipelineFolder) -> None:
    folder = pipeline_folder("wan2_1_i2v", layout="original", dtype=stored)
    for load in (wan_parts.load_text_encoder, wan_parts.load_image_encoder):
        assert {value.dtype for value in load(folder).parameters()} == {stored}
        assert {value.dtype for value in load(folder, torch.bfloat16).parameters()} == {torch.bfloat16}


def test_the_text_encoder_uses_the_pages_of_the_file(tmp_path: Path, pipeline_folder: PipelineFolder) -> None:
    file = tmp_path / wan_parts.TEXT_ENCODER_FILE
    shutil.copy(pipeline_folder("wan2_1_t2v", layout="original") / file.name, file)
    encoder = wan_parts.load_text_encoder(tmp_path)
    spans = [
        line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if str(file) in line
    ]
    ranges = [(int(begin, 16), int(end, 16)) for begin, end in spans]
    assert ranges
    for name, value in encoder.named_parameters():
        assert any(begin <= value.data_ptr() < end for begin, end in ranges), name


def test_the_tokenizer(tmp_path: Path, pipeline_folder: PipelineFolder) -> None:
    folder = pipeline_folder("wan2_1_t2v", layout="original")
    tokenizer = wan_parts.load_tokenizer(folder)
    ids = tokenizer("A red fox walks").input_ids
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "A red fox walks"
    with pytest.raises(InvalidModelError, match="tokenizer is missing"):
        wan_parts.load_tokenizer(tmp_path)
    (tmp_path / wan_parts.TOKENIZER_FOLDER).mkdir(parents=True)
    with pytest.raises(InvalidModelError, match="no tokenizer can be read"):
        wan_parts.load_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / wan_parts.TOKENIZER_FOLDER / name).write_text("{")
    with pytest.raises(InvalidModelError, match="no tokenizer can be read"):
        wan_parts.load_tokenizer(tmp_path)


LOADERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    wan_parts.TEXT_ENCODER_FILE: ("wan2_1_t2v", wan_parts.load_text_encoder),
    wan_parts.CLIP_FILE: ("wan2_1_i2v", wan_parts.load_image_encoder),
}


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        (wan_parts.TEXT_ENCODER_FILE, lambda t: t.pop("token_embedding.weight"), "token_embedding.weight' is missing"),
        (wan_parts.TEXT_ENCODER_FILE, lambda t: t.pop("blocks.1.ffn.fc2.weight"), "missing tensor .*1.*wo.weight"),
        (wan_parts.TEXT_ENCODER_FILE, lambda t: t.update(more=torch.ones(2)), "unexpected tensor 'more'"),
        (wan_parts.TEXT_ENCODER_FILE, lambda t: t.update({"norm.weight": torch.ones(3)}), "final_layer_norm|fit"),
        (
            wan_parts.TEXT_ENCODER_FILE,
            lambda t: t.update({"blocks.0.pos_embedding.embedding.weight": torch.ones(32, 5)}),
            "32 rows of q cannot be 5 heads",
        ),
        (wan_parts.CLIP_FILE, lambda t: t.pop("visual.pos_embedding"), "pos_embedding' is missing"),
        (wan_parts.CLIP_FILE, lambda t: t.pop("visual.transformer.2.mlp.2.bias"), "missing tensor .*fc2.bias"),
        (wan_parts.CLIP_FILE, lambda t: [t.pop(key) for key in list(t) if "visual" in key], "is missing"),
    ],
)
def test_files_that_are_something_else(
    name: str, change: Callable[[dict[str, Tensor]], Any], problem: str, tmp_path: Path, pipeline_folder: PipelineFolder
) -> None:
    family, load = LOADERS[name]
    tensors = load_pth(pipeline_folder(family, layout="original") / name)
    change(tensors)
    torch.save(tensors, tmp_path / name)
    with pytest.raises(InvalidModelError, match=problem) as caught:
        load(tmp_path)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("name", LOADERS)
def test_missing_truncated_and_hostile_files(name: str, tmp_path: Path, pipeline_folder: PipelineFolder) -> None:
    family, load = LOADERS[name]
    with pytest.raises(InvalidModelError, match="missing"):
        load(tmp_path)
    file = tmp_path / name
    content = (pipeline_folder(family, layout="original") / name).read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(InvalidModelError, match="not a complete"):
        load(tmp_path)
    torch.save({"norm.weight": Path("x")}, file)
    with pytest.raises(SecurityError, match="would run code"):
        load(tmp_path)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
def test_time_steps_of_flow_matching(shift: float) -> None:
    steps = 40
    unipc = wan_parts.flow_scheduler("unipc", shift)
    assert isinstance(unipc, UniPCMultistepScheduler)
    dpm = wan_parts.flow_scheduler("dpm++", shift)
    assert isinstance(dpm, DPMSolverMultistepScheduler)
    assert dpm.config.algorithm_type == "dpmsolver++"
    even = np.linspace(1, 0, steps, endpoint=False)  # the formula's levels of noise, over (0, 1]
    expected = 1000 * shift * even / (1 + (shift - 1) * even)
    for scheduler in (unipc, dpm):
        scheduler.set_timesteps(steps)
        assert len(scheduler.timesteps) == steps
        # The library's levels end at 1/1000 instead of 0 and are cut to whole numbers.
        np.testing.assert_allclose(scheduler.timesteps.numpy(), expected, atol=1 + shift)
        sample, velocity = torch.full((2, 2), 0.5), torch.full((2, 2), 0.25)
        moved = scheduler.step(velocity, scheduler.timesteps[0], sample).prev_sample
        # The first step is one of Euler: along the velocity, by the change of the level of noise.
        change = float(scheduler.sigmas[1] - scheduler.sigmas[0])
        torch.testing.assert_close(moved, sample + change * velocity, rtol=1e-3, atol=1e-4)


def test_shift_by_size() -> None:
    assert wan_parts.shift_for_size(832, 480) == wan_parts.shift_for_size(480, 832) == 3.0
    assert wan_parts.shift_for_size(1280, 720) == wan_parts.shift_for_size(720, 1280) == 5.0


def test_the_file_of_the_vae(tmp_path: Path) -> None:
    assert wan_parts.vae_file(tmp_path, 16) == tmp_path / "Wan2.1_VAE.pth"
    assert wan_parts.vae_file(tmp_path, 48) == tmp_path / "Wan2.2_VAE.pth"
    with pytest.raises(UnsupportedError, match="latents of 24 channels"):
        wan_parts.vae_file(tmp_path, 24)
