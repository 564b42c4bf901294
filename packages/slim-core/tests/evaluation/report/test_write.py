"""The report holds everything that was measured, and the page needs nothing but itself."""

from __future__ import annotations

import json
import re
import stat
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import matplotlib
import pytest
import torch

from slim_core.budget import UNLIMITED
from slim_core.checkpoint.source import TensorMeta
from slim_core.devices import Devices
from slim_core.evaluation.report import write_report
from slim_core.processors.base import Assignment, create_processor
from slim_core.processors.group import GroupConfig
from slim_core.processors.linear_quant import LinearQuantConfig
from slim_core.quantization.kinds import LayerForm, LayerKind
from slim_core.runners.choice import RunnerChoice
from slim_core.runners.plan import Plan, PlannedUnit
from slim_core.runners.plan_linears import PlannedLinear
from slim_core.runners.plan_memory import PlannedMemory
from slim_core.runners.prediction import Share
from slim_core.runners.records import ExpertRecord, LinearRecord, RunResult, StarvedExpert, UnitRecord
from slim_core.savers.ascendv1 import AscendV1Saver, AscendV1SaverConfig
from slim_core.savers.base import Output, PlannedTensor

LEAVES = {
    "self_attn.q_proj": LayerKind.W8A8,
    "self_attn.k_proj": LayerKind.W8A8,
    "mlp.down_proj": LayerKind.W8A8_DYNAMIC,
}
POSITION = "process[0].configs[0]"


def make_run(blocks: int = 4, leaves: dict[str, LayerKind] = LEAVES, warnings: tuple[str, ...] = ()) -> Any:
    """A plan and what its run measured, with a tied head that is written under a second name."""
    reason = f"spec.{POSITION}"
    units = [PlannedUnit("prologue", (), 1000, 1000)]
    result = RunResult(
        Path("out"),
        warnings=list(warnings),
        samples=8,
        block_forwards=8 * blocks,
        seconds=75.0,
        base_bytes=100 << 20,
        peak_bytes=150 << 20,
    )
    result.units.append(UnitRecord("prologue", 0.5, 110 << 20, 1000, 1000))
    for i in range(blocks):
        linears = []
        for j, (leaf, kind) in enumerate(leaves.items()):
            name = f"model.layers.{i}.{leaf}"
            seen = kind is LayerKind.W8A8
            linears.append(PlannedLinear(name, kind, reason, 64, 32))
            result.linears.append(
                LinearRecord(
                    name,
                    str(kind),
                    40.0 + i - j,
                    -1.5 - i if seen else None,
                    2.5 if seen else None,
                    99 if seen else None,
                    0.1,
                )
            )
        units.append(PlannedUnit(f"model.layers.{i}", tuple(linears), 4000, 2100))
        result.units.append(UnitRecord(f"model.layers.{i}", 1.0 + i, 120 << 20, 4000, 2100))
    head = PlannedLinear("lm_head", LayerKind.FLOAT, "outside the decoder blocks", 64, 32)
    units.append(PlannedUnit("epilogue", (head,), 0, 1000))
    result.units.append(UnitRecord("epilogue", 0.1, 120 << 20, 1000, 1000))
    meta = {name: TensorMeta(name, torch.bfloat16, (500,)) for name in ("embed.weight", "lm_head.weight")}
    output = Output(
        (
            PlannedTensor(meta["embed.weight"], "FLOAT", "prologue", origin="embed.weight"),
            PlannedTensor(meta["lm_head.weight"], "FLOAT", "epilogue", origin="embed.weight"),
        ),
        (),
    )
    act = {"dtype": "int8", "scope": "per_tensor", "symmetric": False, "method": "minmax"}
    weight = {"dtype": "int8", "scope": "per_channel", "symmetric": True, "method": "minmax"}
    config = GroupConfig(configs=(LinearQuantConfig(qconfig={"act": act, "weight": weight}),))  # type: ignore[arg-type]
    plan = Plan(
        model=cast("Any", None),
        runner=RunnerChoice("layer_wise", "because of <this> & that"),
        devices=Devices("cpu"),
        processors=create_processor(config, "process[0]").leaves(),
        saver=AscendV1Saver(AscendV1SaverConfig()),
        units=units,
        assignments={r.name: Assignment(LayerForm(LayerKind(r.kind)), POSITION, reason) for r in result.linears},
        output=output,
        warnings=[],
        requests={},
        streams=1,
        forwards=1,
        activation_bytes=0,
        memory=PlannedMemory((Share("all of it", 60 << 20),), UNLIMITED),
    )
    return SimpleNamespace(plan=plan, result=result)


def report(folder: Path, run: Any, **options: Any) -> tuple[dict[str, Any], str]:
    write_report(folder, run.plan, run.result, title="Tiny <model>", **options)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    content = json.loads((folder / "report.json").read_text(), parse_constant=refuse)
    return content, (folder / "report.html").read_text()


class References(HTMLParser):
    """Collects elements, and every address that a browser would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data") and value:
                self.addresses.append(value)
            if name == "id" and value:
                self.ids.append(value)


def test_json_is_complete(tmp_path: Path) -> None:
    (tmp_path / "quant_model_weights-00001-of-00001.safetensors").write_bytes(bytes(10500))
    content, _ = report(tmp_path, make_run(warnings=("look here",)))
    assert content["title"] == "Tiny <model>"
    assert (content["runner"], content["device"], content["samples"]) == ("layer_wise", "cpu", 8)
    assert (content["block_forwards"], content["forwards_per_sample"], content["seconds"]) == (32, 1, 75.0)
    assert (content["predicted_peak_memory"], content["peak_memory"]) == (60 << 20, 50 << 20)
    assert content["bytes_out"] == 10500
    assert content["bytes_in"] == 1000 + 4 * 4000, "a tied head is not read a second time"
    assert content["counts"] == {"W8A8": 8, "W8A8_DYNAMIC": 4, "FLOAT": 1}
    assert content["warnings"] == ["look here"]
    assert len(content["units"]) == 6
    assert len(content["linears"]) == 13
    assert {"python", "torch", "slim-core"} <= set(content["versions"])
    assert content["machine"]["memory_bytes"] > 0
    first = content["linears"][0]
    assert (first["name"], first["kind"], first["sqnr_db"]) == ("model.layers.0.self_attn.q_proj", "W8A8", 40.0)
    assert (first["low"], first["high"], first["tokens"]) == (-1.5, 2.5, 99)
    assert content["units"][1]["seconds"] == 1.0


def test_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    _, page = report(tmp_path, make_run())
    found = References(page)
    assert "http://" not in page
    assert "https://" not in page
    assert all(address.startswith("#") for address in found.addresses)
    assert not {"script", "link", "img", "iframe", "object"} & set(found.elements)
    assert "@import" not in page
    assert len(found.ids) == len(set(found.ids))
    assert {address.removeprefix("#") for address in found.addresses} <= set(found.ids)


def test_page_shows_plots_tables_and_numbers(tmp_path: Path) -> None:
    _, page = report(tmp_path, make_run(warnings=("a <b> warning",)))
    for plot in ("sqnr", "ranges", "sizes", "costs"):
        assert f'aria-label="{plot}"' in page
    assert References(page).elements.count("svg") == 4
    assert "Tiny &lt;model&gt;" in page
    assert "a &lt;b&gt; warning" in page
    assert "because of &lt;this&gt; &amp; that" in page
    assert "1 min 15 s" in page
    assert "<details>" in page
    assert page.count("model.layers.3.mlp.down_proj") == 2, "in the table of the worst and in that of all"
    assert "q, k_proj" in page, "linears with one input share a panel"
    assert "#010203" not in page


def test_same_run_same_plots(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = (report(tmp_path / name, make_run())[1] for name in "ab")
    assert first.split("<figure>")[1:] != []
    assert [part.split("</figure>")[0] for part in first.split("<figure>")][1:] == [
        part.split("</figure>")[0] for part in second.split("<figure>")
    ][1:]


def test_nothing_of_matplotlib_is_changed(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    report(tmp_path, make_run())
    assert dict(matplotlib.rcParams) == before


def test_files_are_private(tmp_path: Path) -> None:
    report(tmp_path, make_run(), debug=True)
    for file in tmp_path.rglob("*.*"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


def test_debug_info_has_every_layer(tmp_path: Path) -> None:
    report(tmp_path, make_run(), debug=True)
    info = json.loads((tmp_path / "debug_info" / "debug_info.json").read_text())
    assert len(info["layers"]) == 13
    layer = info["layers"]["model.layers.2.self_attn.q_proj"]
    assert layer["scheme"]["weight"]["method"] == "minmax"
    assert (layer["processor"], layer["tokens"], layer["seconds"]) == (POSITION, 99, 0.1)
    assert info["layers"]["lm_head"]["scheme"] is None


def test_no_debug_info_unasked(tmp_path: Path) -> None:
    report(tmp_path, make_run())
    assert not (tmp_path / "debug_info").exists()


def test_without_calibration_there_are_no_ranges(tmp_path: Path) -> None:
    run = make_run(leaves={"mlp.down_proj": LayerKind.W8A8_DYNAMIC})
    run.result.samples = run.result.block_forwards = 0
    _, page = report(tmp_path, run)
    assert 'aria-label="ranges"' not in page
    assert "No activation was observed" in page
    assert "no calibration data" in page


def test_nothing_quantized(tmp_path: Path) -> None:
    run = make_run(leaves={})
    run.result.units.clear()
    content, page = report(tmp_path, run)
    assert content["median_sqnr_db"] is None
    assert "No linear was quantized" in page
    assert 'aria-label="costs"' not in page


def test_values_that_json_cannot_hold(tmp_path: Path) -> None:
    run = make_run()
    run.result.linears[0] = LinearRecord(run.result.linears[0].name, "W8A8", float("inf"), float("-inf"), 1.0)
    content, _ = report(tmp_path, run)
    assert content["linears"][0]["sqnr_db"] is None
    assert content["linears"][0]["low"] is None


def test_units_of_an_earlier_run(tmp_path: Path) -> None:
    run = make_run()
    run.result.resumed_units = 2
    del run.result.units[:2], run.result.linears[:3]
    content, page = report(tmp_path, run)
    assert content["units"][0]["seconds"] is None
    assert content["linears"][0]["sqnr_db"] is None
    assert "2 of them done before this run" in page


def with_experts(layers: int, experts: int) -> Any:
    """A run whose experts got as many tokens as their number, each layer once more than the one before."""
    run = make_run()
    for i in range(layers):
        counts = tuple(number * (i + 1) for number in range(experts))
        starved = (StarvedExpert(0, 0, 3, 2, "input range & more"), StarvedExpert(1, i + 1, 9, 0, None))
        run.result.experts.append(ExpertRecord(f"model.layers.{i}.mlp.experts", counts, starved))
    return run


def test_a_map_of_experts(tmp_path: Path) -> None:
    run = with_experts(3, 8)
    run.result.extra_samples = 5
    content, page = report(tmp_path, run)
    assert content["extra_samples"] == 5
    assert content["experts"][2] == {
        "name": "model.layers.2.mlp.experts",
        "counts": [0, 3, 6, 9, 12, 15, 18, 21],
        "starved": [
            {"expert": 0, "routed": 0, "extra": 3, "forced": 2, "rule": "input range & more"},
            {"expert": 1, "routed": 3, "extra": 9, "forced": 0, "rule": None},
        ],
    }
    assert "6 experts were routed too few tokens, or none" in page
    assert page.count("<td>input range &amp; more</td>") == page.count("<td>as all others</td>") == 3
    assert '<td class="name">model.layers.2.mlp.experts.1</td><td class="n">3</td><td class="n">9</td>' in page
    assert "8 samples and 5 for experts below the quota, " in page
    svg = page[page.index('<svg role="img" aria-label="experts"') :]
    svg = svg[: svg.index("</svg>")]
    # The mean of a layer is 3.5 times its number: a row each of none, few, 2-3, 4-6 and 7 in colours of their own.
    paths = re.findall(r'<path fill="([^"]+)" fill-opacity="([^"]+)" d="([^"]+)"', svg)
    none, few, blue = "#d1495b", "#e08214", "#3b82c4"
    colors = [(none, "1"), (few, "1"), (blue, "0.42"), (blue, "0.6"), (blue, "0.8")]
    assert {(color, shade): path.count("M") for color, shade, path in paths} == dict.fromkeys(colors, 3)
    assert re.findall(r">([^<]+)</text>", svg) == [f"model.layers.{i}.mlp.experts" for i in range(3)] + [*"0246"]


def test_a_map_of_many_experts_stays_small(tmp_path: Path) -> None:
    _, page = report(tmp_path, with_experts(60, 256))
    svg = page[page.index('<svg role="img" aria-label="experts"') :]
    svg = svg[: svg.index("</svg>")]
    assert svg.count("<path") <= 8
    assert len(svg) < 100_000
    width, height = map(float, re.findall(r'viewBox="0 0 (\S+) (\S+)"', svg)[0])
    assert (width, height) == (960, 616)


def test_no_experts(tmp_path: Path) -> None:
    content, page = report(tmp_path, make_run())
    assert content["experts"] == []
    assert "<h2>Experts</h2>" not in page
    run = with_experts(1, 4)
    run.result.experts = [replace(run.result.experts[0], counts=(4, 5, 6, 7), starved=())]
    assert "Enough tokens were routed to every expert." in report(tmp_path, run)[1]


@pytest.mark.parametrize("blocks", [1, 60])
def test_many_names_and_blocks(blocks: int, tmp_path: Path) -> None:
    leaves = {f"mlp.experts.{i}.{leaf}": LayerKind.W8A8 for i in range(3) for leaf in ("up_proj", "down_proj")}
    leaves |= {f"mlp.linear{i}": LayerKind.W8A8 for i in range(9)}
    _, page = report(tmp_path, make_run(blocks, leaves))
    assert "experts.up" in page
    assert "The 8 names with the lowest values are drawn; the table has all 11." in page
