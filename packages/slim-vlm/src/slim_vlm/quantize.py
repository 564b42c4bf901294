"""Planning and running of ``multimodal_vlm_modelslim_v1``: from a request to a finished folder."""

from __future__ import annotations

from functools import partial
from typing import Any

from slim_core.job import Job, arguments_of, told
from slim_core.ranks.launch import Again
from slim_core.recipe import Recipe
from slim_core.runners.plan import Plan
from slim_core.service import QuantRequest
from slim_vlm.inputs import ImageSamples
from slim_vlm.models import open_vlm
from slim_vlm.recipe import SpecVlm

__all__ = ["job", "job_of_rank"]


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
        del plan
        return recipe.placed(spec.coercions())

    again = Again("slim_vlm.quantize:job_of_rank", arguments_of(request, recipe))
    return Job(request, recipe, spec, model, samples, remarks, again=again, distributes=True)


def job_of_rank(request: dict[str, Any], recipe: dict[str, Any]) -> Job:
    """The same job in the process of another rank."""
    return job(*told(request, recipe))
