"""`kunserve top`: what a frame shows, against real HTTP servers over stand-ins of the cluster."""

import contextlib
import io
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import uvicorn
from rich.console import Console
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from kunserve.cli import main
from kunserve.core.events import StepTiming
from kunserve.core.ids import InstanceId, TransitionId
from kunserve.core.transition import TransitionRecord
from kunserve.runtime.status import TransitionTotals
from kunserve.server import top
from kunserve.server.admin import create_admin_app
from kunserve.server.app import create_app
from kunserve.server.settings import ServerConfig
from kunserve.server.tokenizer import Tokenizer
from kunserve.server.top import Metrics, Snapshot, Source, UnreachableError, frame, ring
from tests.support.fake_engine import APART, LOAD, MERGED, FakeCluster, FakeEngine
from tests.support.tiny_tokenizer import load_tokenizer

KEY = "schlüssel"
DEADLINE_S = 20.0

RECORD = TransitionRecord(
    TransitionId(9), "drop", "operator", "done", "",
    tuple(status.group for status in APART.groups), tuple(s.group for s in MERGED.groups),
)  # fmt: skip


class Running:
    """An application on a free port."""

    def __init__(self, app: Starlette) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._front = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        self._thread = threading.Thread(target=self._front.run, kwargs={"sockets": [listener]})
        self._thread.start()
        deadline_s = time.monotonic() + DEADLINE_S
        while not self._front.started:
            assert time.monotonic() < deadline_s
            time.sleep(0.005)

    def end(self) -> None:
        self._front.should_exit = True
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()


@pytest.fixture
def serve() -> Iterator[Callable[[Starlette], Running]]:
    with contextlib.ExitStack() as stack:

        def start(app: Starlette) -> Running:
            running = Running(app)
            stack.callback(running.end)
            return running

        yield start


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    with contextlib.closing(load_tokenizer(tmp_path_factory.mktemp("tokenizer"))) as loaded:
        yield loaded


@dataclass
class Server:
    """A merged pair of instances, its API and its admin API."""

    engine: FakeEngine
    cluster: FakeCluster
    api: Running
    admin: Running


@pytest.fixture
def server(serve: Callable[[Starlette], Running], tokenizer: Tokenizer) -> Server:
    leader, other = MERGED.instances
    (group,) = MERGED.groups
    engine, cluster = FakeEngine(), FakeCluster()
    cluster.view = engine.view = replace(
        MERGED,
        instances=(replace(leader, load=LOAD, timing=StepTiming(9, 10**9, 10**8)), other),
        groups=(replace(group, load=LOAD),),
        totals=TransitionTotals(outcomes={("drop", "done"): 1}),
        last_transition=RECORD,
    )
    config = ServerConfig(served_model_names=("tiny",), api_keys=(KEY,))
    api = serve(create_app(engine, tokenizer, config))
    return Server(engine, cluster, api, serve(create_admin_app(cluster, (KEY,))))


Outcome = tuple[int, str, str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run `kunserve top` in this process: (exit code, standard output, standard error)."""

    def command(*arguments: str) -> Outcome:
        code = main(["top", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def error_of(outcome: Outcome) -> str:
    code, out, err = outcome
    assert (code, out) == (2, "")
    assert err.startswith("kunserve: error: ")
    assert err.count("\n") == 1
    return err


# ---------------------------------------------------------------- against servers


def test_one_frame_with_the_layout(server: Server, run: Callable[..., Outcome]):
    code, out, err = run(
        "--url", server.api.url, "--api-key", KEY, "--admin-url", server.admin.url,
        "--admin-key", KEY, "--once", "--interval", "0.1",
    )  # fmt: skip
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"kunserve top  {server.api.url}  tiny  epoch 4"
    assert "running 3  waiting 2  in front 0  |  0.0 tokens/s out" in lines[1]
    assert "TTFT -" in lines[1]
    assert "preemptions 7 (+0)" in lines[1]
    assert lines[2].endswith(
        "400 of 3200 tokens; parameters dropped 0 MiB, without 1920 tokens (21% used)"
    )
    assert "40     4      ┌▶ 0 [0:12] ─▶ 1 [12:30] ─┐" in out
    assert "└─────────────────────────┘" in out
    assert "█████░░░░░░░░░░░░░░░  25%" in out
    (first,) = [line for line in lines if line.startswith("0 ")]
    assert first.split() == [
        "0", "ready", "71", "0..11", "part", "5,", "free", "2", "3", "2", "0.1", "s", "ago",
    ]  # fmt: skip
    assert "1         waiting for restart  -    12..29" in out
    assert lines[-1].startswith("last transition: drop #9 (operator): 0[0:30] + 1[0:30] -> 0[0:12]")


def test_one_frame_from_metrics_alone(server: Server, run: Callable[..., Outcome]):
    code, out, err = run(
        "--url", server.api.url + "/", "--api-key", KEY, "--once", "--interval", "0.1"
    )
    assert (code, err) == (0, "")
    assert "epoch 4" in out
    assert "┌▶ 0 ─▶ ? ─┐" in out
    assert "3200" in out
    assert "part 5, free 2" in out
    assert "not ready" in out
    assert out.splitlines()[-1] == "transitions: 1 drop done"


def test_a_wrong_key_is_one_line(server: Server, run: Callable[..., Outcome]):
    url, admin_url = server.api.url, server.admin.url
    assert "--api-key" in error_of(run("--url", url, "--once"))
    arguments = ("--url", url, "--api-key", KEY, "--admin-url", admin_url, "--admin-key", "x")
    assert "--admin-key" in error_of(run(*arguments))


def test_nobody_there_is_one_line(run: Callable[..., Outcome]):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    for flags in ((), ("--once",)):
        error = error_of(run("--url", f"http://127.0.0.1:{port}", *flags))
        assert f"cannot reach http://127.0.0.1:{port}: " in error
        assert "refused" in error


@pytest.mark.parametrize(
    "url", ["", "nonsense", "localhost:8000", "http://", "http://[", "ftp://a"]
)
def test_what_is_no_url_is_one_line(run: Callable[..., Outcome], url: str):
    assert "cannot reach" in error_of(run("--url", url))


def test_no_admin_api_is_one_line(server: Server, run: Callable[..., Outcome]):
    arguments = ("--url", server.api.url, "--api-key", KEY, "--admin-key", KEY, "--admin-url")
    assert "answered 404" in error_of(run(*arguments, server.api.url))


@pytest.mark.parametrize(
    ("path", "text"), [("/metrics", "up 1\n"), ("/metrics", "<html>"), ("/nowhere", "")]
)
def test_another_server_is_one_line(
    serve: Callable[[Starlette], Running], run: Callable[..., Outcome], path: str, text: str
):
    other = serve(Starlette(routes=[Route(path, lambda request: Response(text))]))
    assert other.url in error_of(run("--url", other.url, "--once"))


@pytest.mark.parametrize("body", ["", "[]", '{"epoch": "x"}', '{"epoch": 1, "groups": [3]}'])
def test_another_admin_api_is_one_line(
    server: Server, serve: Callable[[Starlette], Running], run: Callable[..., Outcome], body: str
):
    other = serve(Starlette(routes=[Route("/admin/layout", lambda request: Response(body))]))
    arguments = ("--url", server.api.url, "--api-key", KEY, "--admin-key", "k", "--admin-url")
    assert "is no admin API of kunserve" in error_of(run(*arguments, other.url))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--interval", "0"), "--interval"),
        (("--interval", "nan"), "--interval"),
        (("--interval", "inf"), "--interval"),
        (("--admin-url", "http://a"), "--admin-key"),
        (("--admin-key", "k"), "--admin-url"),
    ],
)
def test_flags_that_cannot_work(run: Callable[..., Outcome], flags: tuple[str, ...], words: str):
    assert words in error_of(run(*flags))


def test_a_server_that_goes_away_and_comes_back(
    server: Server,
    run: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
):
    """Frames go on with what was last seen, and say so; Ctrl-C is the way to end."""
    read = Source.read
    looks = itertools.count()

    def flaky(source: Source) -> Snapshot:
        look = next(looks)
        if look in (2, 3):
            raise UnreachableError(f"cannot reach {source.url}: gone")
        if look == 5:
            raise KeyboardInterrupt
        return read(source)

    monkeypatch.setattr(Source, "read", flaky)
    code, out, err = run("--url", server.api.url, "--api-key", KEY, "--interval", "0.05")
    assert (code, err) == (0, "")
    frames = out.split("kunserve top  ")[1:]
    assert len(frames) == 5
    gone = [f"cannot reach {server.api.url}: gone; shown is" in text for text in frames]
    assert gone == [False, False, True, True, False]
    assert all("running 3" in text for text in frames)


def test_an_admin_api_that_goes_away_takes_only_the_layout(server: Server):
    source = Source(server.api.url, KEY, server.admin.url, KEY)
    with source.client:
        first = source.read()
        assert first.layout is not None
        server.admin.end()
        second = source.read()
        assert second.layout is None
        text = rendered(source, first, second)
        assert f"cannot reach {server.admin.url}" in text
        assert "running 3" in text


# ---------------------------------------------------------------- what is computed


def rendered(source: Source, before: Snapshot, now: Snapshot) -> str:
    console = Console(width=120, highlight=False, file=io.StringIO())
    with console.capture() as captured:
        console.print(frame(source, before, now))
    return captured.get()


def snapshot(at_s: float, **values: float) -> Snapshot:
    return Snapshot(at_s, Metrics({name: (({}, value),) for name, value in values.items()}))


def traffic(before: Snapshot, now: Snapshot) -> str:
    return rendered(Source("http://x"), before, now).splitlines()[1]


def counts(at_s: float, tokens: float, firsts: float, seconds: float, preempted: float) -> Snapshot:
    return snapshot(
        at_s,
        generation_tokens_total=tokens,
        prompt_tokens_total=2 * tokens,
        time_to_first_token_seconds_count=firsts,
        time_to_first_token_seconds_sum=seconds,
        num_preemptions_total=preempted,
        num_requests_owned=9,
        num_requests_running=4,
        num_requests_waiting=3,
    )


def test_rates_are_those_of_the_interval():
    line = traffic(counts(10, 100, 10, 5.0, 1), counts(12, 300, 14, 6.0, 4))
    assert line == (
        "running 4  waiting 3  in front 2  |  100.0 tokens/s out, 200.0 tokens/s in"
        "  |  TTFT 250 ms  |  preemptions 4 (+3)"
    )


def test_attainment_is_shown_where_something_is_promised():
    def ended(at_s: float, answers: float, attained: float) -> Snapshot:
        return snapshot(
            at_s,
            slo_ttft_seconds=0.5,
            slo_tpot_seconds=0.0,
            e2e_request_latency_seconds_count=answers,
            slo_attained_requests_total=attained,
        )

    assert "TTFT -, SLO 75%" in traffic(ended(10, 10, 10), ended(12, 18, 16))
    assert "TTFT -, SLO -  |" in traffic(ended(10, 10, 10), ended(12, 10, 10))
    assert "SLO" not in traffic(snapshot(10), snapshot(12))


def test_a_server_that_was_started_again_counts_from_zero():
    line = traffic(counts(10, 1000, 10, 5.0, 9), counts(12, 300, 2, 1.0, 1))
    assert "150.0 tokens/s out" in line
    assert "TTFT 500 ms" in line
    assert "preemptions 1 (+1)" in line


def test_the_first_frame_has_no_rates():
    now = counts(10, 100, 10, 5.0, 1)
    assert "- tokens/s out, - tokens/s in  |  TTFT -" in traffic(now, now)


def test_rings():
    assert ring([]) == ""
    assert ring(["0 [0:30]"]) == "0 [0:30]"
    upper, lower = ring(["0 [0:9]", "10 [9:20]", "2 [20:30]"]).splitlines()
    assert upper == "┌▶ 0 [0:9] ─▶ 10 [9:20] ─▶ 2 [20:30] ─┐"
    assert len(upper) == len(lower)


def test_whole_instances(server: Server):
    leader = replace(APART.instances[0], load=LOAD)
    server.cluster.view = server.engine.view = replace(
        APART, instances=(leader, APART.instances[1])
    )
    source = Source(server.api.url, KEY, server.admin.url, KEY)
    with source.client:
        now = source.read()
    text = rendered(source, now, now)
    assert "30     3      0 [0:30]" in text
    assert "parameters dropped" not in text
    assert text.rstrip().endswith("transitions: none")


def test_what_a_server_says_does_not_steer_the_terminal(server: Server):
    evil = replace(MERGED.instances[0], state="\x1b[2Jbold[/red]", instance=InstanceId(0))
    server.cluster.view = replace(
        MERGED,
        instances=(evil,),
        last_transition=replace(RECORD, reason="\x1b]0;x\x07[link=a]"),
    )
    source = Source(server.api.url, KEY, server.admin.url, KEY)
    with source.client:
        now = source.read()
    text = rendered(source, now, now)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[2Jbold[/red]" in text
    assert "[link=a]" in text


def test_metrics_of_others_are_left_out():
    metrics = Metrics.parse('# TYPE a gauge\na 1\n# TYPE kunserve:b gauge\nkunserve:b{x="1"} 2\n')
    assert metrics.total("b") == 2
    assert metrics.by("b", "x") == {"1": 2}
    assert (metrics.total("a"), metrics.label("a", "x")) == (0, "")
    assert top.PREFIX == "kunserve:"
