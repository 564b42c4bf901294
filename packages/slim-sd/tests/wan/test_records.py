"""Calls of the original Wan project, translated: against diffusers' pipeline, and against the original arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor

from slim_core.errors import InvalidDatasetError, SlimError, UnsupportedError
from slim_sd.captured.recorder import Recorder, forward_parameters
from slim_sd.captured.records import Records, open_records
from slim_sd.wan.records import from_original, is_original

_TOKENS = 2 * 2 * 2  # of latents (16, 2, 4, 4)


def _transformer(**changes: Any) -> WanTransformer3DModel:
    config: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16, "out_channels": 16}
    config |= {"text_dim": 8, "freq_dim": 16, "ffn_dim": 24, "num_layers": 1, "rope_max_seq_len": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return WanTransformer3DModel(**(config | changes)).eval()


def _open(path: Path, **changes: Any) -> Records:
    config = {"in_channels": 16, "text_dim": 8, "patch_size": (1, 2, 2)}
    given: dict[str, Any] = {"parameters": _NAMES, "fingerprint": "f", "settings": {}, "config": config}
    return open_records(path, **(given | changes))


_NAMES = forward_parameters(_transformer())


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _original(**changes: Any) -> list[Any]:
    """Arguments of the original forward (Wan2.1): two videos, texts of 3 and 5 tokens."""
    call = {
        "x": [_random(16, 2, 4, 4, seed=1), _random(16, 2, 4, 4, seed=2)],
        "t": torch.tensor([900, 900]),
        "context": [_random(3, 8, seed=3), _random(5, 8, seed=4)],
        "seq_len": _TOKENS,
        "clip_fea": None,
        "y": None,
    }
    return list((call | changes).values())


def test_a_pipeline_in_the_original_form(tmp_path: Path) -> None:
    """Calls of diffusers' pipeline, put into the form of the original project, come back as they were."""
    transformer = _transformer()
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipeline = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=transformer)
    pipeline.set_progress_bar_config(disable=True)
    texts = [_random(7, 8, seed=5), _random(2, 8, seed=6)]
    # what the pipeline makes of a text: its embeddings, zeros up to 512 tokens
    prompt, negative = (F.pad(text, (0, 0, 0, 512 - len(text)))[None] for text in texts)
    path = tmp_path / "diffusers.pth"
    with Recorder(transformer, path, fingerprint="f", settings={}):
        pipeline(
            prompt_embeds=prompt,
            negative_prompt_embeds=negative,
            height=32,
            width=32,
            num_frames=5,
            num_inference_steps=3,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        )
    captured = _open(path)
    original = [
        [list(call["hidden_states"]), call["timestep"], [texts[index % 2]], _TOKENS, None, None]
        for index, call in enumerate(captured)
    ]
    torch.save(original, tmp_path / "calib_data.pth")
    translated = _open(tmp_path / "calib_data.pth")
    assert len(translated) == len(captured) == 6
    for one, other in zip(translated, captured, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert torch.equal(one[name], value) if isinstance(value, Tensor) else one[name] is value
            assert not isinstance(value, Tensor) or one[name].dtype == value.dtype
    assert translated.steps() == captured.steps() == [[0, 1], [2, 3], [4, 5]]
    assert [call["timestep"].item() for call in translated.evenly(2)] == [
        call["timestep"].item() for call in captured.evenly(2)
    ]


def _naive(model: Any, x: list[Tensor], t: Tensor, context: list[Tensor], clip: Tensor | None, y: Any) -> list[Tensor]:
    """The original forward up to the first block, and the rest, by the weights of diffusers' model.

    As the original project does it: every video is embedded on its own, channels of ``y`` put behind those of ``x``;
    texts are padded after nothing else; embeddings of an image go before those of the text.
    """
    if y is not None:
        x = [torch.cat([u, v], dim=0) for u, v in zip(x, y, strict=True)]
    embedded = torch.cat([model.patch_embedding(u[None]).flatten(2).transpose(1, 2) for u in x])
    text = torch.stack([torch.cat([u, u.new_zeros(512 - u.size(0), u.size(1))]) for u in context])
    condition = model.condition_embedder
    text = condition.text_embedder(text)
    if clip is not None:
        text = torch.cat([condition.image_embedder(clip), text], dim=1)
    half = 8
    frequencies = torch.pow(10000, -torch.arange(half, dtype=torch.float64) / half)
    angles = torch.outer(t.flatten().double(), frequencies)
    wave = torch.cat([torch.cos(angles), torch.sin(angles)], dim=1).float()
    e = condition.time_embedder(wave)
    e0 = condition.time_proj(F.silu(e)).unflatten(1, (6, -1))
    hidden = model.blocks[0](embedded, text, e0, model.rope(torch.stack(x)))
    shift, scale = (model.scale_shift_table + e.unsqueeze(1)).chunk(2, dim=1)
    hidden = model.proj_out(model.norm_out(hidden) * (1 + scale) + shift)
    videos: list[Tensor] = []
    for u in hidden:
        grid = u.view(2, 2, 2, 1, 2, 2, 16)  # frames, height, width, then the patch (1, 2, 2), then channels
        videos.append(torch.einsum("fhwpqrc->cfphqwr", grid).reshape(16, 2, 4, 4))
    return videos


@pytest.mark.parametrize("kind", ["t2v", "i2v of Wan2.1", "i2v of Wan2.2"])
def test_computes_what_the_original_forward_did(tmp_path: Path, kind: str) -> None:
    changes: dict[str, Any] = {}
    model = _transformer()
    if kind != "t2v":
        changes["y"] = [_random(20, 2, 4, 4, seed=7), _random(20, 2, 4, 4, seed=8)]
        model = _transformer(in_channels=36)
    if kind == "i2v of Wan2.1":
        changes["clip_fea"] = _random(2, 257, 10, seed=9)
        model = _transformer(in_channels=36, image_dim=10, added_kv_proj_dim=24)
    record = _original(**changes)
    if kind == "i2v of Wan2.2":  # has no clip_fea
        del record[4]
    torch.save([record], tmp_path / "calib_data.pth")
    call = _open(tmp_path / "calib_data.pth", config={"in_channels": model.config.in_channels, "text_dim": 8})[0]
    with torch.no_grad():
        found = model(**call)[0]
        expected = _naive(model, *record[:3], changes.get("clip_fea"), changes.get("y"))
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_a_time_for_every_token() -> None:
    """Wan2.2 TI2V; the sequence is longer than the tokens where devices share it."""
    times = torch.arange(24.0).reshape(2, 12)
    call = from_original(_original(t=times, seq_len=12), "here", _NAMES)
    assert torch.equal(call["timestep"], times[:, :_TOKENS])
    model = _transformer()
    with torch.no_grad():
        assert model(**call)[0].shape == (2, 16, 2, 4, 4)


def test_types_are_those_of_the_transformer() -> None:
    record = _original(clip_fea=_random(2, 257, 10), y=[_random(4, 2, 4, 4)] * 2)
    call = from_original(record, "here", _NAMES, dtype=torch.bfloat16)
    assert {name: value.dtype for name, value in call.items() if isinstance(value, Tensor)} == {
        "hidden_states": torch.bfloat16,
        "timestep": torch.int64,
        "encoder_hidden_states": torch.bfloat16,
        "encoder_hidden_states_image": torch.bfloat16,
    }
    assert call["hidden_states"].shape == (2, 20, 2, 4, 4)
    assert torch.equal(call["hidden_states"][:, :16], torch.stack(record[0]).bfloat16())
    assert from_original(_original(), "here", _NAMES, text_length=7)["encoder_hidden_states"].shape == (2, 7, 8)


def test_what_is_an_original_call() -> None:
    assert is_original(_original())
    assert is_original(_original()[:4])
    assert not is_original([_random(1, 16, 2, 4, 4), torch.tensor([1]), _random(1, 512, 8), None, False, None])
    assert not is_original([[], torch.tensor([1]), [], 8])
    assert not is_original(_original()[:3])


def test_arguments_of_other_projects_are_ignored_unless_they_hold_tensors() -> None:
    call = from_original([*_original(), 3, None, "cond", [1, {"a": 2}]], "here", _NAMES)
    assert set(call) == set(_NAMES)
    for extra in (_random(2), [_random(2)], {"a": (_random(1),)}):
        with pytest.raises(UnsupportedError, match="argument 6 of the original Wan project's call is not known"):
            from_original([*_original(), extra], "here", _NAMES)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"x": [_random(16, 2, 4, 4), _random(16, 1, 4, 4)]}, "differ in size"),
        ({"context": [_random(3, 8)]}, "not as many as its texts"),
        ({"context": [_random(513, 8), _random(3, 8)]}, "a text of 513 tokens where the model takes 512"),
        ({"context": [_random(3, 9), _random(3, 8)]}, "differ in width"),
        ({"t": torch.tensor([900])}, "1 time steps for 2 videos"),
        ({"t": torch.zeros(2, 7)}, r"shape \[2, 7\] for 8 tokens"),
        ({"y": [_random(20, 2, 4, 4)]}, "x and y do not have the same sizes"),
        ({"y": [_random(20, 2, 4, 5)] * 2}, "x and y do not have the same sizes"),
        ({"clip_fea": _random(2, 257, 10), "y": "text"}, None),
    ],
)
def test_calls_that_do_not_fit_together(tmp_path: Path, changes: dict[str, Any], reason: str | None) -> None:
    """They are refused when the file is opened."""
    torch.save([_original(), _original(**changes)], tmp_path / "calib_data.pth")
    if reason is None:
        assert len(_open(tmp_path / "calib_data.pth")) == 2
        return
    with pytest.raises(SlimError, match=reason) as caught:
        _open(tmp_path / "calib_data.pth")
    assert caught.value.where == f"{tmp_path / 'calib_data.pth'}, record 1"


def test_calls_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "calib_data.pth"
    torch.save([_original()], path)
    with pytest.raises(InvalidDatasetError, match="36 channels"):
        _open(path, config={"in_channels": 36, "text_dim": 8})
    with pytest.raises(InvalidDatasetError, match="4096 numbers per token"):
        _open(path, config={"in_channels": 16, "text_dim": 4096})
    with pytest.raises(UnsupportedError, match="takes no timestep"):
        _open(path, parameters=["hidden_states", "encoder_hidden_states"])
    torch.save([_original(clip_fea=_random(2, 257, 10))], path)
    with pytest.raises(UnsupportedError, match="embeddings of an image"):
        _open(path, parameters=["hidden_states", "timestep", "encoder_hidden_states"])


def test_calls_of_different_length(tmp_path: Path) -> None:
    torch.save([_original(), _original()[:5]], tmp_path / "calib_data.pth")
    with pytest.raises(InvalidDatasetError, match="record 1 has 5 arguments"):
        _open(tmp_path / "calib_data.pth")
