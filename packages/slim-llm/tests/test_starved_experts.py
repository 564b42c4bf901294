"""Experts that few or no calibration tokens reach: counted, helped as far as the recipe asks, and quantized by rule."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from slim_core.evaluation.verify import verify_folder
from slim_core.model.experts import expert_layers
from slim_core.model.streamed import StreamedModel
from slim_core.processors.linear_quant import LinearQuant
from slim_core.progress import SilentProgress
from slim_core.quantization.statistics import InputObserver
from slim_core.recipe import recipe_from_dict
from slim_core.runners.calibration import BlockForwards
from slim_core.runners.expert_tokens import NOTHING_LEARNT, ExpertTokens
from slim_core.runners.plan_text import render_summary
from slim_core.runners.records import ExpertRecord, StarvedExpert
from slim_core.runners.run import RunResult
from slim_core.service import QuantRequest
from slim_llm.calibration import read_samples, tokenize, tokenize_extra
from slim_llm.models.loading import open_model
from slim_llm.service import LlmService

CPU = torch.device("cpu")
ModelFolder = Callable[..., Path]
WEIGHT: dict[str, Any] = {"dtype": "int8", "scope": "per_channel", "symmetric": True}
STATIC: dict[str, Any] = {"dtype": "int8", "scope": "per_tensor", "symmetric": False}
TOKEN: dict[str, Any] = {"dtype": "int8", "scope": "per_token", "symmetric": True}
RANGE = "input range of all experts of its layer"
NEAREST = "weight rounded to nearest"


def linear(act: dict[str, Any] | None, weight: dict[str, Any] = WEIGHT) -> dict[str, Any]:
    return {"type": "linear_quant", "qconfig": {"weight": weight} | ({"act": act} if act else {})}


def rounding(act: dict[str, Any]) -> dict[str, Any]:
    strategy = {"qconfig": {"act": act, "weight": WEIGHT | {"method": "autoround"}}}
    return {"type": "autoround_quant", "iters": 1, "strategies": [strategy]}


def run(model: Path, out: Path, process: list[dict[str, Any]], dataset: dict[str, Any], **options: Any) -> RunResult:
    resume = options.pop("resume", False)
    on_plan = options.pop("on_plan", None)
    spec = {"process": process, "save": [{"type": "ascendv1_saver"}], "dataset": dataset, **options}
    return LlmService().quantize(
        QuantRequest(model_path=model, save_path=out, model_type="tiny", device="cpu", force=True, resume=resume),
        recipe_from_dict({"apiversion": "modelslim_v1", "spec": spec}),
        SilentProgress(),
        on_plan,
    )


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short samples, each of other words than the others."""
    path = tmp_path_factory.mktemp("texts") / "texts.json"
    words = Path(__file__).read_text().split()
    path.write_text(json.dumps([" ".join(words[7 * i : 7 * i + 7]) for i in range(40)]))
    return path


def inputs_of(model: Path, texts: Path, **dataset: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Token ids of the main and of the extra samples."""
    spec = recipe_from_dict({"apiversion": "modelslim_v1", "spec": {"dataset": {"path": str(texts), **dataset}}}).spec()
    tokenizer = AutoTokenizer.from_pretrained(model)
    samples = read_samples(texts)
    main = tokenize(samples, tokenizer, spec.dataset, 64)
    extra = tokenize_extra(samples, tokenizer, spec.dataset, 64, main)
    return [given["input_ids"] for given in main], [given["input_ids"] for given in extra]


Layers = dict[str, list[tuple[Tensor, Tensor]]]


def observed(folder: Path, ids: list[Tensor]) -> Layers:
    """For each layer of stacked experts of transformers, by sample: what they were given and which each token went to.

    Rows of the second are tokens, columns experts.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    found: Layers = {}

    def see(name: str, args: tuple[Tensor, ...]) -> None:
        if len(args) == 1:  # all tokens once for every expert
            given = args[0].view(16, -1, args[0].shape[-1])
            found.setdefault(name, []).append((given, (given != 0).any(-1).T))
        else:
            went = torch.zeros(len(args[0]), 64, dtype=torch.bool).scatter_(1, args[1], True)
            found.setdefault(name, []).append((args[0], went))

    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(lambda _module, args, name=name: see(name, args))
    with torch.no_grad():
        for given in ids:
            model(input_ids=given, use_cache=False)
    return found


@pytest.mark.parametrize("family", ["qwen3_moe_16", "gpt_oss_16", "llama4_16", "deepseek_v3", "longcat"])
def test_counts_are_those_of_the_library(model_folder: ModelFolder, texts: Path, tmp_path: Path, family: str) -> None:
    folder = model_folder(family, torch.float32)
    result = run(folder, tmp_path / "out", [linear(STATIC)], {"path": str(texts), "num_samples": 5})
    main, _ = inputs_of(folder, texts, num_samples=5)
    want = {name: sum(went for went in [w.sum(0) for _, w in s]) for name, s in observed(folder, main).items()}
    assert {record.name for record in result.experts} == set(want)
    for record in result.experts:
        assert list(record.counts) == want[record.name].tolist()[: len(record.counts)]
        assert [one.expert for one in record.starved] == [i for i, count in enumerate(record.counts) if not count]
    assert result.block_forwards == 5 * len(open_model(folder).blocks)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [(layer["name"], layer["counts"]) for layer in report["experts"]] == [
        (record.name, list(record.counts)) for record in result.experts
    ]


@pytest.mark.parametrize("family", ["qwen3_moe_16", "gpt_oss_16", "llama4_16", "jetmoe"])
def test_watching_and_routing_change_nothing_that_is_computed(
    model_folder: ModelFolder, texts: Path, family: str
) -> None:
    folder = model_folder(family)
    ids, _ = inputs_of(folder, texts, num_samples=3)

    def outputs(*, watch: bool) -> Iterator[Tensor]:
        model: StreamedModel = open_model(folder)
        inputs = [{"input_ids": given, "use_cache": False} for given in ids]
        with torch.no_grad(), BlockForwards(model, inputs, CPU) as forwards:
            for unit in model.running:
                forwards.reach(unit)
                model.load(unit.parameters, CPU)
                tokens = ExpertTokens(
                    model.module, expert_layers(model.module, unit.linears) * watch, 8, forwards.tokens()
                )
                kept = forwards.run(hand_on=False, keep=True)
                tokens.route(InputObserver())
                tokens.stop()
                yield from (output if isinstance(output, Tensor) else output[0] for output in kept)
                forwards.hand_on(kept)
                model.unload(unit.parameters)

    for one, other in zip(outputs(watch=True), outputs(watch=False), strict=True):
        assert torch.equal(one, other)


def input_range(found: Any, name: str) -> list[float]:
    return [float(found.tensors[f"{name}.{part}"]) for part in ("input_scale", "input_offset")]


def test_extra_samples_help_experts_until_they_reach_the_quota(
    naive: ModuleType, model_folder: ModelFolder, texts: Path, tmp_path: Path
) -> None:
    folder, quota = model_folder("qwen3_moe_16", torch.float32), 8
    dataset = {"num_samples": 3, "min_tokens_per_expert": quota, "extra_share": 30}
    result = run(folder, tmp_path / "out", [linear(STATIC)], {"path": str(texts), **dataset})
    main, extra = inputs_of(folder, texts, **dataset)
    assert result.samples == 3
    assert result.extra_samples == len(extra) == 37
    layers, more, found = observed(folder, main), observed(folder, extra), naive.read(tmp_path / "out")
    met = 0
    for record in result.experts:
        for expert in range(16):
            parts = [rows[went[:, expert]] for rows, went in layers[record.name]]
            count = sum(map(len, parts))
            assert record.counts[expert] == count
            helped = 0
            for rows, went in more[record.name]:
                if count + helped < quota:
                    parts.append(rows[went[:, expert]])
                    helped += len(parts[-1])
            told = next((one for one in record.starved if one.expert == expert), None)
            assert (told is not None) == (count < quota)
            if told is not None:
                assert (told.routed, told.extra, told.forced) == (count, helped, 0)
                assert (told.rule is None) == (count + helped >= quota)
                met += told.rule is None
            if count + helped >= quota:
                seen = torch.cat(parts)
                want = naive.input_parameters(float(seen.min()), float(seen.max()), False, torch.float32)
                for leaf in ("gate_proj", "up_proj"):
                    assert input_range(found, f"{record.name}.{expert}.{leaf}") == pytest.approx(want, rel=1e-5)
    assert met > 10
    assert result.block_forwards == 3 * (3 + 37)


def given_to(rows: Tensor, expert: int) -> Tensor:
    """The tokens as this expert would be given them: each expert may have its own."""
    return rows[expert] if rows.dim() == 3 else rows


def given_to_any(rows: Tensor) -> Tensor:
    """The tokens as the expert is given them that they count most for."""
    return rows[rows.abs().sum(-1).argmax(0), torch.arange(rows.shape[1])] if rows.dim() == 3 else rows


@pytest.mark.parametrize("family", ["qwen3_moe_16", "gpt_oss_16", "llama4_16"])
def test_starved_experts_are_shown_tokens_that_went_to_others(
    naive: ModuleType, model_folder: ModelFolder, texts: Path, tmp_path: Path, family: str
) -> None:
    """Evenly spread over the tokens that did not go to them; whatever else is written stays as it was."""
    folder, quota = model_folder(family, torch.float32), 6
    plain = run(folder, tmp_path / "plain", [linear(STATIC)], {"path": str(texts), "num_samples": 3})
    dataset = {"num_samples": 3, "min_tokens_per_expert": quota, "extra_share": 0, "route_starved_experts": True}
    result = run(folder, tmp_path / "out", [linear(STATIC)], {"path": str(texts), **dataset})
    assert [record.counts for record in result.experts] == [record.counts for record in plain.experts]
    assert result.block_forwards == plain.block_forwards
    assert all(one.rule is None and one.tokens == quota for record in result.experts for one in record.starved)
    main, _ = inputs_of(folder, texts, **dataset)
    layers = observed(folder, main)
    found, before = naive.read(tmp_path / "out"), naive.read(tmp_path / "plain")
    starved = {f"{record.name}.{one.expert}" for record in result.experts for one in record.starved}
    assert len(starved) > 5
    changed = [n for n, tensor in before.tensors.items() if naive.bits(found.tensors[n]) != naive.bits(tensor)]
    assert changed
    assert {name.rsplit(".", 2)[0] for name in changed} <= starved
    for record in result.experts:
        samples = layers[record.name]
        whole, went = torch.cat([given_to_any(rows) for rows, _ in samples]), torch.cat([w for _, w in samples])
        kept = list(range(0, len(whole), max(1, len(whole) // (2 * quota))))
        for one in record.starved:
            others = [i for i in kept if not went[i, one.expert]]
            missing = quota - one.routed
            shown = [others[i * len(others) // missing] for i in range(missing)]
            own = torch.cat([given_to(rows, one.expert) for rows, _ in samples])[went[:, one.expert]]
            seen = torch.cat([own, whole[shown]])
            want = naive.input_parameters(float(seen.min()), float(seen.max()), False, torch.float32)
            name = f"{record.name}.{one.expert}.gate_proj"
            assert input_range(found, name) == pytest.approx(want, rel=1e-5, abs=1e-6)


GPTQ = {"type": "linear_quant", "qconfig": {"weight": WEIGHT | {"method": "gptq"}}}
PROCESSES: dict[str, tuple[list[dict[str, Any]], str]] = {
    "static": ([linear(STATIC)], RANGE),
    "symmetric": ([linear(STATIC | {"symmetric": True})], RANGE),
    "mean": ([linear(STATIC | {"ext": {"aggregation_type": "mean"}})], RANGE),
    "histogram": ([linear(STATIC | {"method": "histogram"})], RANGE),
    "pd_mix": ([linear({"dtype": "int8", "scope": "pd_mix", "symmetric": False})], RANGE),
    "gptq": ([GPTQ], NEAREST),
    "static gptq": ([linear(STATIC, WEIGHT | {"method": "gptq"})], f"{RANGE}, {NEAREST}"),
    "weighted": (
        [linear(TOKEN, WEIGHT | {"method": "ssz", "ext": {"weighted": True}})],
        "weight error not weighted by inputs",
    ),
    "float_sparse": ([{"type": "float_sparse", "include": ["*"]}], "weight pruned by magnitude"),
    "iter_smooth": ([{"type": "iter_smooth"}, linear(STATIC)], RANGE),
    "iter_smooth histogram": ([{"type": "iter_smooth"}, linear(STATIC | {"method": "histogram"})], RANGE),
    "flex_smooth_quant": ([{"type": "flex_smooth_quant"}, linear(STATIC)], RANGE),
    "autoround": ([rounding(STATIC)], f"{RANGE}, {NEAREST}"),
    "dynamic behind static": ([linear(STATIC) | {"include": ["*self_attn*"]}, linear(TOKEN)], NOTHING_LEARNT),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_a_starved_expert_is_quantized_by_rule(
    naive: ModuleType,
    model_folder: ModelFolder,
    texts: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    process, rule = PROCESSES[name]
    folder = model_folder("qwen3_moe_16")
    dataset = {"path": str(texts), "num_samples": 1, "min_tokens_per_expert": 4 * (name == "autoround")}
    result = run(folder, tmp_path / "out", process, dataset | {"extra_share": 0})
    report = verify_folder(tmp_path / "out", folder)
    assert report.ok, report.text()
    found = naive.read(tmp_path / "out")
    assert all(bool(tensor.isfinite().all()) for tensor in found.tensors.values() if tensor.is_floating_point())
    starved = [(record.name, one) for record in result.experts for one in record.starved]
    assert len(starved) > 5
    assert {one.rule for _, one in starved} == {rule}
    warned = [text for text in result.warnings if "too few calibration tokens" in text]
    assert len(warned) == (rule != NOTHING_LEARNT)
    assert all(f"{len(starved)} experts of 2 layers" in text and rule in text for text in warned)
    assert len([line for line in caplog.messages if "gptq" in line]) == 0  # told once, not expert by expert
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count(f"<td>{rule}</td>") == len(starved)
    listed = json.loads((tmp_path / "out" / "report.json").read_text())["experts"]
    assert [ExpertRecord.recalled(layer) for layer in listed] == result.experts


@pytest.mark.parametrize("process", ["static", "histogram", "mean"])
def test_the_range_of_a_starved_expert_is_that_of_its_siblings(
    naive: ModuleType, model_folder: ModelFolder, texts: Path, tmp_path: Path, process: str
) -> None:
    folder = model_folder("qwen3_moe_16", torch.float32)
    dataset = {"path": str(texts), "num_samples": 2, "min_tokens_per_expert": 3}
    result = run(folder, tmp_path / "out", PROCESSES[process][0], dataset | {"extra_share": 0})
    found, seen = naive.read(tmp_path / "out"), {record.name: record for record in result.linears}
    few = 0
    for record in result.experts:
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            known = [s for i in range(16) if (s := seen[f"{record.name}.{i}.{leaf}"]).tokens]
            low, high = min(s.low for s in known if s.low is not None), max(s.high for s in known if s.high is not None)
            want = naive.input_parameters(low, high, False, torch.float32)
            for one in record.starved:
                assert input_range(found, f"{record.name}.{one.expert}.{leaf}") == pytest.approx(want, rel=1e-6)
                few += 0 < one.tokens < 3
    assert few > 3


def test_gptq_learns_nothing_from_too_few_tokens(
    naive: ModuleType, model_folder: ModelFolder, texts: Path, tmp_path: Path
) -> None:
    folder = model_folder("qwen3_moe_16")
    for out, quota in (("few", 0), ("out", 4)):
        dataset = {"path": str(texts), "num_samples": 2, "min_tokens_per_expert": quota, "extra_share": 0}
        result = run(folder, tmp_path / out, [GPTQ], dataset)
    ssz = [{"type": "linear_quant", "qconfig": {"weight": WEIGHT | {"method": "ssz"}}}]
    run(folder, tmp_path / "ssz", ssz, {"path": str(texts)})
    few, found, plain = (naive.read(tmp_path / out) for out in ("few", "out", "ssz"))
    kinds = set()
    for record in result.experts:
        starved = {one.expert: one.tokens for one in record.starved}
        for expert in range(16):
            key = f"{record.name}.{expert}.down_proj.weight"
            assert torch.equal(found.tensors[key], (plain if expert in starved else few).tensors[key])
            same = torch.equal(few.tensors[key], plain.tensors[key])
            kinds.add((expert in starved, bool(record.counts[expert]), same))
    assert (True, True, False) in kinds  # with no quota a few tokens were learned from


@pytest.mark.parametrize("unit", ["model.layers.0", "model.layers.2"])
@pytest.mark.parametrize("propagate", ["float", "quantized"])
def test_a_run_that_was_killed_is_resumed(
    killed: Any,
    model_folder: ModelFolder,
    texts: Path,
    tmp_path: Path,
    propagate: str,
    unit: str,
) -> None:
    dataset = {"path": str(texts), "num_samples": 2, "min_tokens_per_expert": 6, "extra_share": 2}
    dataset["route_starved_experts"] = True
    process = [linear(STATIC)]
    folder = model_folder("qwen3_moe_16")
    whole = run(folder, tmp_path / "whole", process, dataset, propagate=propagate)
    assert any(one.extra and one.forced for record in whole.experts for one in record.starved)
    with killed(LinearQuant, unit):
        run(folder, tmp_path / "out", process, dataset, propagate=propagate)
    result = run(folder, tmp_path / "out", process, dataset, propagate=propagate, resume=True)
    assert result.experts == whole.experts
    assert [replace(r, seconds=0) for r in result.linears] == [replace(r, seconds=0) for r in whole.linears]
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


@pytest.mark.parametrize("act", [STATIC, TOKEN])
def test_two_streams(
    naive: ModuleType, model_folder: ModelFolder, texts: Path, tmp_path: Path, act: dict[str, Any]
) -> None:
    """Learned rounding with float targets: counted once, in the stream that statistics are of, if there are any."""
    dataset = {"path": str(texts), "num_samples": 2, "min_tokens_per_expert": 6, "extra_share": 3}
    folder = model_folder("qwen3_moe_16")
    result = run(folder, tmp_path / "out", [rounding(act)], dataset, propagate="quantized")
    assert verify_folder(tmp_path / "out", folder).ok
    main, _ = inputs_of(folder, texts, num_samples=2)
    assert [sum(record.counts) for record in result.experts] == 2 * [2 * sum(given.numel() for given in main)]
    assert bool(result.extra_samples) == any(one.extra for r in result.experts for one in r.starved) == (act is STATIC)
    rules = {one.rule for record in result.experts for one in record.starved}  # training knows no extra samples
    assert rules == ({NEAREST, f"{RANGE}, {NEAREST}"} if act is STATIC else {NEAREST})


def test_what_the_plan_says(model_folder: ModelFolder, texts: Path, tmp_path: Path) -> None:
    plans: list[Any] = []

    def summary(family: str, process: list[dict[str, Any]], **dataset: Any) -> str:
        given = {"path": str(texts), "num_samples": 2, **dataset}
        run(model_folder(family), tmp_path / f"out{len(plans)}", process, given, on_plan=plans.append)
        return render_summary(plans[-1])

    assert "  experts    " not in summary("qwen3_moe_16", [linear(STATIC)])
    least = "  experts    at least 5 calibration tokens for each of 32: "
    assert f"{least}nothing is done for those below\n" in summary(
        "qwen3_moe_16", [linear(STATIC)], min_tokens_per_expert=5, extra_share=0
    )
    without = plans[-1].activation_bytes
    text = summary("qwen3_moe_16", [linear(STATIC)], min_tokens_per_expert=5, extra_share=1, route_starved_experts=True)
    count = plans[-1].experts.quota.extra.count
    assert f"{least}by {count} extra samples, then by routing tokens to them for statistics only\n" in text
    assert count > 0
    assert without < plans[-1].activation_bytes <= 3 * without
    none = "spec.dataset.min_tokens_per_expert has no effect: "
    assert f"{none}this model has no routed experts" in summary("llama", [linear(STATIC)], min_tokens_per_expert=5)
    assert f"{none}nothing is learnt from the inputs of experts" in summary(
        "qwen3_moe_16", [linear(STATIC) | {"include": ["*self_attn*"]}], min_tokens_per_expert=5
    )


def test_experts_that_cannot_be_asked_one_by_one_keep_to_the_rule(
    model_folder: ModelFolder, texts: Path, tmp_path: Path
) -> None:
    """JetMoe sorts the tokens of all experts before it gives them to the linears of all."""
    dataset = {"path": str(texts), "num_samples": 1, "min_tokens_per_expert": 30, "route_starved_experts": True}
    result = run(model_folder("jetmoe"), tmp_path / "out", [linear(STATIC)], dataset)
    starved: list[StarvedExpert] = [one for record in result.experts for one in record.starved]
    assert starved
    assert all((one.forced, one.rule) == (0, RANGE) for one in starved)
    assert verify_folder(tmp_path / "out", model_folder("jetmoe")).ok
