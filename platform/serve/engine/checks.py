"""What is refused before it is queued."""

import math

from lorafleet.core.errors import InvalidRequest
from lorafleet.serve.engine.bank import AdapterBank
from lorafleet.serve.engine.init_image import first_step
from lorafleet.serve.engine.job import Job


def check_job(job: Job, bank: AdapterBank | None, *, reuses_steps: bool) -> None:
    """Raises InvalidRequest for what no step could ever be taken for."""
    if job.request.step_reuse > 1 and not reuses_steps:
        raise InvalidRequest(
            "step_reuse must be 1, nothing else is served here: set engine.step_reuse=true", param="step_reuse"
        )
    _check_image(job)
    _check_adapters(job, bank)


def _check_image(job: Job) -> None:
    """Raises InvalidRequest unless there is an image where one is needed, and a step left to take."""
    if job.mask is not None and job.init_image is None:
        raise InvalidRequest("mask needs init_image, the picture that it is a mask of", param="mask")
    steps = job.request.steps
    if job.init_image is not None and not (0 <= job.strength <= 1 and first_step(steps, job.strength) < steps):
        raise InvalidRequest(
            f"strength must be from 1/steps = {1 / steps:.3g} to 1, so that a step is left to take, "
            f"not {job.strength:g}",
            param="strength",
        )


def _check_adapters(job: Job, bank: AdapterBank | None) -> None:
    """Raises InvalidRequest for adapters that will never be in slots together."""
    if not job.adapters:
        return
    keys = {adapter.key for adapter in job.adapters}
    if bank is None:
        fault = "adapters are not served here: set engine.bank"
    elif len(job.adapters) > bank.config.per_row:
        fault = f"adapters are {len(job.adapters)}, an image may combine {bank.config.per_row}: see engine.bank.per_row"
    elif not bank.can_hold(keys):
        fault = f"adapters are {len(keys)} different ones, more than there are slots: raise engine.bank.slots"
    elif bad := [adapter for adapter in job.adapters if not math.isfinite(adapter.weight)]:
        fault = f"adapters need a finite number as weight, {bad[0].key} has {bad[0].weight}"
    else:
        return
    raise InvalidRequest(fault, param="adapters")
