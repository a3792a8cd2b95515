"""One stage of a ring: the same class is a whole instance, a leader, a middle and a last stage.

    stage 0, the leader      stage 1 ..              stage k - 1, the last
    moves                    moves                   moves
    embed                                                            hidden rows
    layers      --[M]-->     layers      --[M]-->    layers          of all tokens [M],
    head   <---------------[R]-----------------------                of those that sample [R]
    sample

A stage's role follows from its layers, which tile 0..L over the group (`kunserve.core.layout`): who
has layer 0 leads, who has layer L - 1 is last, and a whole instance is both at once (design
section 1). What it computes is the same to the bit wherever the layers are cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from kunserve.core.errors import AccountingError, LayoutError
from kunserve.core.layout import LayerRange
from kunserve.core.step import BlockMove, Chunk, SampledToken, StepPlan, StepResult
from kunserve.device.kernels.base import Kernels
from kunserve.worker.batch import StepInputs, build_step_inputs
from kunserve.worker.blocks import copy_blocks
from kunserve.worker.decoder import Decoder, FloatArray, StepCancelledError
from kunserve.worker.sampler import Sampler, SamplingFailure


class StageExecutor:
    """Runs this instance's share of steps. Used by one thread at a time.

    The leader keeps the sampling state of running requests beside the head; it follows
    `StepPlan.started` and `StepPlan.released` in `run_head`, which is called in step order, so a
    plan may be on its way around the ring while the one before it has not been sampled.

    Args:
        decoder: has an address for every part and layer that `configure` may ever name; what it
            runs now is this stage's first range.
    """

    def __init__(self, decoder: Decoder, kernels: Kernels) -> None:
        self._decoder = decoder
        self._kernels = kernels
        self._spec = decoder.spec
        self.configure(decoder.layers)

    def configure(self, layers: LayerRange) -> None:
        """Take another place in a group, with no request started. No step may be under way.

        The caller maps the parts and KV of `layers`, and for a leader embedding and head, before
        the next step.

        Raises:
            LayoutError: the model has no such layers.
            AccountingError: a layer has no address.
        """
        if not 0 <= layers.start < layers.stop <= self._spec.num_layers:
            raise LayoutError(
                f"a stage of layers [{layers.start}, {layers.stop}) of {self._spec.num_layers}"
            )
        self._decoder = self._decoder.for_layers(layers)
        # A leader's requests all start anew at a new epoch: nothing of the last one may stay.
        self._sampler = Sampler(self._spec.vocab_size, self._spec.eos_token_ids)

    @property
    def layers(self) -> LayerRange:
        """What this stage computes."""
        return self._decoder.layers

    @property
    def is_leader(self) -> bool:
        """True for stage 0, which embeds, samples and schedules."""
        return self.layers.start == 0

    @property
    def is_last(self) -> bool:
        """True for the stage whose rows go to the head."""
        return self.layers.stop == self._spec.num_layers

    def run_first(self, plan: StepPlan, cancelled: Callable[[], bool]) -> StepResult | FloatArray:
        """The leader's moves, embedding and layers.

        `cancelled` is asked before every layer, and before the head where it follows at once.

        Returns:
            Hidden rows [M, hidden_size] of all tokens for the next stage; or, in a group of one
            stage and whenever the step was cancelled, the step's result.

        Raises:
            AccountingError: this stage does not lead, a table does not fit its positions, or the
                plan does not fit what was started.
        """
        self._check_role(self.is_leader, "embeds")
        try:
            inputs = build_step_inputs(plan.chunks, self._decoder.block_size)
            hidden = self._decoder.embed(inputs.token_ids)
            self._run_layers(inputs, plan.moves, hidden, cancelled)
            if self.is_last and cancelled():
                raise StepCancelledError("the step was cancelled before its head")
        except StepCancelledError:
            return StepResult(plan.epoch, plan.step, (), cancelled=True)
        return self.run_head(plan, hidden[inputs.sample_rows]) if self.is_last else hidden

    def run_stage(
        self,
        chunks: Sequence[Chunk],
        moves: Sequence[BlockMove],
        hidden: FloatArray,
        cancelled: Callable[[], bool],
    ) -> FloatArray:
        """A later stage's moves and layers. `cancelled` is asked before every layer.

        Args:
            chunks: those of the plan; of their tokens only the number counts (`without_tokens`).
            hidden: float32 [M, hidden_size] as the stage before returned it. Of no use afterwards:
                computed on in place unless it is read-only, as what came from a peer may be.

        Returns:
            Hidden rows of all tokens [M, hidden_size]; from the last stage, of those that sample
            [R, hidden_size], in the order of the chunks.

        Raises:
            StepCancelledError: `cancelled` said so. The leader is told nothing.
            AccountingError: this stage leads, or a table does not fit its positions.
            KernelArgumentError: `hidden` is of another shape or type.
        """
        self._check_role(not self.is_leader, "takes hidden rows")
        inputs = build_step_inputs(chunks, self._decoder.block_size)
        rows = np.require(hidden, requirements=("C", "A", "W"))
        self._run_layers(inputs, moves, rows, cancelled)
        return rows[inputs.sample_rows] if self.is_last else rows

    def run_head(self, plan: StepPlan, sample_hidden: FloatArray) -> StepResult:
        """The leader's end of a step: final norm, head and sampling, in the order of the steps.

        `sample_hidden` [R, hidden_size], one row for each chunk that samples, stays as it is.

        Raises:
            AccountingError: this stage does not lead, there are not R rows, or the plan does not
                fit what was started.
            InvalidRequestError: a started request can never be sampled (see `Sampler.start`).
        """
        self._check_role(self.is_leader, "samples")
        rows = [(chunk.request_id, chunk.output_index) for chunk in plan.chunks if chunk.samples]
        if sample_hidden.shape != (len(rows), self._spec.hidden_size):
            raise AccountingError(
                f"step {plan.step} samples {len(rows)} rows of {self._spec.hidden_size}, got "
                f"{sample_hidden.shape}"
            )
        for request_id in plan.released:
            self._sampler.release(request_id)
        for request in plan.started:
            self._sampler.start(request)
        drawn = self._sampler.sample(
            self._decoder.logits(sample_hidden, np.arange(len(rows))), rows
        )
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

    def execute(self, plan: StepPlan, cancelled: Callable[[], bool]) -> StepResult:
        """A whole step of a group of one stage: see `run_first`.

        Raises:
            AccountingError: this is one stage of several, or as `run_first`.
        """
        self._check_role(self.is_leader and self.is_last, "computes a step alone")
        result = self.run_first(plan, cancelled)
        assert isinstance(result, StepResult)  # of a leader that is also last
        return result

    def _run_layers(
        self,
        inputs: StepInputs,
        moves: Sequence[BlockMove],
        hidden: FloatArray,
        cancelled: Callable[[], bool],
    ) -> None:
        batch = self._kernels.prepare_batch(inputs.batch)
        # All layers first: a step that is cancelled and never comes again has not moved a block in
        # some layers only.
        copy_blocks(moves, self._decoder.kv_bases, self._decoder.kv_block_bytes)
        self._decoder.run_layers(hidden, batch, cancelled)

    def _check_role(self, fits: bool, action: str) -> None:
        if not fits:
            raise AccountingError(
                f"the stage of layers [{self.layers.start}, {self.layers.stop}) of "
                f"{self._spec.num_layers} is not the one that {action}"
            )
