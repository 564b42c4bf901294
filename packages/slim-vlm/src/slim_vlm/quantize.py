"""Planning and running of ``multimodal_vlm_modelslim_v1``: from a request to a finished folder."""

from __future__ import annotations

from functools import partial

from slim_core.job import Job
from slim_core.recipe import Recipe
from slim_core.runners.plan import Plan
from slim_core.service import QuantRequest
from slim_vlm.inputs import ImageSamples
from slim_vlm.models import open_vlm
from slim_vlm.recipe import SpecVlm

__all__ = ["job"]


def job(request: QuantRequest, recipe: Recipe) -> Job:
    """The run that a request and its recipe ask for.

    Raises:
        SchemaValidateError: the recipe is invalid.
    """
    spec = recipe.spec(SpecVlm)
    trust = request.trust_remote_code

    model = partial(open_vlm, request.model_path, trust_remote_code=trust)
    samples = partial(ImageSamples, spec.default_text, trust)

    def remarks(plan: Plan) -> list[str]:
        devices = plan.devices
        count, first = len(devices.indices), f"{devices.kind}:{devices.indices[0]}"
        several = [f"--device: {count} devices given, only the first, {first}, is used"] if count > 1 else []
        return [*recipe.placed(spec.coercions()), *several]

    return Job(request, recipe, spec, model, samples, remarks)
