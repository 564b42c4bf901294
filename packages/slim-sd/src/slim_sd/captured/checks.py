"""Whether a file of calibration inputs is of this model and these settings: by its sidecar, or by its shapes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

from torch import Tensor

from slim_core.errors import InvalidDatasetError
from slim_core.logging import get_logger
from slim_sd.captured.archive import RecordArchive
from slim_sd.captured.files import FORMAT_VERSION, json_values, sidecar_file
from slim_sd.captured.pickled import DELETE

__all__ = ["REUSE", "check_structure", "differences_from", "read_sidecar"]

REUSE = "pass --reuse_calib to use it as it is, or delete it, so that the next run captures anew"
_MAX_SIDECAR_BYTES = 1 << 20
_CHANNELS = re.compile(r"channels|hidden_dim|visual_dim|^in_dim")
_TEXT_WIDTHS = ("text_dim", "text_embed_dim", "joint_attention_dim")
_logger = get_logger(__name__)


def read_sidecar(path: Path, reuse: bool) -> dict[str, Any] | None:
    """What the sidecar of a file of records says; None if there is none, or with ``reuse`` if it is damaged.

    Raises:
        InvalidDatasetError: it is damaged.
    """
    sidecar = sidecar_file(path)
    try:
        if not sidecar.exists():
            return None
        with sidecar.open("rb") as stream:
            content = stream.read(_MAX_SIDECAR_BYTES + 1)
        about: Any = json.loads(content) if len(content) <= _MAX_SIDECAR_BYTES else None
    except OSError as error:
        raise InvalidDatasetError(f"cannot be read: {error.strerror}", where=str(sidecar)) from error
    except (ValueError, RecursionError):
        about = None
    if isinstance(about, dict):
        return cast("dict[str, Any]", about)
    if reuse:
        _logger.warning("%s is damaged and not looked at", sidecar)
        return None
    raise InvalidDatasetError(
        f"is damaged, so it does not say what {path.name} was captured from", where=str(sidecar), remedy=REUSE
    )


def differences_from(
    about: dict[str, Any],
    archive: RecordArchive,
    names: Sequence[str],
    fingerprint: str | None,
    settings: Mapping[str, Any] | None,
) -> list[str]:
    """What a sidecar says otherwise, as sentences; ``fingerprint`` and ``settings`` are not compared if None."""
    if about.get("format_version") != FORMAT_VERSION:
        return [f"its sidecar has version {about.get('format_version')!r}, and {FORMAT_VERSION} is known"]
    found: list[str] = []
    if about.get("file") != {"size": archive.nbytes, "digest": archive.digest}:
        found.append("its sidecar belongs to another file")
    if about.get("parameters") != list(names):
        captured = about.get("parameters")
        shown = ", ".join(map(str, cast("list[Any]", captured))) if isinstance(captured, list) else repr(captured)
        found.append(f"the transformer's forward took {shown} and takes {', '.join(names)}")
    if fingerprint is not None and about.get("fingerprint") != fingerprint:
        found.append("the model is another one or has changed")
    if settings is None:
        return found
    captured = about.get("settings")
    before = cast("dict[str, Any]", captured) if isinstance(captured, dict) else {}
    now = json_values(settings)
    missing = object()
    found.extend(
        f"{key} was {_shown(before.get(key, missing), missing)} and is {_shown(now.get(key, missing), missing)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, missing) != now.get(key, missing)
    )
    return found


def _shown(value: Any, missing: object) -> str:
    text = "not given" if value is missing else repr(value)
    return text if len(text) <= 80 else f"{text[:76]}...{text[-1]}"


def check_structure(arguments: Mapping[str, Any], config: Mapping[str, Any], where: str) -> None:
    """Hold a record of unknown origin against the transformer: kinds, ranks, channels, width of the text.

    Channels may be any number that the configuration has for some: not every class calls those of its latents so.
    """
    hidden = arguments.get("hidden_states")
    if "hidden_states" in arguments:
        if not isinstance(hidden, Tensor) or not 3 <= hidden.ndim <= 6 or not hidden.is_floating_point():
            _misfit(where, "hidden_states", hidden, "a tensor of floats with 3 to 6 dimensions")
        channels = config.get("in_channels")
        known = {value for name, value in config.items() if isinstance(value, int) and _CHANNELS.search(name)}
        # (batch, tokens, channels), (batch, channels, height, width), in videos frames before or behind them, or last
        places = hidden.shape[1:3] + (hidden.shape[-1:] if hidden.ndim > 4 else ())
        packed = hidden.ndim == 3 and isinstance(channels, int) and hidden.shape[2] % channels == 0  # whole patches
        if isinstance(channels, int) and not packed and known.isdisjoint(places):
            _misfit(where, "hidden_states", hidden, f"{channels} channels")
    timestep = arguments.get("timestep")
    if "timestep" in arguments and not (
        (isinstance(timestep, Tensor) and timestep.ndim <= 3) or isinstance(timestep, (int, float))
    ):
        _misfit(where, "timestep", timestep, "a number or a tensor with up to 3 dimensions")
    text = arguments.get("encoder_hidden_states")
    if text is not None:
        width = next((config[name] for name in _TEXT_WIDTHS if isinstance(config.get(name), int)), None)
        if not isinstance(text, Tensor) or not 3 <= text.ndim <= 4:
            _misfit(where, "encoder_hidden_states", text, "a tensor with 3 or 4 dimensions")
        if width is not None and text.shape[-1] != width:
            _misfit(where, "encoder_hidden_states", text, f"{width} numbers per token")


def _misfit(where: str, name: str, found: Any, expected: str) -> NoReturn:
    shown = f"a tensor of shape {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
    raise InvalidDatasetError(
        f"{name} is {shown}, and the transformer takes {expected}",
        where=where,
        remedy=f"it was captured from another model: {DELETE}",
    )
