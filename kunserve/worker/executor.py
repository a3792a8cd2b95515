"""The executor of a whole instance: one plan in, one result out (design section 2)."""

from __future__ import annotations

from collections.abc import Callable

from kunserve.core.step import SampledToken, StepPlan, StepResult
from kunserve.device.kernels.base import Kernels
from kunserve.worker.batch import build_step_inputs
from kunserve.worker.decoder import Decoder, FloatArray, StepCancelledError
from kunserve.worker.sampler import Sampler, SamplingFailure


class Executor:
    """Runs plans on a decoder that holds all layers, the embedding and the head.

    Used by one thread at a time. The sampling state of running requests lives here, beside the
    head, and follows `StepPlan.started` and `StepPlan.released`.
    """

    def __init__(
        self, decoder: Decoder, kernels: Kernels, sampler: Sampler, block_size: int
    ) -> None:
        self._decoder = decoder
        self._kernels = kernels
        self._sampler = sampler
        self._block_size = block_size

    def execute(self, plan: StepPlan, cancelled: Callable[[], bool]) -> StepResult:
        """Compute a plan. `cancelled` is asked before every layer and before the head.

        Raises:
            AccountingError: the plan does not fit what was started, or its tables its positions.
        """
        for request_id in plan.released:
            self._sampler.release(request_id)
        for request in plan.started:
            self._sampler.start(request)
        try:
            logits = self._forward(plan, cancelled)
        except StepCancelledError:
            return StepResult(plan.epoch, plan.step, (), cancelled=True)
        rows = [(c.request_id, c.output_index) for c in plan.chunks if c.samples]
        drawn = self._sampler.sample(logits, rows)
        return StepResult(
            epoch=plan.epoch,
            step=plan.step,
            tokens=tuple(token for token in drawn if isinstance(token, SampledToken)),
            failed=tuple(
                (failure.request_id, failure.message)
                for failure in drawn
                if isinstance(failure, SamplingFailure)
            ),
        )

    def _forward(self, plan: StepPlan, cancelled: Callable[[], bool]) -> FloatArray:
        inputs = build_step_inputs(plan.chunks, self._block_size)
        batch = self._kernels.prepare_batch(inputs.batch)
        hidden = self._decoder.embed(inputs.token_ids)
        self._decoder.run_layers(hidden, batch, cancelled)
        if cancelled():
            raise StepCancelledError("the step was cancelled before its head; schedule it again")
        return self._decoder.logits(hidden, inputs.sample_rows)
