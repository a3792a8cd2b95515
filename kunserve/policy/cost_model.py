"""What a step costs, as a function of its chunks (paper section 5 on lookahead, design section 5).

    attention(p, c) = alpha * (p*c + (c*c + c)/2)     token pairs that a chunk looks at
                    + delta * (p + c)                 its KV, read once
    linear(M)       = overlap(gamma, beta * M, q)     all M tokens of the step
    layers          = linear + sum of attention       a stage with n of the L layers: n/L of it
    head            = overlap(head_gamma, head * R, head_q)     R rows that sample; 0 if R is 0
    step            = layers + head                   the head is the leader's alone

    overlap(read, compute, q) = (read^q + compute^q)^(1/q)

p is the prefix (tokens already computed), c the tokens of the chunk. `gamma` and `head_gamma` are
the reads of the weights, once for the whole batch, `beta` and `head` the arithmetic of a row. The
sharpness q says how well one hides behind the other: at 1 they add up, towards infinity the longer
one counts alone. On a CPU q is 2 to 4: up to some eight rows the arithmetic is almost free.

So a step costs less than its chunks by themselves would suggest, and what a chunk adds depends on
the chunks beside it: `StepCost` adds them up one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from kunserve.core.errors import ConfigError, LayoutError
from kunserve.policy.overlap import Measured, OverlapFit, fit_overlap, fit_sum, overlap_ns


class ChunkShape(NamedTuple):
    """What the cost of a chunk depends on. `samples`: its last row goes through the head."""

    prefix_tokens: int
    chunk_tokens: int
    samples: bool = False


class StepSample(NamedTuple):
    """One measured step of a whole instance: the chunks it computed and the time it took.

    Layers and head apart, so that the time of any stage follows. `head_ns` of a step without a row
    that samples is ignored.
    """

    chunks: tuple[ChunkShape, ...]
    layers_ns: int
    head_ns: int = 0

    @property
    def elapsed_ns(self) -> int:
        """Time of the step."""
        return self.layers_ns + (self.head_ns if self.sampled_rows else 0)

    @property
    def sampled_rows(self) -> int:
        """Rows that went through the head."""
        return sum(chunk.samples for chunk in self.chunks)


@dataclass(frozen=True)
class CostModel:
    """Fitted constants of one model on one instance or on one stage, in nanoseconds.

    Raises:
        ConfigError: a constant is negative, so that costs would not grow with the work.
    """

    alpha_ns: float
    """Per pair of tokens in attention."""
    delta_ns: float
    """Per token of context that is read, computed or new."""
    beta_ns: float
    """Per computed token, in the linear layers."""
    gamma_ns: float
    """Per step, in the layers."""
    head_gamma_ns: float = 0.0
    """Per step in which some row samples, in the head."""
    head_ns: float = 0.0
    """Per row that samples."""
    sharpness: float = 1.0
    """How well `gamma_ns` and the time of all tokens overlap, at least 1: not at all."""
    head_sharpness: float = 1.0
    """How well `head_gamma_ns` and the time of all rows that sample overlap."""

    def __post_init__(self) -> None:
        for field in fields(self):
            least, value = 0.0 if field.name.endswith("_ns") else 1.0, getattr(self, field.name)
            if not least <= value < math.inf:  # NaN is refused as well
                raise ConfigError(
                    f"{field.name} must be at least {least:g}, got {value}; fit it again"
                )

    @property
    def fixed_ns(self) -> float:
        """Cost that a step which samples never falls below, however small its chunks."""
        return self.gamma_ns + self.head_gamma_ns

    def scaled(self, factor: float) -> CostModel:
        """The same instance where everything takes `factor` times as long."""
        return self._scaled(factor, factor)

    def _scaled(self, layers_factor: float, head_factor: float) -> CostModel:
        return replace(
            self,
            alpha_ns=self.alpha_ns * layers_factor,
            delta_ns=self.delta_ns * layers_factor,
            beta_ns=self.beta_ns * layers_factor,
            gamma_ns=self.gamma_ns * layers_factor,
            head_gamma_ns=self.head_gamma_ns * head_factor,
            head_ns=self.head_ns * head_factor,
        )

    def for_stage(self, num_layers_held: int, num_layers: int, is_leader: bool) -> CostModel:
        """The cost model of one stage, fitted on whole instances (design section 5).

        Args:
            num_layers_held: layers of the stage.
            num_layers: layers of the model, as many as this cost model is of.
            is_leader: the stage runs the head.

        Raises:
            LayoutError: a stage has 1..`num_layers` layers.
        """
        if not 1 <= num_layers_held <= num_layers:
            raise LayoutError(
                f"a stage of a model of {num_layers} layers cannot hold {num_layers_held} of them"
            )
        return self._scaled(num_layers_held / num_layers, 1.0 if is_leader else 0.0)

    def stage_ns(
        self, chunks: Iterable[ChunkShape], num_layers_held: int, num_layers: int, is_leader: bool
    ) -> float:
        """Cost of one step on one stage; arguments and errors as in `for_stage`."""
        return self.for_stage(num_layers_held, num_layers, is_leader).step_ns(chunks)

    def attention_ns(self, prefix_tokens: int, chunk_tokens: int) -> float:
        """Cost of one chunk's attention in all layers, whatever else the step computes."""
        pairs = prefix_tokens * chunk_tokens + (chunk_tokens * chunk_tokens + chunk_tokens) // 2
        return self.alpha_ns * pairs + self.delta_ns * (prefix_tokens + chunk_tokens)

    def linear_ns(self, tokens: float) -> float:
        """Cost of the linear layers of a step that computes `tokens` tokens in all."""
        return overlap_ns(self.gamma_ns, self.beta_ns * tokens, self.sharpness)

    def head_step_ns(self, rows: float) -> float:
        """Cost of the head of a step in which `rows` rows sample; 0 if there is none."""
        if rows == 0:
            return 0.0
        return overlap_ns(self.head_gamma_ns, self.head_ns * rows, self.head_sharpness)

    def chunk_ns(self, prefix_tokens: int, chunk_tokens: int, samples: bool = False) -> float:
        """The most that a chunk adds to a step, which is what it adds to a large one.

        A small step that reads weights most of the time takes it in for less (`StepCost`).
        """
        cost_ns = self.attention_ns(prefix_tokens, chunk_tokens) + self.beta_ns * chunk_tokens
        return cost_ns + self.head_ns if samples else cost_ns

    def step_ns(self, chunks: Iterable[ChunkShape]) -> float:
        """Cost of one step that computes `chunks`."""
        step = StepCost(self)
        for chunk in chunks:
            step.add(chunk)
        return step.total_ns

    def largest_chunk(self, budget_ns: float, prefix_tokens: int, limit_tokens: int) -> int:
        """Most tokens, 0..`limit_tokens`, that add at most `budget_ns` to any step.

        The inverse of `chunk_ns` in `chunk_tokens`, without the head.
        """
        return _most_tokens(
            lambda tokens: self.chunk_ns(prefix_tokens, tokens) <= budget_ns, limit_tokens
        )

    @classmethod
    def fit(cls, samples: Sequence[StepSample]) -> CostModel:
        """Least squares on the relative error, with no constant below zero.

        Relative, because decode steps are short and prefill steps long, and both must be
        predicted. Layers and head are fitted apart.

        Raises:
            ConfigError: there is no sample, or a sample without time.
        """
        return cls._fitted(samples, fit_overlap, _measured_layers)

    @classmethod
    def fit_token_count(cls, samples: Sequence[StepSample]) -> CostModel:
        """Least squares where the layers cost a constant and so much a token, whatever they attend
        to: what a fixed token budget assumes (paper section 5). Raises as `fit`.
        """
        return cls._fitted(samples, fit_sum, _measured_tokens)

    @classmethod
    def _fitted(
        cls,
        samples: Sequence[StepSample],
        fit: Callable[[Sequence[Measured]], OverlapFit],
        measured_layers: Callable[[StepSample], Measured],
    ) -> CostModel:
        with_head = [sample for sample in samples if sample.sampled_rows]
        if not samples:
            raise ConfigError("the cost model needs at least one measured step")
        if any(sample.layers_ns <= 0 for sample in samples) or any(
            sample.head_ns <= 0 for sample in with_head
        ):
            raise ConfigError("a measured step took no time; measure again")
        layers = fit([measured_layers(sample) for sample in samples])
        heads = [Measured((), sample.sampled_rows, sample.head_ns) for sample in with_head]
        head = fit(heads) if heads else OverlapFit((), 0.0, 0.0, 1.0)
        alpha_ns, delta_ns = layers.constants_ns or (0.0, 0.0)
        return cls(
            alpha_ns=alpha_ns,
            delta_ns=delta_ns,
            beta_ns=layers.unit_ns,
            gamma_ns=layers.read_ns,
            head_gamma_ns=head.read_ns,
            head_ns=head.unit_ns,
            sharpness=layers.sharpness,
            head_sharpness=head.sharpness,
        )

    def relative_error(self, sample: StepSample) -> float:
        """(predicted - measured) / measured of one step."""
        return self.step_ns(sample.chunks) / sample.elapsed_ns - 1.0


class StepCost:
    """The cost of a step that is being formed: chunks are added one at a time.

    A step without a chunk costs one read of the layers.
    """

    def __init__(self, model: CostModel) -> None:
        self._model = model
        self._attention_ns = 0.0
        self._tokens = 0
        self._rows = 0

    @property
    def total_ns(self) -> float:
        """Cost of the chunks added so far, in one step: `CostModel.step_ns` of them."""
        return self._layers_ns(self._attention_ns, 0) + self._model.head_step_ns(self._rows)

    @property
    def sampled_rows(self) -> int:
        """Rows that go through the head."""
        return self._rows

    def add(self, chunk: ChunkShape) -> None:
        """Compute `chunk` in this step too."""
        self._attention_ns += self._model.attention_ns(chunk.prefix_tokens, chunk.chunk_tokens)
        self._tokens += chunk.chunk_tokens
        self._rows += chunk.samples

    def with_chunk_ns(self, chunk: ChunkShape) -> float:
        """`total_ns` as it would be with `chunk`; less `total_ns`, it is what the chunk adds."""
        attention_ns = self._model.attention_ns(chunk.prefix_tokens, chunk.chunk_tokens)
        layers_ns = self._layers_ns(self._attention_ns + attention_ns, chunk.chunk_tokens)
        return layers_ns + self._model.head_step_ns(self._rows + chunk.samples)

    def largest_chunk(self, budget_ns: float, prefix_tokens: int, limit_tokens: int) -> int:
        """Most tokens, 0..`limit_tokens`, after this prefix that keep the step within `budget_ns`.

        The inverse of `with_chunk_ns` for a chunk that does not sample, to the last bit.
        """
        return _most_tokens(
            lambda tokens: self.with_chunk_ns(ChunkShape(prefix_tokens, tokens)) <= budget_ns,
            limit_tokens,
        )

    def _layers_ns(self, attention_ns: float, more_tokens: int) -> float:
        return self._model.linear_ns(self._tokens + more_tokens) + attention_ns


def _most_tokens(fits: Callable[[int], bool], limit_tokens: int) -> int:
    """The largest number in 0..`limit_tokens` that fits, by bisection; 0 need not be asked."""
    if limit_tokens <= 0 or fits(limit_tokens):
        return max(0, limit_tokens)
    fitting, too_many = 0, limit_tokens
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        if fits(middle):
            fitting = middle
        else:
            too_many = middle
    return fitting


def _measured_layers(sample: StepSample) -> Measured:
    """What alpha, delta and beta multiply."""
    pairs = context = computed = 0
    for prefix, tokens, _ in sample.chunks:
        pairs += prefix * tokens + (tokens * tokens + tokens) // 2
        context += prefix + tokens
        computed += tokens
    return Measured((pairs, context), computed, sample.layers_ns)


def _measured_tokens(sample: StepSample) -> Measured:
    return Measured((), _measured_layers(sample).amount, sample.layers_ns)
