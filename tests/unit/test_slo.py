"""Attainment of what clients are promised, in the metrics of the front."""

import asyncio
import contextlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from kunserve.server import metrics as metrics_module
from kunserve.server.app import create_app
from kunserve.server.metrics import RequestTimer, ServerMetrics
from kunserve.server.settings import ServerConfig, Slo
from tests.support.fake_engine import FakeEngine
from tests.support.tiny_tokenizer import load_tokenizer

BOTH = Slo(ttft_s=1.0, tpot_s=0.1)
HOUR_S, NANOSECOND_S = 3600.0, 1e-9


class Clock:
    """Stands still until it is told otherwise."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(
        metrics_module, "time", SimpleNamespace(**(vars(time) | {"monotonic": clock.monotonic}))
    )
    return clock


def values(text: str) -> dict[str, float]:
    """All samples of an exposition."""
    pairs = re.findall(r"^kunserve:(\S+) (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in pairs}


def counted(text: str) -> tuple[float, ...]:
    """Attained, tokens of these, violations of the TTFT, of the TPOT."""
    found = values(text)
    model = '{model_name="tiny"}'
    return (
        found["slo_attained_requests_total" + model],
        found["goodput_tokens_total" + model],
        *(
            found['slo_violated_requests_total{model_name="tiny",slo="' + slo + '"}']
            for slo in ("ttft", "tpot")
        ),
    )


def promised(text: str) -> tuple[float, float]:
    found = values(text)
    return (
        found['slo_ttft_seconds{model_name="tiny"}'],
        found['slo_tpot_seconds{model_name="tiny"}'],
    )


class Answers:
    """Metrics of a server without HTTP, and answers on a clock."""

    def __init__(self, slo: Slo, clock: Clock) -> None:
        self.metrics = ServerMetrics(FakeEngine(), "tiny", slo)
        self._clock = clock

    def give(
        self, first_after_s: float, *tokens_after_s: float, reason: str | None = "stop"
    ) -> None:
        """One answer: a token `first_after_s` after its arrival, the others after one another."""
        request = RequestTimer(self.metrics)
        sequence = request.sequence(prompt_tokens=3)
        for after_s in (first_after_s, *tokens_after_s):
            self._clock.now_s += after_s
            sequence.tokens(1)
        if reason is not None:
            sequence.end(reason)
        request.close()

    @property
    def text(self) -> str:
        """What Prometheus would read."""
        return self.metrics.render().decode()


@pytest.fixture
def answers(clock: Clock) -> Callable[[Slo], Answers]:
    return lambda slo: Answers(slo, clock)


# ---------------------------------------------------------------- judged by the clock


def test_an_answer_that_keeps_both_promises_is_good(answers: Callable[[Slo], Answers]) -> None:
    served = answers(BOTH)
    served.give(0.5, 0.1, 0.05)
    assert counted(served.text) == (1, 3, 0, 0)


def test_each_broken_promise_is_counted(answers: Callable[[Slo], Answers]) -> None:
    served = answers(BOTH)
    served.give(1.5, 0.1, 0.05)
    assert counted(served.text) == (0, 0, 1, 0)
    served.give(0.5, 0.1, 0.2)
    assert counted(served.text) == (0, 0, 1, 1)
    served.give(1.5, 0.1, 0.2)
    assert counted(served.text) == (0, 0, 2, 2)


def test_the_mean_of_the_tokens_counts_not_the_slowest(answers: Callable[[Slo], Answers]) -> None:
    served = answers(BOTH)
    served.give(0.5, 0.19, 0.005)
    assert counted(served.text) == (1, 3, 0, 0)


def test_one_token_cannot_be_slow(answers: Callable[[Slo], Answers]) -> None:
    served = answers(Slo(tpot_s=NANOSECOND_S))
    served.give(HOUR_S, reason="length")
    assert counted(served.text) == (1, 1, 0, 0)


def test_only_what_is_promised_is_judged(answers: Callable[[Slo], Answers]) -> None:
    late, slow = answers(Slo(ttft_s=1.0)), answers(Slo(tpot_s=0.1))
    for served in (late, slow):
        served.give(2.0, 5.0)
    assert counted(late.text) == (0, 0, 1, 0)
    assert counted(slow.text) == (0, 0, 0, 1)


def test_an_answer_of_no_token_is_as_late_as_its_end(
    answers: Callable[[Slo], Answers], clock: Clock
) -> None:
    served = answers(BOTH)
    request = RequestTimer(served.metrics)
    clock.now_s += 2.0
    request.sequence(prompt_tokens=3).end("stop")
    assert counted(served.text) == (0, 0, 1, 0)


def test_who_goes_away_is_not_judged(answers: Callable[[Slo], Answers]) -> None:
    served = answers(BOTH)
    served.give(0.5, 5.0, reason=None)
    served.give(5.0, reason="abort")
    assert counted(served.text) == (0, 0, 0, 0)


def test_without_a_promise_nothing_is_counted(answers: Callable[[Slo], Answers]) -> None:
    served = answers(Slo())
    served.give(0.5, 0.01)
    assert counted(served.text) == (0, 0, 0, 0)
    assert promised(served.text) == (0, 0)


# ---------------------------------------------------------------- over HTTP


@pytest.mark.parametrize(
    ("slo", "expected", "shown"),
    [
        (Slo(HOUR_S, HOUR_S), (2, 8, 0, 0), (HOUR_S, HOUR_S)),
        (Slo(ttft_s=NANOSECOND_S), (0, 0, 2, 0), (NANOSECOND_S, 0)),
        (Slo(), (0, 0, 0, 0), (0, 0)),
    ],
)
def test_answers_of_the_server_are_judged(
    slo: Slo, expected: tuple[float, ...], shown: tuple[float, float], tmp_path: Path
) -> None:
    text = asyncio.run(metrics_after_an_answer(slo, tmp_path))
    assert counted(text) == expected
    assert promised(text) == shown


async def metrics_after_an_answer(slo: Slo, tmp_path: Path) -> str:
    """Two sequences of 3 tokens and their end, for one request."""
    with contextlib.closing(load_tokenizer(tmp_path)) as tokenizer:
        app = create_app(FakeEngine(), tokenizer, ServerConfig(("tiny",), slo=slo))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
            asked = {"model": "tiny", "prompt": ["a", "b"], "max_tokens": 50}
            (await client.post("/v1/completions", json=asked)).raise_for_status()
            return (await client.get("/metrics")).text
