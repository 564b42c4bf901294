"""From a v0 recipe to the v1 recipe that does the same, and what is not quite the same."""

from __future__ import annotations

from typing import Any

from slim_core.errors import SchemaValidateError
from slim_core.migration import Migration
from slim_core.quantization.kinds import LayerKind
from slim_core.recipe import Recipe, recipe_from_dict
from slim_llm.v0.linears import Linears, translate_linears
from slim_llm.v0.remarks import Remarks
from slim_llm.v0.schema import DEFAULT_DATASET, CalibConfig, SpecV0
from slim_llm.v0.smoothing import translate_smoothing

__all__ = ["migrate"]

_TARGET = "modelslim_v1"
_SUBSTITUTE = "mix_calib.jsonl"
_W8A8_FILES = "unlike those of v0, W8A8 layers come without weight_scale and weight_offset, which engines ignore"
_FILE_NAMES = "files are named quant_model_weights*, whatever the type"


def migrate(recipe: Recipe) -> Migration:
    """The v1 recipe that does what this v0 recipe asks for.

    Raises:
        SchemaValidateError: a field is unknown, has a wrong value, contradicts another, or asks for something that v1
            does not have; names every problem with line and field.
    """
    spec = recipe.spec(SpecV0)
    remarks = Remarks()
    linears = translate_linears(spec, remarks)
    smoothing = translate_smoothing(spec.anti_cfg, spec.calib_cfg, linears.kinds, remarks)
    _note_calib(spec.calib_cfg, linears, remarks)
    _note_params(spec, recipe, remarks)
    process = [smoothing] if smoothing else []
    process += linears.processors + _attention(spec.calib_cfg, remarks)
    needs_data = _needs_data(spec.calib_cfg, linears)
    dataset = _dataset(recipe, spec, remarks, needs_data=needs_data, smooths=smoothing is not None)
    body: dict[str, Any] = {
        "runner": "auto",
        "process": process,
        "save": [{"type": "ascendv1_saver", "part_file_size": spec.calib_save_params.part_file_size or 0}],
    }
    if dataset is not None:
        body["dataset"] = dataset
    metadata = recipe.metadata.model_dump(mode="json", exclude_unset=True)
    data = {"apiversion": _TARGET, **({"metadata": metadata} if metadata else {}), "spec": body}
    differs = [_W8A8_FILES] if LayerKind.W8A8 in linears.kinds else []
    return Migration(
        source=recipe,
        recipe=recipe_from_dict(data, where=f"{recipe.document.name} as {_TARGET}"),
        approximations=tuple(dict.fromkeys(remarks.approximations)),
        dropped=tuple(dict.fromkeys(remarks.dropped)),
        differences=(*differs, _FILE_NAMES),
    )


def _attention(calib: CalibConfig, remarks: Remarks) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if calib.use_kvcache_quant:
        remarks.approximate(
            "calib_cfg.use_kvcache_quant",
            "keys are observed as they enter the cache, after the rotary embedding, which is what the engine "
            "quantizes; v0 observed the output of k_proj",
        )
        found.append(
            {
                "type": "dynamic_cache",
                "qconfig": {"dtype": "int8", "scope": "per_channel", "symmetric": calib.kv_sym, "method": "minmax"},
            }
        )
    if calib.use_fa_quant:
        found.append(
            {
                "type": "fa3_quant",
                "qconfig": {"dtype": "int8", "scope": "per_head", "symmetric": True, "method": "minmax"},
            }
        )
    return found


def _note_calib(calib: CalibConfig, linears: Linears, remarks: Remarks) -> None:
    """What of ``calib_cfg`` is only approximated, or has no effect."""
    _note_engine(calib, remarks)
    _note_unread(calib, linears, remarks)
    static = any(kind.has_static_input for kind in linears.kinds)
    if static and calib.act_method == 3:
        remarks.approximate(
            "calib_cfg.act_method", "3 chose minmax or histogram for each layer; every layer gets histogram"
        )
    if LayerKind.W8A8_MIX in linears.kinds and calib.act_method != 1:
        remarks.approximate(
            "calib_cfg.act_method",
            "histogram is kept with pdmix, which modelslim_v1 of msModelSlim itself would refuse",
        )
    if "mm_tensor" not in calib.model_fields_set and not calib.in_groups and calib.kind is not LayerKind.W4A8_DYNAMIC:
        remarks.approximate(
            "calib_cfg.mm_tensor",
            "left out, it meant one scale per weight tensor; each output channel gets its own, which is more exact "
            "(write false to say so)",
        )
    if calib.pr != 1:
        remarks.approximate("calib_cfg.pr", f"{calib.pr:g} is taken as 1: activations are not left out at random")
    if not calib.disable_last_linear:
        remarks.approximate(
            "calib_cfg.disable_last_linear", "the head stays in floating point: only decoder blocks are quantized"
        )


def _note_engine(calib: CalibConfig, remarks: Remarks) -> None:
    """The engines of v0, which v1 does not have as such."""
    if calib.is_lowbit and calib.bits[0] == 8:
        remarks.approximate("calib_cfg.is_lowbit", f"{calib.kind} layers are made in the ordinary way")
    if calib.kind is LayerKind.W8A8S and calib.is_lowbit and not calib.open_outlier:
        remarks.approximate("calib_cfg.open_outlier", "W8A8S layers always treat outliers apart; false is ignored")
    if calib.sparse_engine and calib.is_dynamic:
        remarks.approximate("calib_cfg.is_dynamic", "co_sparse makes W8A8S layers, whose activations are static")
    if calib.kind is LayerKind.W8A8_DYNAMIC and calib.pdmix:
        remarks.approximate("calib_cfg.pdmix", "is_dynamic comes first: layers are W8A8_DYNAMIC throughout")


def _note_unread(calib: CalibConfig, linears: Linears, remarks: Remarks) -> None:
    """The fields that are given without effect, as they stand in the recipe."""
    given = calib.model_fields_set
    sparse = calib.kind is LayerKind.W8A8S
    sigma = sparse and calib.is_lowbit and calib.use_sigma
    static = any(kind.has_static_input for kind in linears.kinds)
    grouped = calib.in_groups or LayerKind.W4A8_DYNAMIC in linears.kinds
    unread: dict[str, tuple[bool, str]] = {
        "act_method": (not static and calib.act_method != 1, "no linear has static activations"),
        "is_dynamic": (calib.is_dynamic and calib.bits[1] == 16, "activations stay in floating point"),
        "kv_sym": (not calib.use_kvcache_quant, "use_kvcache_quant is false"),
        "fa_amp": (True, "no attention falls back to floating point" if calib.fa_amp else ""),
        "co_sparse": (calib.is_lowbit and calib.co_sparse, "is_lowbit overrides it"),
        "use_sigma": (calib.use_sigma and not sigma, "only is_lowbit with W8A8S layers reads it"),
        "sigma_factor": (not sigma, "only use_sigma reads it"),
        "fraction": (not sparse or sigma, "use_sigma overrides it" if sigma else "only W8A8S layers read it"),
        "open_outlier": (not calib.open_outlier and not calib.is_lowbit, "only is_lowbit reads it"),
        "group_size": (not grouped, "no weight is in groups"),
        "percdamp": (calib.w_method != "GPTQ", "only w_method GPTQ reads it"),
        "pr": (calib.pr == 1, ""),
        "dev_type": (True, ""),
        "dev_id": (True, ""),
    }
    if calib.sparse_engine:
        unread["w_bit"] = (calib.w_bit != 4, "co_sparse sets it to 4")
        unread["a_bit"] = (calib.a_bit != 8, "co_sparse sets it to 8")
    for name in type(calib).model_fields:
        idle, why = unread.get(name, (False, ""))
        if name in given and idle:
            remarks.drop(f"calib_cfg.{name}", why)


def _note_params(spec: SpecV0, recipe: Recipe, remarks: Remarks) -> None:
    """What of the fields beside ``calib_cfg`` is only approximated, or has no effect."""
    if count := spec.calib_params.fallback:
        remarks.approximate(
            "calib_params.disable_level",
            f"{spec.calib_params.disable_level} kept the {count} most sensitive linears in floating point; Slim "
            "chooses none, so they are quantized. Name linears in disable_names; report.html has the error of each",
        )
    for path, given in (
        ("anti_params.norm_class_name", "norm_class_name" in spec.anti_params.model_fields_set),
        ("calib_save_params.safetensors_name", "safetensors_name" in spec.calib_save_params.model_fields_set),
        ("batch_size", "batch_size" in spec.model_fields_set),
    ):
        if given:
            remarks.drop(path)
    for key in recipe.extra:
        remarks.dropped.append(f"{key} (a free block; its aliases are written out where they stand)")


def _needs_data(calib: CalibConfig, linears: Linears) -> list[str]:
    """The fields that make calibration data necessary, smoothing aside."""
    found: list[str] = []
    if any(kind.has_static_input for kind in linears.kinds):
        found.append("static activations")
    if calib.w_method == "GPTQ" and linears.kinds - {LayerKind.FLOAT}:
        found.append("w_method GPTQ")
    if calib.use_kvcache_quant:
        found.append("use_kvcache_quant")
    if calib.use_fa_quant:
        found.append("use_fa_quant")
    return found


def _dataset(recipe: Recipe, spec: SpecV0, remarks: Remarks, *, needs_data: list[str], smooths: bool) -> str | None:
    """The one calibration set of the v1 recipe; None if nothing reads it."""
    anti, calib = spec.anti_dataset, spec.calib_dataset
    if anti is not None and not smooths:
        remarks.drop("anti_dataset", "nothing is smoothed")
    if calib is None:
        wants = [*needs_data, *(["smoothing"] if smooths and anti is None else [])]
        if wants:
            raise SchemaValidateError(
                f"is null, but calibration data is needed for {' and '.join(wants)}",
                where=f"{recipe.document.where(('spec', 'calib_dataset'))}: spec.calib_dataset",
                remedy="name a set",
            )
        return anti if smooths else None
    if not needs_data and not smooths:
        return calib if "calib_dataset" in spec.model_fields_set else None
    if smooths and anti is not None and anti != calib:
        remarks.approximate(
            "anti_dataset", f"one set serves the whole run: smoothing, too, is calibrated on {calib!r}, not on {anti!r}"
        )
    if calib == DEFAULT_DATASET and "calib_dataset" not in spec.model_fields_set:
        remarks.approximate(
            "calib_dataset",
            f"left out, it meant {DEFAULT_DATASET}, which is not part of Slim; {_SUBSTITUTE} takes its place",
        )
        return _SUBSTITUTE
    return calib
