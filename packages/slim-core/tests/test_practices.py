"""The practice library: quantization types, the matching rules of the protocol, and what happens to broken files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from slim_core.errors import EnvVarError, SchemaValidateError, UnsupportedError
from slim_core.practices import (
    QUANT_TYPES,
    PracticeLibrary,
    parse_quant_type,
    practice_folders,
)


def put(
    root: Path,
    pedigree: str,
    name: str,
    quant_type: str,
    *,
    models: list[str] | None = None,
    tags: dict[str, list[list[str]]] | None = None,
    score: float = 90,
    config_id: str | None = None,
    **label: Any,
) -> Path:
    parsed = parse_quant_type(quant_type)
    full: dict[str, Any] = {"w_bit": parsed.w_bit, "a_bit": parsed.a_bit}
    if parsed.kv_cache:
        full["kv_cache"] = True
    if parsed.is_sparse:
        full["is_sparse"] = True
    if parsed.fa_bit:
        full["fa_bit"] = parsed.fa_bit
    metadata: dict[str, Any] = {"config_id": config_id or name, "score": score, "label": full | label}
    if models is not None:
        metadata["verified_model_types"] = models
    if tags is not None:
        metadata["verified_tags"] = tags
    path = root / pedigree / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"apiversion": "modelslim_v1", "metadata": metadata, "spec": {}}))
    return path


MODELS = {
    "Qwen3-32B": "qwen3",
    "DeepSeek-V3": "deepseek_v3",
    "Qwen3-VL-30B-A3B": "qwen3_vl_moe",
    "GLM-5": "glm_5",
    "DeepSeek-V4-Pro": "deepseek_v4",
    "Qwen-Image-Edit-2509": "qwen_image_edit",
    "Qwen2.5-VL-7B-Instruct": "qwen25_vl",
}


@pytest.fixture
def upstream(tmp_path: Path) -> Path:
    """The labels and model lists that decide the worked examples of the reference."""
    root = tmp_path / "lab_practice"
    put(root, "default", "default-w8a8", "w8a8", models=[], score=50)
    put(root, "default", "default-w8a16", "w8a16", models=[], score=50)
    put(root, "qwen3", "qwen3-32b-dense-w8a8", "w8a8", models=["Qwen3-14B", "Qwen3-32B"])
    put(root, "qwen3", "qwen3-32b-dense-w8a8s", "w8a8s", models=["Qwen3-32B"])
    put(root, "qwen3", "qwen3-32b-dense-w4a4", "w4a4", models=["Qwen3-32B"])
    put(root, "deepseek_v3", "deepseek-r1-0528-w4a8", "w4a8", models=["DeepSeek-R1-0528"])
    vl = "Qwen3-VL-30B-A3B"
    put(root, "qwen3_vl_moe", "qwen3_vl_moe_w8a8", "w8a8", tags={vl: [["vLLM_Ascend", "Atlas_A2_Inference"]]})
    put(root, "qwen3_vl_moe", "qwen3_vl_moe_w8a8_mxfp8", "w8a8", tags={vl: [["vLLM_Ascend", "Atlas_350"]]})
    put(root, "glm_5", "glm_5_w8a8", "w8a8", tags={"GLM-5": [["vLLM_Ascend", "Atlas_A3_Inference"]]})
    put(root, "glm_5", "glm_5_w4a8", "w4a8", tags={"GLM-5": [["vLLM_Ascend", "Atlas_A3_Inference"]]})
    put(root, "deepseek_v4", "deepseek_v4_pro_w8a8", "w8a8", models=["DeepSeek-V4-Pro"])
    put(root, "qwen_image_edit", "qwen-image-w4a4f4", "w4a4f8", models=["Qwen-Image-Edit-2509"])
    put(root, "qwen_image_edit", "qwen-image-w8a8f8", "w8a8", fa_quant=True, models=["Qwen-Image-Edit-2509"])
    return root


CONFORMANCE = [
    ("Qwen3-32B", "w8a8", [], "qwen3-32b-dense-w8a8", None),
    ("Qwen3-32B", None, [], "qwen3-32b-dense-w8a8", "No quant_type was given, w8a8 is assumed."),
    ("Qwen3-32B", "w4a8", [], "qwen3-32b-dense-w8a8", "no practice for Qwen3-32B with w4a8, only with w8a8"),
    ("DeepSeek-V3", "w8a8", [], "default-w8a8", "not made for DeepSeek-V3"),
    ("Unheard-Of-7B", "w8a16", [], "default-w8a16", "not made for Unheard-Of-7B"),
    ("Unheard-Of-7B", "w4a8", [], "default-w8a8", "no practice for Unheard-Of-7B with w4a8, only with w8a8"),
    ("Qwen3-VL-30B-A3B", "w8a8", [], "qwen3_vl_moe_w8a8", None),
    ("Qwen3-VL-30B-A3B", "w8a8", ["atlas_350"], "qwen3_vl_moe_w8a8_mxfp8", None),
    ("GLM-5", "w8a8", ["CPU"], "glm_5_w8a8", "fits GLM-5, but is not verified with CPU"),
    ("DeepSeek-V4-Pro", "w8a8", ["anything", "at", "all"], "deepseek_v4_pro_w8a8", None),
    ("Qwen-Image-Edit-2509", "w4a4f4", [], "default-w8a8", "with w4a4f4, only with w8a8"),
    ("Qwen3-32b", "w8a8", [], "default-w8a8", "not made for Qwen3-32b"),
]


@pytest.mark.parametrize(("model_type", "quant_type", "tags", "config_id", "question"), CONFORMANCE)
def test_worked_examples_of_the_reference(upstream, model_type, quant_type, tags, config_id, question):
    selection = PracticeLibrary([upstream]).select(MODELS.get(model_type, "default"), model_type, quant_type, tags)
    assert selection.practice.config_id == config_id
    if question is None:
        assert selection.question is None
    else:
        assert question in (selection.question or "")
        assert repr(config_id) in (selection.question or "")
        assert (selection.question or "").endswith("?")


def test_a_pedigree_without_a_folder_is_an_error_before_any_fallback(upstream):
    with pytest.raises(UnsupportedError, match=r"no folder 'qwen25_vl' for Qwen2.5-VL-7B-Instruct \(give a recipe"):
        PracticeLibrary([upstream]).select("qwen25_vl", "Qwen2.5-VL-7B-Instruct", "w8a8", [])
    for trick in ("", "..", "a/b", "/"):
        with pytest.raises(UnsupportedError, match="no folder"):
            PracticeLibrary([upstream]).select(trick, "x", "w8a8", [])


def test_tags_are_whole_case_insensitive_and_of_one_scenario(tmp_path):
    scenarios = [["vLLM_Ascend", "Atlas_A2_Inference"], ["MindIE", "Atlas_350"]]
    put(tmp_path, "glm_5", "glm", "w8a8", tags={"GLM-5": scenarios})
    library = PracticeLibrary([tmp_path])
    for tags, asks in [
        ([], False),
        (["mindie"], False),
        (["MINDIE", "atlas_350"], False),
        (["MindIE", "Atlas_A2_Inference"], True),
        (["vllm-ascend"], True),
        (["Atlas"], True),
    ]:
        assert (library.select("glm_5", "GLM-5", "w8a8", tags).question is not None) is asks, tags
    with pytest.raises(UnsupportedError):
        library.select("glm_5", "GLM-5.1", "w8a8", [])


def test_a_match_beats_a_standby_of_higher_score(tmp_path):
    put(tmp_path, "p", "a", "w8a8", tags={"M": [["MindIE"]]}, score=95)
    put(tmp_path, "p", "b", "w8a8", tags={"M": [["SGLang"]]}, score=10)
    library = PracticeLibrary([tmp_path])
    assert library.select("p", "M", "w8a8", ["sglang"]).practice.config_id == "b"
    assert library.select("p", "M", "w8a8", ["none"]).practice.config_id == "a"


def test_a_standby_of_the_wanted_type_beats_the_default_and_w8a8_a_match_of_it(tmp_path):
    put(tmp_path, "default", "default-w8a8", "w8a8")
    put(tmp_path, "p", "standby", "w4a8", tags={"M": [["MindIE"]]})
    put(tmp_path, "p", "other", "w8a8", models=["M"])
    library = PracticeLibrary([tmp_path])
    assert library.select("p", "M", "w4a8", ["CPU"]).practice.config_id == "standby"
    fallback = library.select("p", "M", "w4a4", ["CPU"])
    assert fallback.practice.config_id == "other"
    assert "only with w8a8" in (fallback.question or "")


def test_the_default_pedigree_always_asks(upstream):
    selection = PracticeLibrary([upstream]).select("default", "Mine", "w8a8", ["tags", "ignored"])
    assert selection.practice.config_id == "default-w8a8"
    assert selection.question == (
        "The w8a8 practice 'default-w8a8' fits any model but was not made for Mine. Quantize with 'default-w8a8'?"
    )


def test_nothing_fits(tmp_path):
    put(tmp_path, "p", "only", "w4a8", models=["M"])
    library = PracticeLibrary([tmp_path])
    for quant_type in ("w8a8", None, "w4a4"):
        with pytest.raises(UnsupportedError, match=r"no practice for M with .*has practices for: w4a8"):
            library.select("p", "M", quant_type, [])


def test_order_is_score_then_name(tmp_path):
    put(tmp_path, "p", "b", "w8a8", score=90, models=["M"])
    put(tmp_path, "p", "c", "w8a8", score=95, models=["M"])
    put(tmp_path, "p", "a", "w8a8", score=90, models=["M"])
    library = PracticeLibrary([tmp_path])
    assert [practice.config_id for practice in library.list()] == ["c", "a", "b"]
    assert library.select("p", "M", "w8a8", []).practice.config_id == "c"


def test_folders_are_joined_and_the_first_wins_by_name(tmp_path):
    first, second = tmp_path / "mine", tmp_path / "theirs"
    put(first, "p", "same", "w8a8", score=10)
    put(second, "p", "same", "w8a8", score=99)
    put(second, "q", "more", "w8a16")
    library = PracticeLibrary([first, second, tmp_path / "absent"])
    assert library.pedigrees() == ["p", "q"]
    assert [practice.metadata.score for practice in library.list()] == [99, 10, 90]
    assert library.show("same").path.parent.parent == first


def test_show_takes_the_name_or_the_file_stem(tmp_path):
    path = put(tmp_path, "p", "file-name", "w8a8c8", config_id="the-name")
    library = PracticeLibrary([tmp_path])
    assert library.show("the-name").path == path
    assert library.show("file-name").config_id == "the-name"
    assert library.show("the-name").quant_type == "w8a8c8"
    with pytest.raises(UnsupportedError, match=r"no practice 'the-nam' .did you mean 'the-name'"):
        library.show("the-nam")


def test_a_broken_file_harms_nobody_until_it_is_asked_for(tmp_path):
    put(tmp_path, "p", "good", "w8a8", models=["M"])
    (tmp_path / "p" / "bad.yaml").write_text("apiversion: v\nspec: {}\nmetadata:\n  scor: 1\n")
    (tmp_path / "p" / "notes.yml").write_text("ignored")
    (tmp_path / "p" / "deeper").mkdir()
    (tmp_path / "p" / "deeper" / "also.yaml").write_text("ignored")
    library = PracticeLibrary([tmp_path])
    assert library.select("p", "M", "w8a8", []).practice.config_id == "good"
    assert library.warnings == [
        f"practice ignored: {tmp_path}/p/bad.yaml:4: metadata.scor: unknown field; did you mean 'score'? "
        "(fields: config_id, score, label, verified_model_types, verified_tags)"
    ]
    with pytest.raises(SchemaValidateError, match=r"metadata\.scor: unknown field"):
        library.show("bad")
    with pytest.raises(UnsupportedError, match=r"ignored as unreadable: bad\.yaml"):
        library.select("p", "Other", "w8a8", [])


def test_a_broken_spec_shows_when_the_practice_is_used(tmp_path):
    path = put(tmp_path, "p", "x", "w8a8", models=["M"])
    path.write_text(path.read_text().replace("spec: {}", "spec: {runner: quick}"))
    practice = PracticeLibrary([tmp_path]).select("p", "M", "w8a8", []).practice
    with pytest.raises(SchemaValidateError, match=r"spec\.runner: got 'quick'; allowed: auto"):
        practice.recipe.spec()


def test_the_users_own_folder_comes_first(tmp_path, monkeypatch):
    monkeypatch.delenv("MSMODELSLIM_CUSTOM_PRACTICE_REPO", raising=False)
    assert practice_folders([Path("a")]) == [Path("a")]
    monkeypatch.setenv("MSMODELSLIM_CUSTOM_PRACTICE_REPO", str(tmp_path))
    assert practice_folders([Path("a")]) == [tmp_path, Path("a")]
    monkeypatch.setenv("MSMODELSLIM_CUSTOM_PRACTICE_REPO", str(tmp_path / "absent"))
    with pytest.raises(EnvVarError, match="MSMODELSLIM_CUSTOM_PRACTICE_REPO"):
        practice_folders([])


GRAMMAR = {
    "w4a4": (4, 4, False, None, False),
    "w4a4c8": (4, 4, True, None, False),
    "w4a4f4": (4, 4, False, 4, False),
    "w4a4f8": (4, 4, False, 8, False),
    "w4a8": (4, 8, False, None, False),
    "w4a8c8": (4, 8, True, None, False),
    "w8a16": (8, 16, False, None, False),
    "w8a8": (8, 8, False, None, False),
    "w8a8s": (8, 8, False, None, True),
    "w8a8c8": (8, 8, True, None, False),
    "w8a8f8": (8, 8, False, 8, False),
    "w16a16s": (16, 16, False, None, True),
}


@pytest.mark.parametrize(("name", "parts"), GRAMMAR.items())
def test_quantization_types(name, parts):
    parsed = parse_quant_type(name)
    assert (parsed.w_bit, parsed.a_bit, parsed.kv_cache, parsed.fa_bit, parsed.is_sparse) == parts
    label = dict(zip(("w_bit", "a_bit", "kv_cache", "fa_bit", "is_sparse"), parts, strict=True))
    assert [other for other in QUANT_TYPES if parse_quant_type(other).fits(label | {"note": "ignored"})] == [name]


def test_labels_with_absent_keys():
    assert parse_quant_type("w8a8").fits({"w_bit": 8, "a_bit": 8})
    assert not parse_quant_type("w8a8").fits({"w_bit": 8})
    assert parse_quant_type("w8a8f8").fits({"w_bit": 8, "a_bit": 8, "fa_quant": True})
    assert not parse_quant_type("w8a8").fits({"w_bit": 8, "a_bit": 8, "fa_quant": True})
    assert parse_quant_type("w4a4f4").fits({"w_bit": 4, "a_bit": 4, "fa_quant": True, "fa_bit": 4})


@pytest.mark.parametrize(
    ("text", "near"), [("W8A8", "w8a8"), ("w8-a8", "w8a8"), ("w4a16", "a16"), ("w8a8c4", "w8a8"), ("w16a16", "w16a16s")]
)
def test_unknown_quantization_types(text, near):
    with pytest.raises(SchemaValidateError, match=r"quant_type: got '.*'; allowed: w4a4, ") as caught:
        parse_quant_type(text)
    assert near in (caught.value.remedy or "")


@given(st.text("wa4816cfs", max_size=9))
def test_only_the_closed_list_is_accepted(text):
    if text in QUANT_TYPES:
        assert parse_quant_type(text).name == text
    else:
        with pytest.raises(SchemaValidateError):
            parse_quant_type(text)


@pytest.mark.parametrize(
    ("taken", "chosen", "fits"),
    [
        ({"multimodal_vlm_modelslim_v1"}, "pictures", "any vision-language model"),
        ({"multimodal_sd_modelslim_v1"}, "noise", "any diffusion model"),
        ({"modelslim_v1"}, "texts", "any model"),
        ({"modelslim_v1", "multimodal_vlm_modelslim_v1"}, "texts", "any model"),  # the higher score
        (set(), "texts", "any model"),
        (None, "texts", "any model"),
    ],
)
@pytest.mark.parametrize("quant_type", ["w8a8", "w4a8", None])
def test_a_fallback_that_the_model_at_hand_is_for(tmp_path, taken, chosen, fits, quant_type):
    """Also where the fallback is that of another type."""
    for name, apiversion, score in (
        ("noise", "multimodal_sd_modelslim_v1", 48),
        ("pictures", "multimodal_vlm_modelslim_v1", 49),
        ("texts", "modelslim_v1", 50),
    ):
        path = put(tmp_path, "default", name, "w8a8", score=score)
        path.write_text(path.read_text().replace("modelslim_v1", apiversion, 1))
    takes = None if taken is None else taken.__contains__
    selection = PracticeLibrary([tmp_path]).select("default", "Mine", quant_type, takes=takes)
    assert selection.practice.config_id == chosen
    assert f"practice {chosen!r} fits {fits} but was not made for Mine" in (selection.question or "")


def test_nothing_is_asked_of_the_model_where_there_is_no_choice(tmp_path):
    """Reading it takes seconds."""

    def takes(apiversion: str) -> bool:
        raise AssertionError(apiversion)

    put(tmp_path, "default", "a", "w8a8")
    put(tmp_path, "default", "b", "w8a8")
    put(tmp_path, "mine", "c", "w8a8", models=["Mine"])
    path = put(tmp_path, "mine", "d", "w8a8", models=["Mine"], score=1)
    path.write_text(path.read_text().replace("modelslim_v1", "multimodal_vlm_modelslim_v1"))
    library = PracticeLibrary([tmp_path])
    assert library.select("default", "Mine", "w8a8", takes=takes).practice.config_id == "a"
    assert library.select("mine", "Mine", "w8a8", takes=takes).practice.config_id == "c"
