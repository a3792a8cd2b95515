"""The sampler against independent references, and the laws of design.md sections 4 and 5."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kunserve.core.errors import AccountingError, InvalidRequestError
from kunserve.core.ids import RequestId
from kunserve.core.random import uniform
from kunserve.core.request import Request, SamplingParams
from kunserve.core.step import SampledToken
from kunserve.worker.sampler import Row, Sampler, SamplingFailure, draw_token, validate

EOS = 2
VOCAB = 64
FEW = 12
BIG_VOCAB = 49152
U_GRID = [*np.linspace(0.0, 1.0, 257)[:-1].tolist(), 1.0 - 2.0**-53]
BASE = SamplingParams(max_tokens=1000, seed=7)


def make_request(
    params: SamplingParams,
    name: str = "r",
    prompt: Sequence[int] = (5, 6, 5),
    outputs: Sequence[int] = (),
) -> Request:
    return Request(RequestId(name), tuple(prompt), params, 0, tuple(outputs))


def random_row(seed: int, size: int = VOCAB, scale: float = 3.0) -> Row:
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


def sample_one(row: Row, request: Request) -> SampledToken | SamplingFailure:
    """What a fresh sampler gives for the next output of `request`."""
    sampler = Sampler(row.size, (EOS,))
    sampler.start(request)
    (result,) = sampler.sample(row[None, :], [(request.id, len(request.output_token_ids))])
    return result


def token_of(row: Row, request: Request) -> int:
    result = sample_one(row, request)
    assert isinstance(result, SampledToken), result
    return result.token_id


# --- the random numbers ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "token_index", "expected"),
    [
        (0, 0, "0x1.7c0a683afc3d5p-1"),
        (0, 1, "0x1.ffdbbe3f3a714p-3"),
        (1, 0, "0x1.662f750695ecep-2"),
        (42, 7, "0x1.a9138ee82c4a5p-1"),
        (123456789, 1000, "0x1.fe6cf1f331453p-1"),
        (2**64 - 1, 2**32, "0x1.7306015b7dd00p-3"),
    ],
)
def test_uniform_is_pinned(seed: int, token_index: int, expected: str) -> None:
    assert uniform(seed, token_index) == float.fromhex(expected)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40))
def test_uniform_is_a_multiple_of_2_to_the_minus_53_below_1(seed: int, token_index: int) -> None:
    u = uniform(seed, token_index)
    assert 0.0 <= u < 1.0
    assert (u * 2**53).is_integer()


@pytest.mark.parametrize(("seed", "token_index"), [(-1, 0), (0, -1), (2**64, 0)])
def test_uniform_refuses_what_is_not_64_bits(seed: int, token_index: int) -> None:
    with pytest.raises(OverflowError):
        uniform(seed, token_index)


@pytest.mark.parametrize("axis", ["seed", "token_index"])
def test_uniform_is_uniform_along_both_arguments(axis: str) -> None:
    draws = [uniform(i, 3) if axis == "seed" else uniform(3, i) for i in range(20_000)]
    bins = np.histogram(draws, bins=100, range=(0.0, 1.0))[0].tolist()
    assert_fits(dict(enumerate(bins)), dict.fromkeys(range(100), 0.01))
    lag_correlation = np.corrcoef(draws[:-1], draws[1:])[0, 1]
    assert abs(lag_correlation) < 0.03


# --- references -----------------------------------------------------------------------------


def reference_kept(row: Row, params: SamplingParams, slack: float = 0.0) -> list[tuple[int, float]]:
    """(id, weight) of the kept tokens in drawing order, in scalar float64, vLLM's sort path:
    mask by min_p, by the k-th largest, then the tail whose ascending sum is <= 1 - top_p."""
    largest = max(row.tolist())
    weights = {i: math.exp((x - largest) / params.temperature) for i, x in enumerate(row.tolist())}
    kept = {i: w for i, w in weights.items() if w >= params.min_p and w > 0.0}
    if 0 < params.top_k < row.size:
        kth = sorted(row.tolist(), reverse=True)[params.top_k - 1]
        kept = {i: w for i, w in kept.items() if row[i] >= kth}
    if params.top_p == 1.0:
        return sorted(kept.items())
    ascending = sorted(kept, key=lambda i: (float(row[i]), -i))
    total = math.fsum(kept.values())
    tail = [math.fsum(kept[j] for j in ascending[: n + 1]) for n in range(len(ascending))]
    above = [
        i
        for i, mass in zip(ascending, tail, strict=True)
        if mass > (1.0 - params.top_p + slack) * total
    ]
    return [(i, kept[i]) for i in reversed(above or ascending[-1:])]


def reference_position(kept: Sequence[tuple[int, float]], u: float) -> int:
    target = u * math.fsum(weight for _, weight in kept)
    mass = 0.0
    for position, (_, weight) in enumerate(kept):
        mass += weight
        if mass > target:
            return position
    return len(kept) - 1


def assert_draws_as_reference(row: Row, params: SamplingParams, us: Sequence[float]) -> None:
    """Equal tokens, except where the threshold or u lies within 1e-12 of a boundary."""
    candidates = [reference_kept(row, params, slack) for slack in (-1e-12, 0.0, 1e-12)]
    for u in us:
        allowed: set[int] = set()
        for kept in candidates:
            first, last = (reference_position(kept, u + slack) for slack in (-1e-12, 1e-12))
            allowed.update(token_id for token_id, _ in kept[first : last + 1])
        assert draw_token(row, params, u) in allowed, (params, u)


def adjusted_reference(row: Row, request: Request) -> Row:
    """vLLM's min_tokens, logit_bias and `apply_penalties`, dense, in float32 torch."""
    params, outputs = request.params, request.output_token_ids
    logits = torch.from_numpy(row.copy())
    if len(outputs) < params.min_tokens:
        logits[[EOS, *params.stop_token_ids]] = -math.inf
    for token_id, bias in params.logit_bias:
        logits[token_id] += bias
    counts = torch.bincount(torch.tensor(outputs, dtype=torch.long), minlength=row.size)
    seen = counts.bool()
    seen[list(request.prompt_token_ids)] = True
    penalty = torch.tensor(params.repetition_penalty)
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    logits = torch.where(seen, penalized, logits)
    logits -= torch.tensor(params.frequency_penalty) * counts
    logits -= torch.tensor(params.presence_penalty) * counts.bool()
    adjusted: Row = logits.numpy()
    return adjusted


def assert_fits(counts: dict[int, int], probabilities: dict[int, float]) -> None:
    """Chi-square of `counts` within six standard deviations of its mean, and no other token."""
    assert set(counts) <= set(probabilities)
    num_draws = sum(counts.values())
    norm = math.fsum(probabilities.values())
    expected = {i: num_draws * p / norm for i, p in probabilities.items()}
    large = [i for i, e in expected.items() if e >= 5.0]
    chi_square = sum((counts.get(i, 0) - expected[i]) ** 2 / expected[i] for i in large)
    degrees = len(large) - 1
    assert chi_square < degrees + 6.0 * math.sqrt(2.0 * degrees) + 10.0


# --- distributions --------------------------------------------------------------------------

DISTRIBUTIONS = {
    "plain": BASE,
    "cold": replace(BASE, temperature=0.6),
    "hot": replace(BASE, temperature=1.8),
    "top_k": replace(BASE, top_k=10),
    "top_p": replace(BASE, top_p=0.8),
    "min_p": replace(BASE, min_p=0.1),
    "all": replace(BASE, temperature=1.4, top_k=20, top_p=0.9, min_p=0.02),
}


@pytest.mark.parametrize("params", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS.keys())
def test_tokens_of_one_request_follow_the_distribution(params: SamplingParams) -> None:
    row = random_row(1, scale=1.5)
    sampler = Sampler(VOCAB, ())
    sampler.start(make_request(params))
    counts: Counter[int] = Counter()
    for t in range(5_000):
        (result,) = sampler.sample(row[None, :], [(RequestId("r"), t)])
        assert isinstance(result, SampledToken)
        counts[result.token_id] += 1
    assert_fits(counts, dict(reference_kept(row, params)))


def test_first_tokens_of_many_seeds_follow_the_distribution() -> None:
    row = random_row(2, scale=1.5)
    seeds = range(1000, 9000)
    counts = Counter(draw_token(row, BASE, uniform(seed, 0)) for seed in seeds)
    assert_fits(counts, dict(reference_kept(row, BASE)))


# --- truncation -----------------------------------------------------------------------------


@pytest.mark.parametrize("params", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS.keys())
@pytest.mark.parametrize("scale", [0.01, 2.0, 30.0])
def test_inverse_cdf_equals_the_reference(params: SamplingParams, scale: float) -> None:
    assert_draws_as_reference(random_row(3, scale=scale), params, U_GRID)


@settings(max_examples=80, deadline=None)
@given(
    logits=st.lists(
        st.one_of(
            st.sampled_from([0.0, -0.0, 1.0, 2.0, -math.inf, 3.0e38, -3.0e38]),
            st.floats(-30.0, 30.0, width=32),
        ),
        min_size=1,
        max_size=24,
    ).filter(lambda values: max(values) > -math.inf),
    temperature=st.one_of(st.floats(0.05, 3.0), st.sampled_from([1.0, 5e-324, 100.0])),
    top_k=st.integers(0, 30),
    top_p=st.one_of(st.floats(0.0, 1.0, exclude_min=True), st.sampled_from([1.0 - 2**-53, 1.0])),
    min_p=st.one_of(st.just(0.0), st.just(1.0), st.floats(0.0, 1.0)),
)
def test_any_parameters_draw_as_the_reference(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    params = replace(BASE, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    with np.errstate(all="ignore"):
        assert_draws_as_reference(np.array(logits, dtype=np.float32), params, U_GRID[::16])


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.5, 0.9, 0.999, 1.0 - 1e-13, 1.0 - 2.0**-53])
def test_nucleus_without_sorting_the_tail_equals_a_full_sort(top_p: float, scale: float) -> None:
    row = random_row(4, BIG_VOCAB, scale)
    order = np.lexsort((np.arange(row.size), -row))
    mass = np.cumsum(np.exp(row[order].astype(np.float64) - float(row.max())))
    num_kept = 1 + int(np.count_nonzero(mass[:-1] < top_p * mass[-1]))
    for u in U_GRID[:-1:32]:
        position = int(np.count_nonzero(mass[:num_kept] <= u * mass[num_kept - 1]))
        assert draw_token(row, replace(BASE, top_p=top_p), u) == order[position]


def kept_by(row: Row, params: SamplingParams) -> set[int]:
    return {draw_token(row, params, u) for u in U_GRID}


def test_top_k_keeps_all_ties_at_the_kth_logit() -> None:
    row = np.array([1.0, 3.0, 2.0, 2.0, 0.0], dtype=np.float32)
    assert kept_by(row, replace(BASE, top_k=1)) == {1}
    assert kept_by(row, replace(BASE, top_k=2)) == {1, 2, 3}
    assert kept_by(row, replace(BASE, top_k=4)) == {0, 1, 2, 3}
    assert kept_by(row, replace(BASE, top_k=5)) == kept_by(row, BASE) == {0, 1, 2, 3, 4}


def test_top_p_keeps_the_lowest_ids_of_ties_and_at_least_one_token() -> None:
    row = np.array([-0.0, 0.0, -0.0, 0.0], dtype=np.float32)
    assert kept_by(row, replace(BASE, top_p=0.5)) == {0, 1}
    assert kept_by(row, replace(BASE, top_p=0.500001)) == {0, 1, 2}
    assert kept_by(row, replace(BASE, top_p=1e-300)) == {0}


def test_top_p_counts_the_mass_that_top_k_and_min_p_left() -> None:
    row = np.log(np.array([0.4, 0.3, 0.2, 0.1], dtype=np.float32))
    assert kept_by(row, replace(BASE, top_p=0.55)) == {0, 1}
    assert kept_by(row, replace(BASE, top_p=0.55, top_k=2)) == {0}
    assert kept_by(row, replace(BASE, top_p=0.55, min_p=0.7)) == {0}


def test_min_p_is_relative_to_the_best_token() -> None:
    row = np.log(np.array([0.4, 0.3, 0.2, 0.1], dtype=np.float32))
    assert kept_by(row, replace(BASE, min_p=0.45)) == {0, 1, 2}
    assert kept_by(np.zeros(3, dtype=np.float32), replace(BASE, min_p=1.0)) == {0, 1, 2}


def test_candidates_are_drawn_by_id_unless_top_p_orders_them() -> None:
    row = np.array([0.0, 1.0, 2.0], dtype=np.float32)
    for params in (BASE, replace(BASE, top_k=2), replace(BASE, min_p=0.2)):
        tokens = [draw_token(row, params, u) for u in U_GRID]
        assert tokens == sorted(tokens)
    tokens = [draw_token(row, replace(BASE, top_p=0.99), u) for u in U_GRID]
    assert tokens == sorted(tokens, reverse=True)


# --- greedy ---------------------------------------------------------------------------------


def test_greedy_takes_the_lowest_id_of_ties_as_torch_does() -> None:
    rng = np.random.default_rng(5)
    logits = rng.integers(0, 4, (20, 1000)).astype(np.float32)
    expected = torch.argmax(torch.from_numpy(logits), dim=-1).tolist()
    params = replace(BASE, temperature=0.0, top_k=3, top_p=0.1, min_p=0.5)
    assert [token_of(row, make_request(params)) for row in logits] == expected
    assert expected == [int(np.flatnonzero(row == row.max())[0]) for row in logits]


def test_cold_sampling_approaches_greedy() -> None:
    row = random_row(6)
    assert token_of(row, make_request(replace(BASE, temperature=5e-324))) == int(row.argmax())


# --- masks, biases and penalties ------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 50),
    prompt=st.lists(st.integers(0, FEW - 1), max_size=5),
    outputs=st.lists(st.integers(0, FEW - 1), max_size=20),
    presence=st.floats(-2.0, 2.0),
    frequency=st.floats(-2.0, 2.0),
    repetition=st.floats(0.3, 3.0),
    bias=st.dictionaries(st.integers(0, FEW - 1), st.floats(-3.0, 3.0), max_size=5),
    min_tokens=st.integers(0, 20),
    stop_token_ids=st.lists(st.integers(0, FEW - 1), max_size=3),
)
def test_adjusted_logits_give_the_token_of_the_dense_reference(
    seed: int,
    prompt: list[int],
    outputs: list[int],
    presence: float,
    frequency: float,
    repetition: float,
    bias: dict[int, float],
    min_tokens: int,
    stop_token_ids: list[int],
) -> None:
    params = replace(
        BASE,
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
        logit_bias=tuple(bias.items()),
        min_tokens=min_tokens,
        stop_token_ids=tuple(stop_token_ids),
        temperature=0.0,
    )
    row = random_row(seed, FEW, scale=1.0)
    request = make_request(params, prompt=prompt, outputs=outputs)
    adjusted = adjusted_reference(row, request)
    assert token_of(row, request) == int(adjusted.argmax())
    for draw_seed in range(8):
        drawn = replace(request, params=replace(params, temperature=0.9, seed=draw_seed))
        u = uniform(draw_seed, len(outputs))
        assert token_of(row, drawn) == draw_token(adjusted, drawn.params, u)


def test_frequency_counts_outputs_and_presence_does_not() -> None:
    """Tokens 5 and 6 are in the prompt, 5 and 7 in the outputs."""
    row = np.full(VOCAB, -9.0, dtype=np.float32)
    row[[5, 6, 7]] = [4.0, 1.0, 3.5]
    presence = replace(BASE, temperature=0.0, presence_penalty=1.0)
    frequency = replace(BASE, temperature=0.0, frequency_penalty=1.0)
    assert token_of(row, make_request(presence, outputs=[5])) == 7
    assert token_of(row, make_request(presence, outputs=[5, 7, 5, 5])) == 5
    assert token_of(row, make_request(frequency, outputs=[5, 7])) == 5
    assert token_of(row, make_request(frequency, outputs=[5, 7, 5])) == 7
    assert token_of(row, make_request(frequency, outputs=[5, 7] * 4)) == 6


def test_penalties_follow_the_tokens_that_the_sampler_draws() -> None:
    """Each step of a running request equals a request started with the same outputs."""
    params = replace(BASE, frequency_penalty=1.1, presence_penalty=0.3, repetition_penalty=1.2)
    sampler = Sampler(VOCAB, (EOS,))
    sampler.start(make_request(params))
    outputs: list[int] = []
    for t in range(40):
        row = random_row(t % 3)
        (result,) = sampler.sample(row[None, :], [(RequestId("r"), t)])
        assert result == sample_one(row, make_request(params, outputs=outputs))
        assert isinstance(result, SampledToken)
        outputs.append(result.token_id)


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_min_tokens_masks_eos_and_stop_tokens_until_they_are_out(ignore_eos: bool) -> None:
    row = np.zeros(VOCAB, dtype=np.float32)
    row[[EOS, 9, 30]] = [50.0, 40.0, 30.0]
    params = replace(
        BASE, temperature=0.0, min_tokens=2, stop_token_ids=(9, 10**6), ignore_eos=ignore_eos
    )
    assert token_of(row, make_request(params, outputs=[])) == 30
    assert token_of(row, make_request(params, outputs=[1])) == 30
    assert token_of(row, make_request(params, outputs=[1, 1])) == EOS
    assert token_of(row, make_request(replace(params, min_tokens=0))) == EOS


def test_logit_bias_of_100_forces_and_of_minus_100_bans() -> None:
    row = random_row(8)
    forced = replace(BASE, logit_bias=((11, 100.0),))
    banned = replace(BASE, logit_bias=((int(row.argmax()), -100.0),))
    for seed in range(200):
        assert token_of(row, make_request(replace(forced, seed=seed))) == 11
        assert token_of(row, make_request(replace(banned, seed=seed))) != int(row.argmax())


def test_penalties_come_after_bias_and_before_temperature() -> None:
    """Token 5 of the prompt: (1 + 3) / 2 = 2 wins over 1.9; any other order loses."""
    row = np.full(VOCAB, -9.0, dtype=np.float32)
    row[[5, 7]] = [1.0, 2.1]
    params = replace(BASE, temperature=0.0, repetition_penalty=2.0, logit_bias=((5, 3.0),))
    assert token_of(row, make_request(params)) == 7
    row[7] = 1.9
    assert token_of(row, make_request(params)) == 5


# --- logprobs -------------------------------------------------------------------------------


def test_logprobs_are_of_the_raw_logits() -> None:
    row = random_row(9)
    params = replace(
        BASE, temperature=0.3, top_k=2, logprobs=5, logit_bias=((11, 100.0),), min_tokens=3
    )
    result = sample_one(row, make_request(params))
    assert isinstance(result, SampledToken)
    assert result.token_id == 11
    assert result.logprobs is not None
    expected = torch.log_softmax(torch.from_numpy(row).double(), dim=-1)
    assert result.logprobs.logprob == pytest.approx(expected[11].item(), abs=1e-12)
    assert result.logprobs.rank == 1 + int((row > row[11]).sum())
    values, ids = torch.topk(expected, 5)
    assert [i for i, _ in result.logprobs.top] == ids.tolist()
    assert [x for _, x in result.logprobs.top] == pytest.approx(values.tolist(), abs=1e-12)


def test_tied_logprobs_are_listed_by_id_and_share_the_lower_rank() -> None:
    row = np.array([0.0, 2.0, 1.0, 2.0, 1.0, 1.0, -math.inf], dtype=np.float32)
    result = sample_one(row, make_request(replace(BASE, temperature=0.0, logprobs=4)))
    assert isinstance(result, SampledToken)
    assert result.logprobs is not None
    assert result.token_id == 1
    assert result.logprobs.rank == 2  # as vLLM, which counts logprobs >= the token's
    assert [i for i, _ in result.logprobs.top] == [1, 3, 2, 4]


@pytest.mark.parametrize(("logprobs", "num_top"), [(0, 0), (20, 4)])
def test_logprobs_counts_alternatives(logprobs: int, num_top: int) -> None:
    row = np.array([0.0, -math.inf, 1.0, 2.0], dtype=np.float32)
    result = sample_one(row, make_request(replace(BASE, logprobs=logprobs)))
    assert isinstance(result, SampledToken)
    assert result.logprobs is not None
    assert len(result.logprobs.top) == num_top
    if num_top:
        assert result.logprobs.top[-1] == (1, -math.inf)
        assert math.fsum(math.exp(x) for _, x in result.logprobs.top) == pytest.approx(1.0)


def test_no_logprobs_unless_asked_for() -> None:
    result = sample_one(random_row(1), make_request(BASE))
    assert isinstance(result, SampledToken)
    assert result.logprobs is None


# --- a row depends on its own inputs only ---------------------------------------------------


def mixed_params(index: int) -> SamplingParams:
    kinds = [
        {"temperature": 0.0},
        {"temperature": 0.0, "logprobs": 3},
        {"top_p": 0.9},
        {"top_k": 40, "logprobs": 0},
        {"temperature": 1.7, "min_p": 0.01},
        {"frequency_penalty": 0.5, "repetition_penalty": 1.3, "top_p": 0.99, "top_k": 1000},
        {"min_tokens": 9, "logit_bias": ((3, 8.0),), "logprobs": 20},
    ]
    return replace(BASE, seed=index, **kinds[index % len(kinds)])  # type: ignore[arg-type]


def test_a_batch_equals_its_rows_bit_for_bit_in_any_order_and_memory_layout() -> None:
    size, num_rows = 5003, 32  # odd, so that rows differ in alignment
    logits = np.stack([random_row(100 + i, size) for i in range(num_rows)])
    requests = [make_request(mixed_params(i), f"r{i}", outputs=[i, 4]) for i in range(num_rows)]
    alone = [sample_one(row.copy(), r) for row, r in zip(logits, requests, strict=True)]

    def in_batch(order: Sequence[int], arrange: Callable[[Row], Row]) -> None:
        sampler = Sampler(size, (EOS,))
        for request in requests:
            sampler.start(request)
        rows = [(requests[i].id, 2) for i in order]
        assert sampler.sample(arrange(logits[list(order)]), rows) == tuple(alone[i] for i in order)

    in_batch(range(num_rows), np.ascontiguousarray)
    in_batch(np.random.default_rng(0).permutation(num_rows).tolist(), np.asfortranarray)
    in_batch([5, 4, 3], lambda x: np.repeat(x, 2, axis=1)[:, ::2])


def test_logits_are_not_modified() -> None:
    logits = np.stack([random_row(i) for i in range(14)])
    logits.flags.writeable = False
    sampler = Sampler(VOCAB, (EOS,))
    for i in range(14):
        sampler.start(make_request(mixed_params(i), f"r{i}"))
    results = sampler.sample(logits, [(RequestId(f"r{i}"), 0) for i in range(14)])
    assert all(isinstance(result, SampledToken) for result in results)


def test_a_request_goes_on_elsewhere_with_the_same_tokens() -> None:
    """Fail-over, preemption and a repeated step all give the tokens of an undisturbed run."""
    params = replace(BASE, frequency_penalty=2.0, repetition_penalty=1.1, top_p=0.95)
    logits = [random_row(0, scale=2.0)[None, :] for _ in range(12)]

    def run(sampler: Sampler, first: int, last: int) -> list[int]:
        results = [sampler.sample(logits[t], [(RequestId("r"), t)])[0] for t in range(first, last)]
        return [r.token_id for r in results if isinstance(r, SampledToken)]

    undisturbed = Sampler(VOCAB, (EOS,))
    undisturbed.start(make_request(params))
    tokens = run(undisturbed, 0, 12)
    assert len(set(tokens)) > 3

    elsewhere = Sampler(VOCAB, (EOS,))
    elsewhere.start(make_request(params, outputs=tokens[:5]))
    assert run(elsewhere, 5, 12) == tokens[5:]
    assert run(elsewhere, 3, 8) == tokens[3:8]  # cancelled steps, drawn again
    elsewhere.release(RequestId("r"))
    elsewhere.release(RequestId("r"))
    elsewhere.start(make_request(params, outputs=tokens[:8]))
    elsewhere.start(make_request(params, outputs=tokens[:8]))
    assert run(elsewhere, 8, 12) == tokens[8:]


def test_another_seed_gives_other_tokens() -> None:
    row = np.zeros(VOCAB, dtype=np.float32)
    tokens = {token_of(row, make_request(replace(BASE, seed=seed))) for seed in range(40)}
    assert len(tokens) > 20


# --- failures -------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [BASE, replace(BASE, temperature=0.0), mixed_params(6)])
@pytest.mark.parametrize(
    ("bad", "found"),
    [([math.nan], "nan"), ([math.inf], "inf"), ([-math.inf] * VOCAB, "no token above -inf")],
)
def test_bad_logits_fail_their_own_row_only(
    params: SamplingParams, bad: list[float], found: str
) -> None:
    logits = np.stack([random_row(i) for i in range(3)])
    logits[1, -len(bad) :] = bad
    sampler = Sampler(VOCAB, (EOS,))
    rows = [(RequestId(name), 0) for name in "abc"]
    for request_id, _ in rows:
        sampler.start(make_request(params, request_id))
    first, failed, last = sampler.sample(logits, rows)
    assert isinstance(failed, SamplingFailure)
    assert failed.request_id == "b"
    assert "request b, output 0" in failed.message
    assert found in failed.message
    assert first == sample_one(logits[0], make_request(params, "a"))
    assert last == sample_one(logits[2], make_request(params, "c"))
    (again,) = sampler.sample(logits[:1], [(RequestId("b"), 0)])
    assert again == sample_one(logits[0], make_request(params, "b"))


def test_a_row_whose_only_tokens_are_masked_fails() -> None:
    row = np.full(VOCAB, -math.inf, dtype=np.float32)
    row[EOS] = 1.0
    result = sample_one(row, make_request(replace(BASE, min_tokens=1)))
    assert isinstance(result, SamplingFailure)
    assert "logits after penalties hold no token above -inf" in result.message


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_penalty_that_overflows_fails(temperature: float) -> None:
    row = np.ones(VOCAB, dtype=np.float32)
    params = replace(BASE, temperature=temperature, repetition_penalty=1e-60)
    assert isinstance(sample_one(row, make_request(params)), SamplingFailure)


@pytest.mark.parametrize("temperature", [1e-300, 1.0, 100.0])
def test_huge_and_minus_infinite_logits_are_ordinary(temperature: float) -> None:
    row = np.full(VOCAB, -math.inf, dtype=np.float32)
    row[[3, 40, 41]] = [3.0e38, 3.0e38, -3.0e38]
    params = replace(BASE, temperature=temperature)
    for truncated in (params, replace(params, top_p=0.99), replace(params, top_k=7)):
        with np.errstate(all="ignore"):
            assert kept_by(row, truncated) == {3, 40}


def test_unknown_tokens_are_refused_at_start() -> None:
    sampler = Sampler(VOCAB, (EOS,))
    beyond = replace(BASE, logit_bias=((VOCAB, 1.0),))
    with pytest.raises(InvalidRequestError, match="token id 64") as caught:
        validate(beyond, VOCAB)
    assert caught.value.param == "logit_bias"
    with pytest.raises(InvalidRequestError, match="token id 64"):
        sampler.start(make_request(beyond))
    validate(replace(BASE, logit_bias=((VOCAB - 1, 1.0),)), VOCAB)
    for prompt in ([VOCAB], [-1]):
        with pytest.raises(InvalidRequestError):
            sampler.start(make_request(replace(BASE, presence_penalty=1.0), prompt=prompt))


def test_steps_out_of_order_are_defects_and_sample_nothing() -> None:
    sampler = Sampler(VOCAB, (EOS,))
    sampler.start(make_request(BASE, "a"))
    logits = np.stack([random_row(1), random_row(2)])
    with pytest.raises(AccountingError, match="b is sampled but not started"):
        sampler.sample(logits, [(RequestId("a"), 0), (RequestId("b"), 0)])
    with pytest.raises(AccountingError, match="a is sampled at output 1, but only 0"):
        sampler.sample(logits[:1], [(RequestId("a"), 1)])
    sampler.release(RequestId("a"))
    with pytest.raises(AccountingError):
        sampler.sample(logits[:1], [(RequestId("a"), 0)])


def test_logits_of_another_shape_or_type_are_refused() -> None:
    sampler = Sampler(VOCAB, (EOS,))
    sampler.start(make_request(BASE, "a"))
    rows = [(RequestId("a"), 0)]
    for shape in ((2, VOCAB), (1, VOCAB + 1), (VOCAB,)):
        with pytest.raises(ValueError, match="pass one row per sampled request"):
            sampler.sample(np.zeros(shape, dtype=np.float32), rows)
    wide: Any = np.zeros((1, VOCAB), dtype=np.float64)
    with pytest.raises(ValueError, match="float64"):
        sampler.sample(wide, rows)
    assert sampler.sample(np.zeros((0, VOCAB), dtype=np.float32), []) == ()
