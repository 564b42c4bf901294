"""Folders of diffusion models that are not whole, or are no such folders.

A row: what is done to a workplace where all is right, and kind, words, place and way out of the message.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

MODEL, SECURITY, UNSUPPORTED = "201 InvalidModelError", "204 SecurityError", "301 UnsupportedError"
EXAMPLE = Path(__file__).parents[3] / "examples" / "tiny-qwen3"
AGAIN = "download the folder again"
TOGETHER = "do not belong together"
T5, VAE = "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"
NEITHER = "no diffusion model: neither model_index.json (Diffusers layout) nor the config.json of a WanModel"


class Command:
    """What runs a command when it is unpickled."""

    def __reduce__(self) -> object:
        return os.system, ("touch pwned",)


def without(*names: str) -> Callable[..., None]:
    """Remove files or folders of the model."""

    def change(w) -> None:
        for name in names:
            path = w.model / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def original(change: Callable[..., object], name: str = "wan2_1_t2v") -> Callable[..., None]:
    """The original layout, with a fault."""

    def both(w) -> None:
        w.become(name, layout="original")
        change(w)

    return both


def emptied(name: str) -> Callable[..., None]:
    return lambda w: [path.unlink() for path in (w.model / name).iterdir()] and None


def pointed_at(name: str) -> Callable[..., None]:
    return lambda w: w.options.update(model_path=str(w.folder / name))


def cut(w) -> None:
    raw = (w.model / T5).read_bytes()
    (w.model / T5).write_bytes(raw[:5000])


def become_text_model(w) -> None:
    shutil.rmtree(w.model)
    shutil.copytree(EXAMPLE, w.model)


def become_output(w) -> None:
    """Take a folder that Slim has written for the model."""
    assert w.run().exit_code == 0
    w.save.rename(w.folder / "quantized")
    w.options["model_path"] = str(w.folder / "quantized")


MODELS = {
    "no folder": (
        pointed_at("nothing"),
        MODEL,
        "does not exist or is not a folder",
        "{folder}/nothing",
        "--model_path",
    ),
    "empty folder": (
        lambda w: (shutil.rmtree(w.model), w.model.mkdir()),
        MODEL,
        NEITHER,
        "{model}",
        "check --model_path",
    ),
    "a language model": (become_text_model, MODEL, NEITHER, "{model}", "check --model_path"),
    "the transformer alone": (
        pointed_at("model/transformer"),
        MODEL,
        NEITHER + " | it is one component of a pipeline",
        "{model}/transformer",
        "point --model_path to the folder that holds all components",
    ),
    "an output of Slim": (
        become_output,
        UNSUPPORTED,
        "this folder holds a quantized checkpoint",
        "{folder}/quantized/quant_model_description_w8a8.json",
        "start from the original",
    ),
    "a quantized transformer": (
        lambda w: (w.config.parent / "quant_model_description_w8a8.json").write_text("{}"),
        UNSUPPORTED,
        "this folder holds a quantized checkpoint",
        "{model}/transformer/quant_model_description_w8a8.json",
        "start from the original",
    ),
    "quantized by another tool": (
        lambda w: w.configure(quantization_config={"quant_method": "bitsandbytes"}),
        UNSUPPORTED,
        "the source is already quantized",
        "{model}/transformer/config.json",
        "start from the original",
    ),
    "broken index": (
        lambda w: (w.model / "model_index.json").write_text("{"),
        MODEL,
        "not a JSON object | line 1 column 2",
        "{model}/model_index.json",
        AGAIN,
    ),
    "no transformer": (
        lambda w: w.set_index(transformer=None),
        UNSUPPORTED,
        "WanPipeline has no transformer; its components are scheduler, text_encoder, tokenizer, vae",
        "{model}/model_index.json",
        "only pipelines whose denoiser is a transformer",
    ),
    "unknown pipeline": (
        lambda w: w.set_index(_class_name="WonPipeline"),
        UNSUPPORTED,
        "has no pipeline 'WonPipeline'",
        "{model}/model_index.json",
        "install the version of diffusers",
    ),
    "unknown class": (
        lambda w: w.configure(_class_name="WanTransformer9DModel"),
        UNSUPPORTED,
        "has no model 'WanTransformer9DModel'",
        "{model}/transformer/config.json",
        "upgrade diffusers",
    ),
    "code that comes with the model": (
        lambda w: w.set_index(text_encoder=["mine", "Mine"]),
        UNSUPPORTED,
        "component 'text_encoder' is a Mine of 'mine'",
        "{model}/model_index.json",
        "use a folder without it",
    ),
    **{
        f"no folder {name}": (
            without(name),
            MODEL,
            f"the folder of component '{name}' | is missing",
            f"{{model}}/{name}",
            AGAIN,
        )
        for name in ("transformer", "text_encoder", "vae", "scheduler")
    },
    "no weights": (
        without("transformer/diffusion_pytorch_model.safetensors"),
        MODEL,
        "no safetensors weights",
        "{model}/transformer",
        "--model_path",
    ),
    "no weights of the VAE": (
        without("vae/diffusion_pytorch_model.safetensors"),
        MODEL,
        "component 'vae' (AutoencoderKLWan) cannot be loaded",
        "{model}/vae",
        AGAIN,
    ),
    "no files of the tokenizer": (
        emptied("tokenizer"),
        MODEL,
        "component 'tokenizer' (T5Tokenizer) cannot be loaded: it makes the same of every text",
        "{model}/tokenizer",
        AGAIN,
    ),
    "broken scheduler": (
        lambda w: (w.model / "scheduler" / "scheduler_config.json").write_text("[]"),
        MODEL,
        "component 'scheduler' (UniPCMultistepScheduler) cannot be loaded",
        "{model}/scheduler",
        AGAIN,
    ),
    "no configuration": (
        without("transformer/config.json"),
        MODEL,
        "config.json cannot be read: No such file",
        "{model}/transformer",
        AGAIN,
    ),
    "broken configuration": (
        lambda w: w.config.write_text("{"),
        MODEL,
        "is not a JSON object | line 1 column 2",
        "{model}/transformer/config.json",
        AGAIN,
    ),
    "no heads": (
        lambda w: w.configure(num_attention_heads=0),
        MODEL,
        "diffusers cannot build the model: ZeroDivisionError",
        "{model}/transformer/config.json",
        "correct the file",
    ),
    "more blocks than weights": (
        lambda w: w.configure(num_layers=3),
        MODEL,
        "27 tensors of the model are not in the checkpoint, among them 'blocks.2.modulation'",
        "{model}/transformer",
        TOGETHER,
    ),
    "fewer blocks than weights": (
        lambda w: w.configure(num_layers=1),
        MODEL,
        "the checkpoint has 'blocks.1. | by config.json there are 1 blocks",
        "{model}/transformer",
        TOGETHER,
    ),
    "another width": (
        lambda w: w.configure(ffn_dim=64),
        MODEL,
        "tensor 'blocks.0.ffn.0.weight' has shape [128, 64], config.json asks for [64, 64]",
        "{model}/transformer",
        TOGETHER,
    ),
    "truncated weights": (
        lambda w: w.weights.write_bytes(w.weights.read_bytes()[:-100]),
        MODEL,
        "the file is truncated",
        "{weights}",
        "download the file again",
    ),
    "original, no text encoder": (
        original(without(T5)),
        MODEL,
        "the file is missing",
        f"{{model}}/{T5}",
        "download the model folder again",
    ),
    "original, no VAE": (
        original(without(VAE)),
        MODEL,
        "the file is missing",
        f"{{model}}/{VAE}",
        "download the model folder again",
    ),
    "original, no tokenizer": (
        original(without("google")),
        MODEL,
        "the folder of the tokenizer is missing",
        "{model}/google/umt5-xxl",
        "download the model folder again",
    ),
    "original, truncated text encoder": (
        original(cut),
        MODEL,
        "not a complete .pth file: the end of the archive is missing",
        f"{{model}}/{T5}",
        "download the file again",
    ),
    "original, text encoder with a command": (
        original(lambda w: torch.save(Command(), w.model / T5)),
        SECURITY,
        "unpickling it would run code, so it is refused",
        f"{{model}}/{T5}",
        "get the file from its publisher",
    ),
    "original, one expert of two": (
        original(without("low_noise_model"), "wan2_2_t2v"),
        MODEL,
        "low_noise_model/config.json is missing, though the other expert is there",
        "{model}",
        "download both",
    ),
}


@pytest.mark.parametrize(("fault", "kind", "what", "where", "remedy"), MODELS.values(), ids=MODELS)
def test_models(workplace, refused, fault: Callable[..., object], kind, what, where, remedy) -> None:
    fault(workplace)
    workplace.fill_save()
    refused(kind, what, where, remedy, "--overwrite")
    assert not (workplace.folder / "pwned").exists()


@pytest.mark.parametrize("folder", ["text_encoder", "vae", "tokenizer"])
def test_what_only_a_pipeline_needs_may_be_empty_where_none_runs(workplace, folder: str) -> None:
    emptied(folder)(workplace)
    workplace.need_no_data()
    found = workplace.run()
    assert found.exit_code == 0, found.output


def test_bad_numbers_in_a_weight(workplace, refused) -> None:
    """Found while its block is quantized."""
    workplace.fill_save()
    workplace.need_no_data()
    workplace.change(lambda tensors: tensors["blocks.1.attn1.to_q.weight"][2].fill_(float("nan")))
    what = "the weight holds NaN or infinity in row 2"
    refused(MODEL, what, "blocks.1.self_attn.q.weight", "repair the checkpoint", "--overwrite", resumable=True)


def test_bad_numbers_spread_through_the_pipeline(workplace, refused) -> None:
    """Found in what the second call is given; nothing of the capture is kept."""
    workplace.fill_save()
    workplace.change(lambda tensors: tensors["blocks.0.attn1.to_q.weight"].fill_(float("nan")))
    what = "call 2, argument hidden_states: a calibration input has NaN"
    refused("202 InvalidDatasetError", what, "WanTransformer3DModel.forward", "the pipeline itself", "--overwrite")
