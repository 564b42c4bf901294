"""Mixtures of experts whose tensors are not those that config.json asks for, and models that bring Python code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

MODEL, UNSUPPORTED, SECURITY = "201 InvalidModelError", "301 UnsupportedError", "204 SecurityError"
FIRST, SECOND = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"
LINEARS = ("gate_proj", "up_proj", "down_proj")
OTHER = "do not belong together"

Change = Callable[[dict[str, Tensor]], object]


def mixture(change: Change = lambda t: None, **config: Any) -> Callable[..., None]:
    """Two blocks of four experts, stored one by one; ``change`` to its tensors, ``config`` to its configuration."""

    def make(w) -> None:
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

        torch.manual_seed(0)
        small = Qwen3MoeConfig(
            vocab_size=3072,
            hidden_size=16,
            intermediate_size=16,
            moe_intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=1,
            decoder_sparse_step=1,
        )
        Qwen3MoeForCausalLM(small).save_pretrained(w.model)
        w.change(change)
        w.configure(**config)

    return make


def drop(*names: str) -> Change:
    return lambda t: [t.pop(name) for name in names]


def stack(t: dict[str, Tensor], *paths: str) -> None:
    """Stacks of these experts, as transformers holds them, beside the single tensors."""
    for path in paths:
        halves = [[t[f"{path}.{e}.{name}.weight"] for name in LINEARS[:2]] for e in range(4)]
        t[f"{path}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in halves])
        t[f"{path}.down_proj"] = torch.stack([t[f"{path}.{e}.down_proj.weight"] for e in range(4)])


def drop_single(t: dict[str, Tensor], path: str) -> None:
    for expert in range(4):
        drop(*(f"{path}.{expert}.{name}.weight" for name in LINEARS))(t)


def stacked(change: Change) -> Change:
    def make(t: dict[str, Tensor]) -> None:
        stack(t, FIRST, SECOND)
        drop_single(t, FIRST)
        drop_single(t, SECOND)
        change(t)

    return make


def first_stacked(t: dict[str, Tensor]) -> None:
    stack(t, FIRST)
    drop_single(t, FIRST)


def cut(name: str, *at: slice) -> Change:
    return lambda t: t.update({name: t[name][at].clone()})


EXPERTS = {
    "a tensor missing": (
        mixture(drop(f"{SECOND}.2.up_proj.weight")),
        f"1 expert tensors are not in the checkpoint, among them '{SECOND}.2.up_proj.weight'",
        "a shard is missing",
    ),
    "all down projections missing": (
        mixture(drop(*(f"{FIRST}.{expert}.down_proj.weight" for expert in range(4)))),
        f"4 expert tensors are not in the checkpoint, among them '{FIRST}.0.down_proj.weight'",
        "a shard is missing",
    ),
    "all experts of a block missing": (
        mixture(lambda t: drop_single(t, FIRST)),
        f"12 tensors of the model are not in the checkpoint, among them '{FIRST}.0.gate_proj.weight'",
        "a shard is missing",
    ),
    "the last expert missing": (
        mixture(drop(*(f"{FIRST}.3.{name}.weight" for name in LINEARS))),
        f"config.json asks for 4 experts in {FIRST}, the checkpoint has 3",
        OTHER,
    ),
    "config.json asks for fewer": (
        mixture(num_local_experts=2),
        f"config.json asks for 2 experts in {FIRST}, the checkpoint has 4",
        OTHER,
    ),
    "config.json asks for more": (
        mixture(num_local_experts=8),
        f"config.json asks for 8 experts in {FIRST}, the checkpoint has 4",
        OTHER,
    ),
    "a router for fewer": (
        mixture(cut("model.layers.0.mlp.gate.weight", slice(3))),
        "tensor 'model.layers.0.mlp.gate.weight' has shape [3, 16], config.json asks for [4, 16]",
        OTHER,
    ),
    "an expert turned round": (
        mixture(lambda t: t.update({f"{FIRST}.1.up_proj.weight": t[f"{FIRST}.1.up_proj.weight"].T.contiguous()})),
        f"tensor '{FIRST}.1.up_proj.weight' has shape [16, 24], config.json asks for [24, 16]",
        OTHER,
    ),
    "one by one and stacked": (
        mixture(lambda t: stack(t, FIRST, SECOND)),
        f"stores experts both one by one ('{FIRST}.0.gate_proj.weight') and stacked ('{FIRST}.gate_up_proj')",
        "remove the left-over shards",
    ),
    "one block stacked": (
        mixture(first_stacked),
        f"stores experts both one by one ('{SECOND}.0.gate_proj.weight') and stacked ('{FIRST}.gate_up_proj')",
        "remove the left-over shards",
    ),
    "a stack missing": (
        mixture(stacked(drop(f"{SECOND}.down_proj"))),
        f"'{SECOND}.down_proj' is not in the checkpoint",
        "a shard is missing",
    ),
    "a stack of fewer": (
        mixture(stacked(cut(f"{FIRST}.down_proj", slice(3)))),
        f"config.json asks for 4 experts in {FIRST}, '{FIRST}.down_proj' has 3",
        OTHER,
    ),
    "a narrow stack": (
        mixture(stacked(cut(f"{FIRST}.down_proj", slice(None), slice(None), slice(20)))),
        f"'{FIRST}.down_proj' [16, 20]; config.json asks for [48, 16], [16, 24]",
        OTHER,
    ),
}


@pytest.mark.parametrize(("fault", "what", "remedy"), EXPERTS.values(), ids=EXPERTS)
def test_experts(workplace, refused, fault: Callable[..., object], what: str, remedy: str) -> None:
    fault(workplace)
    refused(MODEL, what, "{model}", remedy)


def test_nothing_is_broken_to_begin_with(workplace) -> None:
    mixture()(workplace)
    assert workplace.run("--force").exit_code == 0


CONFIG_CLASS = (
    "from transformers import PretrainedConfig\n\n\nclass Config(PretrainedConfig):\n    model_type = 'mine'\n"
)


@pytest.fixture
def workplace(workplace):
    """transformers copies the code that it runs into a folder of its own."""
    workplace.patch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(workplace.folder.parent / "copies")
    )
    workplace.patch.setattr(sys, "path", list(sys.path))
    return workplace


def brings(code: str | None, trust: str | None = "True", model_type: str = "mine", **auto_map: object):
    """A model whose config.json names classes of ``mine.py``, which says ``code``."""

    def make(w) -> None:
        named = auto_map or {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
        w.configure(model_type=model_type, auto_map=named)
        w.options.update(trust_remote_code=trust)
        if code is not None:
            (w.model / "mine.py").write_text(code)

    return make


JSON, FILE = "{model}/config.json", "{model}/mine.py"
DOWNLOAD = "download the Python files of the model too"
COMPLETE = "install what the code asks for"
CODE: dict[str, tuple[Any, ...]] = {
    "not trusted": (
        brings(CONFIG_CLASS, trust=None),
        SECURITY,
        "needs Python code that ships with it",
        JSON,
        "--trust_remote_code True",
    ),
    "not trusted in so many words": (
        brings(CONFIG_CLASS, trust="False"),
        SECURITY,
        "needs Python code that ships with it",
        JSON,
        "--trust_remote_code True",
    ),
    "not there": (
        brings(None),
        MODEL,
        "auto_map.AutoConfig needs mine.py, which is not in the folder",
        JSON,
        DOWNLOAD,
    ),
    "the model not there": (
        brings(CONFIG_CLASS, AutoConfig="mine.Config", AutoModelForCausalLM="theirs.Model"),
        MODEL,
        "auto_map.AutoModelForCausalLM needs theirs.py, which is not in the folder",
        JSON,
        DOWNLOAD,
    ),
    "not there, and not needed": (
        brings(None, model_type="qwen3"),
        MODEL,
        "auto_map.AutoConfig needs mine.py, which is not in the folder",
        JSON,
        "pass --trust_remote_code False: transformers has this model too",
    ),
    "of another repository": (
        brings(CONFIG_CLASS, AutoConfig="someone/repo--mine.Config", AutoModelForCausalLM="mine.Model"),
        SECURITY,
        "auto_map.AutoConfig names code of another repository ('someone/repo')",
        JSON,
        "write 'mine.Config' there",
    ),
    "outside the folder": (
        brings(CONFIG_CLASS, AutoConfig="../mine.Config"),
        MODEL,
        "auto_map.AutoConfig is '../mine.Config'",
        JSON,
        "download it again",
    ),
    "a number": (brings(None, AutoConfig=7), MODEL, "auto_map.AutoConfig is 7", JSON, "download it again"),
    "no causal model": (
        brings(CONFIG_CLASS, AutoConfig="mine.Config", AutoModel="mine.Model"),
        UNSUPPORTED,
        "auto_map does not name AutoModelForCausalLM",
        JSON,
        "only causal language models",
    ),
    "no such class": (
        brings(CONFIG_CLASS),
        MODEL,
        "the code that ships with the model fails: AttributeError | has no attribute 'Model'",
        "{model}",
        COMPLETE,
    ),
    "no Python": (
        brings(f"{CONFIG_CLASS}\ndef (\n"),
        MODEL,
        "the code that ships with the model fails: SyntaxError",
        f"{FILE}:7",
        COMPLETE,
    ),
    "fails": (
        brings(f"{CONFIG_CLASS}\nraise RuntimeError('boom')\n"),
        MODEL,
        "the code that ships with the model fails: RuntimeError: boom",
        f"{FILE}:7",
        COMPLETE,
    ),
    "ends the process": (
        brings(f"import sys\n{CONFIG_CLASS}\nsys.exit(3)\n"),
        MODEL,
        "the code that ships with the model fails: SystemExit: 3",
        f"{FILE}:8",
        COMPLETE,
    ),
}


@pytest.mark.parametrize(("fault", "kind", "what", "where", "remedy"), CODE.values(), ids=CODE)
def test_own_code(workplace, refused, fault: Callable[..., object], kind, what, where, remedy) -> None:
    fault(workplace)
    refused(kind, what, where, remedy)


def test_auto_map_that_is_a_list(workplace, refused) -> None:
    workplace.configure(model_type="mine", auto_map=["mine.Config"])
    workplace.options.update(trust_remote_code="True")
    refused(MODEL, "auto_map is no object, but ['mine.Config']", JSON, "download it again")


def test_a_package_that_its_code_needs(workplace) -> None:
    """transformers says so too, before Slim does."""
    brings(f"import a_package_that_nobody_has\n{CONFIG_CLASS}")(workplace)
    before = workplace.listing()
    found = workplace.run()
    assert found.exit_code == 1
    assert "the code that ships with the model fails: ImportError" in found.stderr
    assert "pip install a_package_that_nobody_has" in found.stderr
    assert workplace.listing() == before


def test_code_that_is_right_is_used(workplace) -> None:
    """The same model under a name that transformers does not know."""
    config = "class Config(Qwen3Config):\n    model_type = 'mine'\n"
    model = "class Model(Qwen3ForCausalLM):\n    config_class = Config\n"
    brings(f"from transformers import Qwen3Config, Qwen3ForCausalLM\n\n\n{config}\n\n{model}")(workplace)
    found = workplace.run()
    assert found.exit_code == 0, found.output
    assert (workplace.save / "mine.py").exists()
