"""Layouts of real processes change while requests run: every stream gives exactly the tokens and
logprobs that it gives without any transition.

Servers run with --check-accounting: moved KV is compared with its source by hash, pages are NaN
after a change of owner, all books are checked after every step.

The calm run is on the same server, before, with its prefix cache on: later runs find prefixes
there, until a transition evicts what nobody refers to.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import pytest

from tests.support.layouts import Layouts, granted, sampled_pss
from tests.support.models import build_tiny_model
from tests.support.servers import (
    ADMIN_KEY,
    MANUAL_FLAGS,
    Answer,
    ServerProcess,
    StreamLoad,
    running_server,
    until,
)

pytestmark = pytest.mark.timeout(300)  # a busy machine is slow, not wrong

Body = dict[str, Any]
Wish = str | tuple[tuple[int, ...], ...]
"""drop, restore, or the groups."""

DROP, RESTORE = "drop", "restore"
PAIRS: Wish = ((0, 1), (2, 3))
CROSSED: Wish = ((0, 2), (1, 3))

TINY_LAYERS = 7
TINY_WEIGHT_PAGES = 7 * 3 + 2
TINY_PAGE_BYTES = 7 * 28 * 1024
"""Seven blocks of 16 tokens: small pages, so that many are moved."""

PSS_TOLERANCE = 0.05


# ---------------------------------------------------------------- requests


def tiny_bodies(count: int, max_tokens: int, seed: int = 0, most_tokens: int = 0) -> list[Body]:
    """Half greedy, half drawn; in fours their prompts begin alike. `most_tokens`: with it, lengths
    vary from `max_tokens` up to that."""
    rng = random.Random(seed)
    prefixes = [[rng.randrange(256) for _ in range(40)] for _ in range(-(-count // 4))]
    return [
        {
            "prompt": prefixes[n // 4] + [rng.randrange(256) for _ in range(rng.randrange(1, 60))],
            "max_tokens": rng.randrange(max_tokens, most_tokens) if most_tokens else max_tokens,
            "temperature": 0.0 if n % 2 else 0.9,
            "seed": n,
            "logprobs": 2,
            "ignore_eos": True,
            "return_tokens_as_token_ids": True,
        }
        for n in range(count)
    ]


STORY = (
    "The keeper of the lighthouse wrote down every evening what the sea had brought to the shore, "
    "in the same book in which her father had written before her. On this page she began: "
)


def story_bodies(count: int, max_tokens: int) -> list[Body]:
    """The same for the embedded model."""
    return [
        {
            "prompt": f"{STORY if n % 4 else ''}Chapter {n}, in which number {n * n} is",
            "max_tokens": max_tokens,
            "temperature": 0.0 if n % 2 else 0.8,
            "seed": n,
            "logprobs": 2,
            "ignore_eos": True,
            "return_tokens_as_token_ids": True,
        }
        for n in range(count)
    ]


def calm_answers(server: ServerProcess, bodies: Sequence[Body], deadline_s: float) -> list[Answer]:
    """What the streams give without any transition."""
    with StreamLoad(server.url, bodies) as load:
        load.result(deadline_s)
    for body, answer in zip(bodies, load.answers, strict=True):
        if answer.finishes == ["length"]:
            assert len(answer.tokens) == len(answer.logprobs) == body["max_tokens"]
    server.wait_idle()
    return load.answers


def assert_same(
    load: StreamLoad, calm: Sequence[Answer], leave_after: Mapping[int, int] = MappingProxyType({})
) -> None:
    """Every stream is as it was; those whose client left are, as far as they went."""
    for index, (answer, expected) in enumerate(zip(load.answers, calm, strict=True)):
        if index in leave_after:
            count = len(answer.tokens)
            assert answer.tokens == expected.tokens[:count], index
            assert answer.logprobs == expected.logprobs[:count], index
        else:
            assert answer == expected, index


# ---------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """A history of layouts of one server.

    `flags` and `environment`: of the server. `extra`: more requests, some of which stop at a
    string while the clients of others leave.
    """

    name: str
    instances: int
    wishes: tuple[Wish, ...]
    flags: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    max_tokens: int = 250
    extra: int = 6


TINY_CASES = (
    Case("2-1-2", 2, (DROP, RESTORE), environment={"UCX_TLS": "tcp"}),
    Case("uncoordinated", 2, (DROP, RESTORE), ("--exchange", "uncoordinated")),
    Case("3-1-3", 3, (DROP, RESTORE)),
)
BIG_CASES = (
    pytest.param(Case("2-1-2", 2, (DROP, RESTORE), max_tokens=160), id="2-1-2"),
    pytest.param(
        Case("4-2-1-4", 4, (PAIRS, DROP, RESTORE), max_tokens=160),
        id="4-2-1-4",
        marks=[pytest.mark.slow, pytest.mark.timeout(600)],
    ),
)


def ask(layouts: Layouts, wish: Wish) -> httpx.Response:
    if isinstance(wish, str):
        return layouts.post(wish)
    return layouts.post("layout", groups=wish)


def groups_after(wish: Wish, instances: int) -> Sequence[Sequence[int]]:
    if wish == DROP:
        return [range(instances)]
    if wish == RESTORE:
        return [[instance] for instance in range(instances)]
    assert not isinstance(wish, str)
    return wish


def go_through(
    layouts: Layouts, load: StreamLoad, wishes: Sequence[Wish], rng: random.Random, gap_tokens: int
) -> None:
    """Wish for one layout after the other while `load` runs, some tokens apart."""
    instances = len(layouts.pids())
    for wish in wishes:
        load.wait_total(load.total_tokens + rng.randrange(gap_tokens))
        granted(ask(layouts, wish))
        layouts.wait_settled(groups_after(wish, instances))
        assert not load.is_over, "the streams were too short for this test"


def with_extras(bodies: Sequence[Body], calm: Sequence[Answer], count: int) -> dict[int, int]:
    """Changes some of the last `count` bodies: they stop at a string. Of others the client leaves
    after so many tokens, by index."""
    leave_after = {}
    for index in range(len(bodies) - count, len(bodies)):
        if index % 2:
            leave_after[index] = len(calm[index].tokens) // 3
            continue
        text = calm[index].text
        middle = len(text) // 2
        stop = next((t for t in re.findall(r"[ -~]{2,}", text[middle:])), None)
        if stop is not None:
            bodies[index]["stop"] = [stop[:4]]
    return leave_after


def run_case(server: ServerProcess, case: Case, bodies: list[Body], gap_tokens: int) -> list[int]:
    """A calm run, then the same with all transitions of the case; memory of the instances then."""
    calm = calm_answers(server, bodies, 240.0)
    leave_after = with_extras(bodies, calm, case.extra)
    calm[-case.extra :] = calm_answers(server, bodies[-case.extra :], 240.0)
    rng = random.Random(case.name)
    with Layouts(server) as layouts, StreamLoad(server.url, bodies, leave_after) as load:
        with undisturbed(layouts) as pids, sampled_pss(pids) as samples:
            load.wait_total(len(bodies))
            go_through(layouts, load, case.wishes[:1], rng, gap_tokens)
            assert_moved_prefix_is_found(server, load, bodies[1], calm[1])
            go_through(layouts, load, case.wishes[1:], rng, gap_tokens)
            load.result(240.0)
        assert_same(load, calm, leave_after)
    server.wait_idle()
    return samples


def assert_moved_prefix_is_found(
    server: ServerProcess, load: StreamLoad, body: Body, calm: Answer
) -> None:
    """A new request finds the prompt of `body`, the second of `load`: that was adopted and still
    runs, and its blocks were remapped or moved."""
    assert load.tokens[1], "it has not begun"
    hits = prefix_hits(server)
    with StreamLoad(server.url, [body | {"max_tokens": 4}]) as again:
        again.result()
    assert not load.answers[1].finishes, "it was too short for this test"
    assert again.tokens[0] == calm.tokens[:4]
    # Instances say it with their next report.
    until(lambda: prefix_hits(server) >= hits + 32, "a hit of two blocks", 10.0)


@contextmanager
def undisturbed(layouts: Layouts) -> Iterator[list[int]]:
    """No instance is lost meanwhile; gives their processes."""
    pids = layouts.pids()
    yield [pid for pid in pids.values() if pid is not None]
    assert layouts.pids() == pids, [x for x in layouts.server.log.splitlines() if "ERROR" in x]


def prefix_hits(server: ServerProcess) -> float:
    values = server.metrics()
    return sum(value for (name, _), value in values.items() if name == "prefix_cache_hits_total")


@pytest.mark.parametrize("case", BIG_CASES)
def test_the_embedded_model(tmp_path: Path, case: Case):
    """16 requests of 160 tokens and some more; memory of all instances together stays what it was
    when the calm run had touched it."""
    flags = ("--instances", str(case.instances), "--kv-cache-memory-bytes", "80MiB", *MANUAL_FLAGS)
    with running_server(tmp_path, None, *flags, *case.flags) as server:
        samples = run_case(server, case, story_bodies(16 + case.extra, case.max_tokens), 320)
    before = samples[0]
    assert max(samples) < before * (1 + PSS_TOLERANCE), (before, max(samples))
    assert min(samples) > before * (1 - PSS_TOLERANCE), (before, min(samples))
    print(f"PSS {before}: {min(samples) / before:.3f} .. {max(samples) / before:.3f}")


# ---------------------------------------------------------------- a tiny model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    build_tiny_model(
        directory, "llama", seed=7, max_position_embeddings=4096, num_key_value_heads=14
    )
    return directory


def tiny_server(directory: Path, model: Path, case: Case, kv_pages: int = 24 * TINY_LAYERS) -> Any:
    flags = (
        *("--instances", str(case.instances), *MANUAL_FLAGS),
        *("--kv-cache-memory-bytes", str(kv_pages * TINY_PAGE_BYTES), *case.flags),
    )
    return running_server(directory, model, *flags, environment=case.environment)


@pytest.mark.parametrize("case", TINY_CASES, ids=lambda case: case.name)
def test_a_tiny_model(model: Path, tmp_path: Path, case: Case):
    with tiny_server(tmp_path, model, case) as server:
        bodies = tiny_bodies(8 + case.extra, case.max_tokens)
        run_case(server, case, bodies, 200)


# ---------------------------------------------------------------- four instances, many histories

NUM_HISTORIES, NUM_SHORT_HISTORIES = 6, 1
NUM_STREAMS = 12
PARTITIONS: tuple[Wish, ...] = (
    DROP, DROP, RESTORE, PAIRS, CROSSED, ((0, 1, 2), (3,)), ((0,), (1, 2, 3)), ((0,), (1, 3), (2,)),
)  # fmt: skip


@dataclass(frozen=True)
class Four:
    """A server of four instances and what its streams give."""

    server: ServerProcess
    bodies: list[Body]
    calm: list[Answer]


@pytest.fixture(scope="module")
def four(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Four]:
    case = Case("four", 4, ())
    with tiny_server(tmp_path_factory.mktemp("four"), model, case) as server:
        bodies = tiny_bodies(NUM_STREAMS, 250)
        yield Four(server, bodies, calm_answers(server, bodies, 120.0))


@pytest.mark.parametrize(
    "wishes",
    [(PAIRS, DROP, RESTORE), (CROSSED, PAIRS, CROSSED, RESTORE)],
    ids=["4-2-1-4", "crossed pairs"],
)
def test_four_instances(four: Four, wishes: tuple[Wish, ...]):
    with Layouts(four.server) as layouts, StreamLoad(four.server.url, four.bodies) as load:
        load.wait_tokens(1)
        with undisturbed(layouts):
            go_through(layouts, load, wishes, random.Random(1), 100)
            load.result()
        assert_same(load, four.calm)
    four.server.wait_idle()


@pytest.mark.parametrize(
    "seed",
    [
        seed if seed < NUM_SHORT_HISTORIES else pytest.param(seed, marks=pytest.mark.slow)
        for seed in range(NUM_HISTORIES)
    ],
)
def test_random_histories(four: Four, seed: int):
    """Wishes at random moments, some while others are still being carried out."""
    rng = random.Random(f"history {seed}")
    asked = []
    with Layouts(four.server) as layouts, StreamLoad(four.server.url, four.bodies) as load:
        load.wait_tokens(1)
        with undisturbed(layouts):
            while not load.is_over:
                wish = rng.choice(PARTITIONS)
                if isinstance(wish, str):
                    asked.append(layouts.post_ahead(wish))
                else:
                    asked.append(layouts.post_ahead("layout", groups=wish))
                if rng.random() < 0.4:
                    asked[-1].exception()  # its answer is there
                load.wait_total(load.total_tokens + rng.randrange(200))
            answers = [each.result() for each in asked]
        assert_same(load, four.calm)
        assert not [answer.text for answer in answers if answer.status_code not in (200, 409)]
        assert sum(answer.status_code == 200 for answer in answers) >= 3
        restore(layouts)
    four.server.wait_idle()


def restore(layouts: Layouts) -> None:
    """Back to whole instances; a restore that does not fit yet is wished again."""
    until(lambda: layouts.post(RESTORE).status_code == 200, "a restore")
    layouts.wait_whole()


# ---------------------------------------------------------------- turning back


def test_a_drop_while_a_restore_prepares(model: Path, tmp_path: Path):
    """It turns back at once, before pages were given up and after."""
    case = Case("turn back", 2, (), ("--link-gbps", "0.04"))
    with tiny_server(tmp_path, model, case) as server:
        bodies = tiny_bodies(8, 600)
        calm = calm_answers(server, bodies, 120.0)
        with Layouts(server) as layouts, StreamLoad(server.url, bodies) as load:
            load.wait_tokens(1)
            layouts.drop()
            layouts.wait_settled([[0, 1]])
            for may_have_given_up in (False, True):
                turn_back(layouts, load, may_have_given_up)
            assert layouts.groups() == {frozenset((0, 1))}
            load.wait_total(load.total_tokens + 50)
            restore(layouts)
            assert not load.is_over
            load.result(120.0)
            assert_same(load, calm)
        server.wait_idle()


def turn_back(layouts: Layouts, load: StreamLoad, has_given_up: bool) -> None:
    """Wish for a restore, and for a drop while it compacts, or while it brings parts in or gathers:
    by then it has given pages up."""
    last_phases = ("prepare", "snapshot", "gather") if has_given_up else ("compact",)
    for _ in range(20):
        assert not load.is_over
        restored = layouts.post_ahead(RESTORE)
        if has_given_up:
            layouts.wait_state("prepare", "gather")
        granted(layouts.post(DROP))
        if restored.result().status_code == 409:
            record = re.findall(r"split #\d+ .* aborted in .*", layouts.server.log)[-1]
            assert "another layout was wished" in record
            if record.split(": ")[-1].split(", ")[-1].split()[0] in last_phases:
                return
        else:  # the drop was there before the restore
            layouts.drop()
        layouts.wait_settled([[0, 1]])
    pytest.fail(f"no restore turned back in {last_phases}")


LONG_TOKENS = 1000


def test_a_long_answer_does_not_delay_a_restore(model: Path, tmp_path: Path):
    """It is granted while most of the answer is still to come."""
    case = Case("long", 2, ())
    with tiny_server(tmp_path, model, case) as server:
        bodies = tiny_bodies(1, LONG_TOKENS)
        calm = calm_answers(server, bodies, 120.0)
        with Layouts(server) as layouts, StreamLoad(server.url, bodies) as load:
            load.wait_tokens(100)
            layouts.drop()
            layouts.wait_settled([[0, 1]])
            load.wait_total(load.total_tokens + 50)
            layouts.restore()
            assert len(load.tokens[0]) < 0.6 * LONG_TOKENS
            layouts.wait_whole()
            load.result(120.0)
            assert_same(load, calm)


# ---------------------------------------------------------------- memory that is full


def wait_full(server: ServerProcess, load: StreamLoad) -> None:
    """More than nine tenths of the blocks of every group are in use, and requests wait: what is
    left is less than they need, or what the scheduler keeps back for those that run."""

    def is_full() -> bool:
        assert not load.is_over, "the cache never was full"
        values = server.metrics()
        usage = [v for (name, _), v in values.items() if name == "kv_cache_usage_perc"]
        waiting = sum(v for (name, _), v in values.items() if name == "num_requests_waiting")
        return min(usage) > 0.9 and waiting > 0

    until(is_full, "a full cache")


@pytest.mark.parametrize("instances", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_full_cache_twice_the_weights(model: Path, tmp_path: Path, instances: int):
    """Many requests of many lengths have come and gone: what the rest holds is scattered."""
    case = Case("full", instances, ())
    kv_pages = 2 * TINY_WEIGHT_PAGES // TINY_LAYERS * TINY_LAYERS
    with tiny_server(tmp_path, model, case, kv_pages) as server:
        bodies = tiny_bodies(22 * instances, 20, seed=1, most_tokens=220)
        calm = calm_answers(server, bodies, 120.0)
        with Layouts(server) as layouts, StreamLoad(server.url, bodies) as load:
            with undisturbed(layouts):
                load.wait_total(800)
                wait_full(server, load)
                layouts.drop()
                layouts.wait_settled([range(instances)])
                # As soon as what is there fits: then homes are full as well.
                while layouts.post(RESTORE).status_code != 200:
                    load.wait_total(load.total_tokens + 40)
                granted(layouts.post(DROP))
                load.result(120.0)
            restore(layouts)
            assert_same(load, calm)
        server.wait_idle()


def test_freed_pages_are_exactly_the_escrow(tmp_path: Path):
    """Layers of one page each: the leader of the merged pair gives four up, and a page of KV that
    moves to it needs four."""
    layers, pages_per_layer = 8, 4
    model = tmp_path / "model"
    build_tiny_model(
        model, "llama", seed=3, max_position_embeddings=4096, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, head_dim=16, hidden_size=64,
        intermediate_size=48,
    )  # fmt: skip
    case = Case("escrow", 2, ())
    with tiny_server(tmp_path, model, case, pages_per_layer * layers) as server:
        bodies = tiny_bodies(20, 200, seed=2, most_tokens=500)
        calm = calm_answers(server, bodies, 120.0)
        with Layouts(server) as layouts, StreamLoad(server.url, bodies) as load:
            assert part_pages(layouts) == [10, 10]
            wait_full(server, load)
            layouts.drop()
            layouts.wait_settled([[0, 1]])
            assert layouts.stages() == {0: (0, 4), 1: (4, 8)}
            # Four pages freed on the leader; instances say it with their heartbeats.
            until(lambda: part_pages(layouts) == [6, 4], "pages of a merged pair")
            restore(layouts)
            load.result(120.0)
            assert_same(load, calm)
        server.wait_idle()


def part_pages(layouts: Layouts) -> list[int]:
    """Pages of the model on each instance."""
    return [each["pages"]["part"] for each in layouts.now()["instances"]]


# ---------------------------------------------------------------- a slow link


def test_new_requests_are_served_while_kv_moves(model: Path, tmp_path: Path):
    """They finish before those whose KV is on its way go on; and what the admin API is asked
    meanwhile is answered as it should be."""
    case = Case("slow", 2, (), ("--link-gbps", "0.05"))
    with tiny_server(tmp_path, model, case) as server:
        long, short = tiny_bodies(4, 600), tiny_bodies(4, 12, seed=5)
        calm, calm_short = calm_answers(server, long, 120.0), calm_answers(server, short, 60.0)
        with Layouts(server) as layouts, StreamLoad(server.url, long) as load:
            load.wait_tokens(300)
            layouts.drop()
            stalled = [len(tokens) for tokens in load.tokens]
            with StreamLoad(server.url, short) as new:
                layouts.wait_state("move")
                new.result()
                assert_same(new, calm_short)
            # The last of the tokens that were sampled before may have come meanwhile.
            assert sum(len(t) <= n + 2 for t, n in zip(load.tokens, stalled, strict=True)) >= 2
            assert_bad_wishes_are_refused(layouts)
            layouts.wait_settled([[0, 1]])
            load.result(120.0)
            assert_same(load, calm)
        server.wait_idle()


def assert_bad_wishes_are_refused(layouts: Layouts) -> None:
    assert layouts.states() == {"move"}
    refused = {
        ("layout", "[[0, 1], [2]]"): 400,
        ("layout", "[[0, 0], [1]]"): 400,
        ("layout", "[[0]]"): 400,
        ("layout", "[]"): 400,
        ("layout", '"all"'): 400,
    }
    url, key = layouts.server.admin_url, {"authorization": f"Bearer {ADMIN_KEY}"}
    for (what, groups), status in refused.items():
        content = f'{{"groups": {groups}}}'
        answer = httpx.post(f"{url}/admin/{what}", content=content, headers=key)
        assert answer.status_code == status, (groups, answer.text)
    assert httpx.post(f"{url}/admin/drop", json={}).status_code == 401
    assert layouts.post("drain", instance=1).status_code == 409
    assert layouts.post("drain", instance=7).status_code == 409
    assert layouts.post(DROP, now=True).status_code == 400
    assert layouts.post(DROP).status_code == 200  # as it is
