"""The real model, scheduler and executor: the same tokens whatever the batch, chunks, memory.

The expected greedy tokens come from transformers (tests/references/generate.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from kunserve.core.ids import RequestId, SlotId
from kunserve.core.request import FinishReason, Request, SamplingParams, TokenOutput
from kunserve.worker.engine import Engine
from tests.support.engines import (
    BLOCK_SIZE,
    CheckedRun,
    open_copy_thread,
    open_embedded_engine,
    renew_kv,
)

pytestmark = pytest.mark.timeout(300)  # a busy machine is slow, not wrong

REFERENCE = Path(__file__).parents[1] / "references" / "smollm2_greedy.json"
NEW_TOKENS = 160
SAMPLED_TOKENS = 32
MAX_MODEL_LEN = 832
SLOT = SlotId(0)
PLENTY_BLOCKS = 280  # every reference prompt with its tokens, at once

# Steps of at most this many tokens: prompts are cut up, and decodes run beside the pieces.
SMALL_STEP_TOKENS = 48


@dataclass(frozen=True)
class Reference:
    """A prompt and the tokens that transformers takes after it, greedily."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


def load_references() -> tuple[Reference, ...]:
    prompts = json.loads(REFERENCE.read_text(encoding="utf-8"))["prompts"]
    return tuple(
        Reference(tuple(each["prompt_token_ids"]), tuple(each["tokens"])) for each in prompts
    )


REFERENCES = load_references()
CHATS, TEXTS = REFERENCES[:8], REFERENCES[8:]  # two of the texts are long
SHORT = tuple(each for each in REFERENCES if len(each.prompt) < 100)
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, seed=0, temperature=0.0, ignore_eos=True)


def greedy_requests(
    references: Sequence[Reference], *, name: str = "greedy", steps_apart: int = 0
) -> list[Request]:
    return [
        Request(RequestId(f"{name}-{n}"), each.prompt, GREEDY, arrival_ns=n * steps_apart)
        for n, each in enumerate(references)
    ]


def sampled_requests(*, steps_apart: int = 0) -> list[Request]:
    return [
        Request(
            RequestId(f"sampled-{n}"),
            each.prompt,
            SamplingParams(
                max_tokens=SAMPLED_TOKENS,
                seed=1000 + n,
                temperature=0.8,
                top_p=0.9,
                logprobs=4,
                ignore_eos=True,
            ),
            arrival_ns=n * steps_apart,
        )
        for n, each in enumerate(SHORT)
    ]


def assert_reference_tokens(
    outputs: dict[RequestId, list[TokenOutput]], references: Sequence[Reference]
) -> None:
    for (request_id, taken), reference in zip(outputs.items(), references, strict=True):
        assert tuple(output.token_id for output in taken) == reference.tokens, request_id
        assert [output.finish for output in taken[:-1]] == [None] * (NEW_TOKENS - 1)
        assert taken[-1].finish is FinishReason.LENGTH


@pytest.fixture(scope="module")
def loaded_engine() -> Iterator[Engine]:
    with open_embedded_engine(kv_blocks=PLENTY_BLOCKS, max_model_len=MAX_MODEL_LEN) as engine:
        yield engine


@pytest.fixture
def engine(loaded_engine: Engine) -> Engine:
    """With all its blocks, and nothing in them."""
    renew_kv(loaded_engine, {SLOT: PLENTY_BLOCKS})
    return loaded_engine


def cancel_every_fifth(step: int) -> int | None:
    """Before all layers in turn, the first and the last too."""
    turn, rest = divmod(step, 5)
    return turn * 7 % 30 if rest == 4 else None


@pytest.mark.parametrize("number", [3, 8, 11])
def test_alone(engine: Engine, number: int) -> None:
    reference = REFERENCES[number]
    run = CheckedRun(engine, max_num_batched_tokens=1024)
    assert_reference_tokens(run.generate(greedy_requests([reference])), [reference])


def test_all_prompts_in_mixed_batches_and_again_from_the_prefix_cache(engine: Engine) -> None:
    run = CheckedRun(engine, max_num_batched_tokens=SMALL_STEP_TOKENS)
    first = run.generate(greedy_requests(REFERENCES, steps_apart=3))
    assert_reference_tokens(first, REFERENCES)
    assert run.mixed_steps > 20
    hits_before = run.load.prefix_hits  # some prompts begin alike

    again = run.generate(greedy_requests(REFERENCES, name="again"))
    assert_reference_tokens(again, REFERENCES)
    cached = (BLOCK_SIZE * ((len(each.prompt) - 1) // BLOCK_SIZE) for each in REFERENCES)
    assert run.load.prefix_hits - hits_before == sum(cached) > 0
    assert run.load.preemptions == 0


def test_preempted_and_computed_again(engine: Engine) -> None:
    renew_kv(engine, {SLOT: 96})
    run = CheckedRun(engine, max_num_batched_tokens=SMALL_STEP_TOKENS, enable_prefix_caching=False)
    assert_reference_tokens(run.generate(greedy_requests(TEXTS)), TEXTS)
    assert run.load.preemptions > 2


def test_preempted_to_host_memory_and_back(engine: Engine) -> None:
    """Copies run beside the steps; sometimes the host is full, and steps are cancelled."""
    renew_kv(engine, {SLOT: 40})
    with open_copy_thread(engine, host_blocks=16) as copies:
        run = CheckedRun(
            engine,
            max_num_batched_tokens=SMALL_STEP_TOKENS,
            cancel_before=cancel_every_fifth,
            copies=copies,
            host_blocks=16,
        )
        some = CHATS[:5]
        assert_reference_tokens(run.generate(greedy_requests(some, steps_apart=2)), some)
    assert run.load.swapped_in > 0
    assert run.load.swap_refused > 0


def test_cancelled_and_lost_steps_while_memory_is_short(engine: Engine) -> None:
    renew_kv(engine, {SLOT: 72})
    run = CheckedRun(
        engine,
        max_num_batched_tokens=SMALL_STEP_TOKENS,
        cancel_before=cancel_every_fifth,
        is_lost=lambda step: step % 5 == 2,
    )
    assert_reference_tokens(run.generate(greedy_requests(CHATS, steps_apart=2)), CHATS)
    assert run.load.preemptions > 0
    assert run.cancelled_steps > 80


def test_sampled_tokens_and_logprobs_are_the_same_alone_batched_and_preempted(
    engine: Engine,
) -> None:
    together = CheckedRun(engine, max_num_batched_tokens=SMALL_STEP_TOKENS)
    batched = together.generate(sampled_requests(steps_apart=2))
    assert together.load.preemptions == 0
    drawn = [output.logprobs for taken in batched.values() for output in taken]
    assert sum(each is not None and each.rank > 1 for each in drawn) > len(drawn) // 20

    for request in sampled_requests()[::4]:
        renew_kv(engine, {SLOT: PLENTY_BLOCKS})
        alone = CheckedRun(engine, max_num_batched_tokens=1024)
        assert alone.generate([request])[request.id] == batched[request.id]

    renew_kv(engine, {SLOT: 40})
    tight = CheckedRun(engine, max_num_batched_tokens=SMALL_STEP_TOKENS)
    assert tight.generate(sampled_requests()) == batched
    assert tight.load.preemptions > 0

    renew_kv(engine, {SLOT: 40})
    with open_copy_thread(engine, host_blocks=200) as copies:
        swapping = CheckedRun(
            engine, max_num_batched_tokens=SMALL_STEP_TOKENS, copies=copies, host_blocks=200
        )
        assert swapping.generate(sampled_requests()) == batched
    assert swapping.load.swapped_in == swapping.load.preemptions > 3
