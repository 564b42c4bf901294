"""What a service is and how it is found.

A *service* serves one ``apiversion`` of the recipe protocol. Packages announce theirs under the entry point group
``slim.services``; a command asks :func:`find_service` for the one that a recipe names. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field, field_validator

from slim_core.budget import UNLIMITED, MemoryBudget, parse_budget
from slim_core.errors import EnvError, UnsupportedError

if TYPE_CHECKING:
    from slim_core.migration import Migration
    from slim_core.progress import Progress
    from slim_core.recipe.base import StrictModel
    from slim_core.runners.plan import Plan
    from slim_core.runners.run import RunResult

__all__ = [
    "EvalRequest",
    "Migrator",
    "QuantRequest",
    "Scores",
    "Service",
    "find_service",
    "installed_services",
    "load_service",
]

SERVICE_GROUP = "slim.services"
_PACKAGES = {
    "modelslim_v0": "slim-llm",
    "modelslim_v1": "slim-llm",
    "multimodal_vlm_modelslim_v1": "slim-vlm",
    "multimodal_sd_modelslim_v1": "slim-sd",
}


class QuantRequest(BaseModel):
    """Everything one quantization run is told. Field names are the long options of the command."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model_path: Path = Field(description="Folder of the floating-point model")
    save_path: Path = Field(description="Folder for the quantized checkpoint")
    model_type: str = Field(description="Model name as the practice library knows it, e.g. Qwen2.5-7B-Instruct")
    device: str = Field("npu", description="Device: npu, npu:0, npu:0,1,2,3, cuda, cuda:0, cpu, cpu:0,1")
    config_path: Path | None = Field(None, description="Recipe (YAML); excludes --quant_type")
    quant_type: str | None = Field(None, description="Quantization type, e.g. w8a8; excludes --config_path")
    tag: list[str] = Field(default_factory=list, description="Scenario tags a practice must carry, e.g. vLLM_Ascend")
    trust_remote_code: bool = Field(False, description="Run Python code that ships with the model: True or False")
    dry_run: bool = Field(False, description="Print the plan and stop; writes nothing")
    probe: bool = Field(
        False, description="Try the work for about ten seconds, and say in the plan how long it will take"
    )
    overwrite: bool = Field(False, description="Replace a non-empty save_path once the new output is complete")
    force: bool = Field(False, description="Only warn if no engine can load the result, or the disk seems too small")
    max_memory: str | None = Field(None, description="Memory the run may take, e.g. host=8GiB,device=20GiB")
    resume: bool = Field(False, description="Continue an interrupted run into the same save_path")
    reuse_calib: bool = Field(
        False, description="Use a calib_data.pth though it was captured from another model or with other settings"
    )
    yes: bool = Field(False, description="Answer yes to the question about a fall-back practice")
    debug: bool = Field(False, description="Write debug_info with the statistics of every layer; show tracebacks")

    @field_validator("max_memory")
    @classmethod
    def _is_a_budget(cls, value: str | None) -> str | None:
        if value is not None:
            parse_budget(value)
        return value

    @property
    def memory_budget(self) -> MemoryBudget:
        """What ``max_memory`` says; nothing if it was not given."""
        return UNLIMITED if self.max_memory is None else parse_budget(self.max_memory)


class EvalRequest(BaseModel):
    """What ``slim eval`` is told."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model_path: Path = Field(description="Folder of the floating-point model")
    quantized: Path | None = Field(None, description="Folder that slim quant wrote")
    text: Path | None = Field(None, description="Text file (UTF-8) to score")
    dataset: str | None = Field(None, description="Images with prompts and answers to score, as in a recipe's dataset")
    prompt: str | None = Field(None, description="What a diffusion model generates. Default: what the recipe says")
    config_path: Path | None = Field(
        None, description="Recipe that says what a diffusion model generates. Default: the one in --quantized"
    )
    report: Path | None = Field(None, description="New folder for what a diffusion model generated, and the scores")
    device: str = Field("npu", description="Device: npu, cuda, cpu, with an index if wanted")
    sequence_length: int = Field(512, ge=8, description="Tokens per scored window")
    max_windows: int | None = Field(None, ge=1, description="Score only the first windows, or samples")
    trust_remote_code: bool = Field(False, description="Run Python code that ships with the model: True or False")


class Scores(Protocol):
    """What ``slim eval`` found."""

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows of a table for people."""
        ...

    def as_json(self) -> dict[str, Any]:
        """The same as plain data; numbers that are not finite are None."""
        ...


class Service(Protocol):
    """One ``apiversion``. ``ask`` puts a yes/no question to the user and is only called when ``yes`` is not set.

    A service whose runs take files of ``save_path`` over into their output has their patterns as an attribute
    ``keeps``; a folder that holds nothing else counts as empty. One whose models have a layout of their own has a
    method ``open_original(folder, names, part)``: from the folder of a model, the names of the tensors of the quantized
    one, and what that folder is called, to a ``TensorSource`` that has the model's tensors under such names; ``slim
    verify`` compares with those. If a model may be quantized into several folders, a method ``parts(folder)`` gives
    their names, none for a model that is not.
    """

    apiversion: str

    def practice_folders(self) -> list[Path]:
        """Folders of the practice library that this service brings along."""
        ...

    def pedigree(self, model_type: str) -> str | None:
        """The folder of the practice library that a model name belongs to, None if this service does not know it."""
        ...

    def spec_type(self) -> type[StrictModel]:
        """The typed form of ``spec`` in this protocol."""
        ...

    def handles(self, model_path: Path, *, images: bool = False) -> bool:
        """Whether this service can score the model in this folder, on text or on images."""
        ...

    def plan(self, request: QuantRequest, recipe: Any) -> Plan:
        """The plan of a run; writes nothing."""
        ...

    def quantize(
        self, request: QuantRequest, recipe: Any, progress: Progress, on_plan: Callable[[Plan], None] | None = None
    ) -> RunResult:
        """Run the recipe and write the output; ``on_plan`` is shown the plan before that begins."""
        ...

    def evaluate(self, request: EvalRequest, progress: Progress) -> Scores:
        """Scores of the original and, if asked, of the quantized files."""
        ...


@runtime_checkable
class Migrator(Protocol):
    """What the service of an outdated protocol can do besides: turn its recipes into those of a newer one."""

    def migrate(self, recipe: Any) -> Migration:
        """The equivalent recipe of the newer protocol, and what is not quite the same.

        Raises:
            SchemaValidateError: the recipe is invalid, or asks for something that the newer protocol does not have.
        """
        ...


AskUser = Callable[[str], bool]


def installed_services() -> dict[str, EntryPoint]:
    """Entry points of the installed services by ``apiversion``, none of them loaded."""
    return {point.name: point for point in entry_points(group=SERVICE_GROUP)}


def load_service(point: EntryPoint) -> Service:
    """The service behind an entry point.

    Raises:
        EnvError: it cannot be imported.
    """
    try:
        return point.load()()
    except (ImportError, AttributeError) as error:
        package = point.dist.name if point.dist else point.value
        raise EnvError(
            f"the service {point.name!r} of {package} cannot be imported: {error}",
            remedy=f"pip install --upgrade {package}, or uninstall it",
        ) from error


def find_service(apiversion: str, *, where: str | None = None) -> Service:
    """The service of ``apiversion``.

    Raises:
        UnsupportedError: no installed package serves it; names the package to install if one is known.
        EnvError: a package announces it but cannot be imported.
    """
    services = installed_services()
    if apiversion in services:
        return load_service(services[apiversion])
    if package := _PACKAGES.get(apiversion):
        raise UnsupportedError(
            f"apiversion {apiversion!r} is served by the package {package}, "
            "which does not serve it in this environment",
            where=where,
            remedy=f"pip install --upgrade {package}",
        )
    near = get_close_matches(apiversion, [*_PACKAGES, *services], n=1)
    raise UnsupportedError(
        f"unknown apiversion {apiversion!r}",
        where=where,
        remedy=f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted({*_PACKAGES, *services}))}",
    )
