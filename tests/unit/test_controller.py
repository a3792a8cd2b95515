"""The controller by example: what each event makes it do. The simulator covers the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from kunserve.core.errors import AccountingError
from kunserve.core.events import (
    ClockTicked,
    Command,
    DeliverTokens,
    DrainComplete,
    DrainRequested,
    Event,
    FormGroup,
    GroupReport,
    Heartbeat,
    InstanceLost,
    InstanceReady,
    KillInstance,
    LeaseRequest,
    RefusalKind,
    RefuseRequest,
    RequestAborted,
    RequestSubmitted,
    RevokeLease,
    StartInstance,
)
from kunserve.core.ids import Epoch, GroupId, InstanceId, RequestId
from kunserve.core.request import FinishReason, Request, SamplingParams, TokenOutput
from kunserve.core.step import GroupLoad
from kunserve.policy.controller import SECOND_NS, Controller, ControllerConfig, InstanceState

BLOCK_SIZE, TOTAL_BLOCKS = 4, 100
ZERO, ONE, TWO = InstanceId(0), InstanceId(1), InstanceId(2)
A, B, C = RequestId("a"), RequestId("b"), RequestId("c")
EPOCH = Epoch(0)
INVALID = RefusalKind.INVALID
IDLE = GroupLoad(TOTAL_BLOCKS, TOTAL_BLOCKS, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


class Front:
    """A controller with a clock that stands still unless told otherwise."""

    def __init__(self, num_instances: int = 1, max_queued: int = 100) -> None:
        config = ControllerConfig(
            num_instances=num_instances,
            num_layers=4,
            block_size=BLOCK_SIZE,
            max_model_len=64,
            max_num_queued_reqs=max_queued,
            heartbeat_timeout_ns=10 * SECOND_NS,
            restart_backoff_ns=SECOND_NS,
            stable_ns=60 * SECOND_NS,
            max_restarts=2,
        )
        self.now_ns = 0
        self.controller = Controller(config, 0)

    def handle(self, event: Event) -> tuple[Command, ...]:
        commands = self.controller.handle(event, self.now_ns)
        self.controller.check()
        return commands

    def ready(self, instance: InstanceId, incarnation: int = 0) -> tuple[Command, ...]:
        return self.handle(InstanceReady(instance, incarnation, TOTAL_BLOCKS))

    def submit(self, request_id: RequestId, tokens: int = 4) -> tuple[Command, ...]:
        return self.handle(RequestSubmitted(make_request(request_id, tokens)))

    def lose(self, instance: InstanceId, incarnation: int = 0) -> tuple[Command, ...]:
        return self.handle(InstanceLost(instance, incarnation, "killed by SIGKILL"))

    def tick(self, after_s: float) -> tuple[Command, ...]:
        self.now_ns += round(after_s * SECOND_NS)
        return self.handle(ClockTicked())

    def state(self, instance: InstanceId) -> InstanceState:
        return self.controller.instances()[instance].state


def serving(num_instances: int = 1, max_queued: int = 100) -> Front:
    """All instances ready; instance i leads group i."""
    front = Front(num_instances, max_queued)
    for index in range(num_instances):
        front.ready(InstanceId(index))
    return front


def make_request(request_id: RequestId, tokens: int = 4, max_tokens: int = 8) -> Request:
    first = sum(request_id.encode())  # no two requests share a prefix
    prompt = (first, *range(1, tokens))
    return Request(request_id, prompt, SamplingParams(max_tokens, seed=0), arrival_ns=0)


def token(request_id: RequestId, index: int, finish: FinishReason | None = None) -> TokenOutput:
    return TokenOutput(request_id, index, token_id=100 + index, finish=finish)


def report(
    *outputs: TokenOutput,
    instance: InstanceId = ZERO,
    incarnation: int = 0,
    group: int = 0,
    epoch: int | None = None,
    started: Sequence[RequestId] = (),
    refused: Sequence[tuple[RequestId, RefusalKind, str]] = (),
    load: GroupLoad = IDLE,
) -> GroupReport:
    """Groups of whole instances: epochs grow as their numbers do."""
    return GroupReport(
        instance=instance,
        incarnation=incarnation,
        group=GroupId(group),
        epoch=Epoch(group if epoch is None else epoch),
        step=0,
        outputs=outputs,
        started=tuple(started),
        load=load,
        refused=tuple(refused),
    )


# ---------------------------------------------------------------- requests and tokens


def test_a_ready_instance_leads_a_group_of_one() -> None:
    front = Front()
    assert front.ready(ZERO) == (FormGroup(ZERO, GroupId(0), EPOCH),)
    assert front.controller.layout.groups[0].instances == (ZERO,)


def test_a_request_is_leased_and_its_tokens_are_delivered_until_it_ends() -> None:
    front = serving()
    assert front.submit(A) == (LeaseRequest(ZERO, GroupId(0), EPOCH, make_request(A)),)
    assert front.handle(report(token(A, 0))) == (DeliverTokens(A, (token(A, 0),)),)
    last = token(A, 1, FinishReason.STOP)
    assert front.handle(report(last)) == (DeliverTokens(A, (last,)),)
    assert front.controller.num_requests == 0


def test_the_first_token_says_how_long_its_request_waited() -> None:
    front = serving()
    front.submit(A)
    front.now_ns = 7
    front.handle(report(started=[A]))
    front.now_ns = 20
    (delivered,) = front.handle(report(token(A, 0), token(A, 1)))
    assert isinstance(delivered, DeliverTokens)
    assert [output.queued_ns for output in delivered.outputs] == [7, None]
    # It is no part of what the token is.
    assert delivered.outputs == (token(A, 0), token(A, 1))


def test_a_report_may_carry_tokens_of_several_requests() -> None:
    front = serving()
    front.submit(A)
    front.submit(B)
    commands = front.handle(report(token(A, 0), token(B, 0), token(B, 1)))
    assert commands == (
        DeliverTokens(A, (token(A, 0),)),
        DeliverTokens(B, (token(B, 0), token(B, 1))),
    )


def test_requests_wait_in_the_front_until_an_instance_is_ready() -> None:
    front = Front(num_instances=2)
    assert front.submit(A) == front.submit(B) == ()
    commands = front.ready(ONE)
    assert commands == (
        FormGroup(ONE, GroupId(0), EPOCH),
        LeaseRequest(ONE, GroupId(0), EPOCH, make_request(A)),
        LeaseRequest(ONE, GroupId(0), EPOCH, make_request(B)),
    )
    assert front.ready(ZERO) == (FormGroup(ZERO, GroupId(1), Epoch(1)),)


def test_a_request_id_is_taken_once() -> None:
    front = serving()
    front.submit(A)
    with pytest.raises(AccountingError, match="submitted twice"):
        front.submit(A)


@pytest.mark.parametrize("index", [0, 2])
def test_a_token_that_is_not_the_next_is_a_defect(index: int) -> None:
    front = serving()
    front.submit(A)
    front.handle(report(token(A, 0)))
    (kill,) = front.handle(report(token(A, index)))
    assert isinstance(kill, KillInstance)  # its books are wrong: it costs that group, not all
    assert kill.reason == f"request a: token {index} came, 1 was due at epoch 0"


@pytest.mark.parametrize(
    "stale", [{"epoch": 1}, {"group": 7}, {"incarnation": 1}, {"incarnation": -1}]
)
def test_a_report_of_another_epoch_group_or_incarnation_changes_nothing(
    stale: dict[str, int],
) -> None:
    front = serving()
    front.submit(A)
    event = report(token(A, 5), started=[A], refused=[(A, INVALID, "no")], **stale)
    assert front.handle(event) == ()
    assert front.handle(report(token(A, 0))) == (DeliverTokens(A, (token(A, 0),)),)


def test_an_abort_takes_the_lease_back_and_later_tokens_are_dropped() -> None:
    front = serving()
    front.submit(A)
    revoke = RevokeLease(ZERO, GroupId(0), EPOCH, A)
    assert front.handle(RequestAborted(A)) == (revoke,)
    late = report(token(A, 0), started=[A], refused=[(A, RefusalKind.FAILED, "its row failed")])
    assert front.handle(late) == ()
    assert front.handle(RequestAborted(A)) == ()


def test_an_abort_of_a_parked_request_takes_nothing_back() -> None:
    front = Front()
    front.submit(A)
    assert front.handle(RequestAborted(A)) == ()
    assert front.ready(ZERO) == (FormGroup(ZERO, GroupId(0), EPOCH),)


# ---------------------------------------------------------------- refusals


def refusal(commands: tuple[Command, ...]) -> tuple[RefusalKind, str]:
    (command,) = commands
    assert isinstance(command, RefuseRequest)
    return command.kind, command.message


def test_a_request_beyond_the_context_is_invalid() -> None:
    kind, message = refusal(serving().submit(A, tokens=57))
    assert kind is RefusalKind.INVALID
    assert message == (
        "the request needs 65 tokens (57 in the prompt and max_tokens 8), at most 64 fit one "
        "instance"
    )


def test_a_request_beyond_the_smallest_instance_is_invalid() -> None:
    front = Front(num_instances=2)
    front.ready(ZERO)
    front.handle(InstanceReady(ONE, 0, total_blocks=10))
    assert front.controller.max_request_tokens == 40
    assert refusal(front.submit(A, tokens=33))[0] is RefusalKind.INVALID
    assert isinstance(front.submit(B, tokens=32)[0], LeaseRequest)


@pytest.mark.parametrize("kind", [INVALID, RefusalKind.FAILED])
def test_what_an_instance_refuses_is_refused_with_its_kind_and_reason(kind: RefusalKind) -> None:
    front = serving()
    front.submit(A)
    assert refusal(front.handle(report(refused=[(A, kind, "because")]))) == (kind, "because")
    assert front.controller.num_requests == 0


def test_a_full_queue_refuses_until_a_request_starts() -> None:
    front = serving(max_queued=2)
    front.submit(A)
    front.submit(B)
    kind, message = refusal(front.submit(RequestId("c")))
    assert kind is RefusalKind.QUEUE_FULL
    assert message == "2 requests are queued already (--max-num-queued-reqs)"
    front.handle(report(started=[A]))
    assert isinstance(front.submit(RequestId("d"))[0], LeaseRequest)


@pytest.mark.parametrize("leaves", ["abort", "refusal", "failover"])
def test_a_request_leaves_the_queue_once(leaves: str) -> None:
    front = serving(num_instances=2, max_queued=1)
    front.submit(A)
    if leaves == "abort":
        front.handle(RequestAborted(A))
    elif leaves == "refusal":
        front.handle(report(refused=[(A, INVALID, "no")]))
    else:
        front.handle(report(started=[A]))
        front.lose(ZERO)
        front.handle(report(instance=ONE, group=1, started=[A]))
    assert isinstance(front.submit(B)[0], LeaseRequest)
    assert refusal(front.submit(RequestId("c")))[0] is RefusalKind.QUEUE_FULL


def test_a_draining_server_takes_nothing_new() -> None:
    front = serving()
    front.submit(A)
    front.handle(DrainRequested())
    kind, message = refusal(front.submit(B))
    assert kind is RefusalKind.UNAVAILABLE
    assert message == "the server is draining and takes no new requests"


def test_without_a_living_instance_requests_are_unavailable() -> None:
    front = serving()
    give_up(front)
    assert refusal(front.submit(A)) == (RefusalKind.UNAVAILABLE, "no instance is alive")


def give_up(front: Front) -> tuple[Command, ...]:
    """Lose instance 0 until it is not started again: two restarts in a row are allowed."""
    for incarnation in range(2):
        front.lose(ZERO, incarnation)
        front.tick(10)
        front.ready(ZERO, incarnation + 1)
    return front.lose(ZERO, 2)


# ---------------------------------------------------------------- losses


def test_requests_of_a_lost_instance_continue_after_the_tokens_that_were_delivered() -> None:
    front = serving(num_instances=2)
    front.submit(A)
    front.handle(report(token(A, 0), token(A, 1)))
    (lease,) = front.lose(ZERO)
    known = replace(make_request(A), output_token_ids=(100, 101))
    assert lease == LeaseRequest(ONE, GroupId(1), Epoch(1), known)
    assert front.handle(report(token(A, 2))) == ()  # the last words of the lost one
    delivered = front.handle(report(token(A, 2), instance=ONE, group=1))
    assert delivered == (DeliverTokens(A, (token(A, 2),)),)


def test_requests_wait_for_a_restart_when_no_other_instance_serves() -> None:
    front = serving()
    front.submit(A)
    front.handle(report(token(A, 0)))
    assert front.lose(ZERO) == ()
    assert front.submit(B) == ()
    assert front.tick(1) == (StartInstance(ZERO, 1),)
    form, first, second = front.ready(ZERO, incarnation=1)
    assert form == FormGroup(ZERO, GroupId(1), Epoch(1))  # a group id is never used again
    assert isinstance(first, LeaseRequest)
    assert isinstance(second, LeaseRequest)
    assert [first.request.id, second.request.id] == [A, B]
    assert first.request.output_token_ids == (100,)


def test_restarts_back_off_and_are_given_up() -> None:
    front = serving()
    front.submit(A)
    front.lose(ZERO)
    assert front.state(ZERO) is InstanceState.WAITING_RESTART
    assert front.tick(0.99) == ()
    assert front.tick(0.01) == (StartInstance(ZERO, 1),)
    assert front.tick(5) == ()  # it loads: not our deadline
    front.lose(ZERO, 1)
    assert front.tick(1.99) == ()
    assert front.tick(0.01) == (StartInstance(ZERO, 2),)
    kind, message = refusal(front.lose(ZERO, 2))
    assert front.state(ZERO) is InstanceState.DEAD
    assert kind is RefusalKind.UNAVAILABLE
    assert message == "the last instance was lost: killed by SIGKILL"
    assert front.tick(100) == ()


def test_a_long_service_forgives_earlier_losses() -> None:
    front = serving()
    for incarnation in range(5):
        front.tick(60)
        front.handle(Heartbeat(ZERO, incarnation))
        front.lose(ZERO, incarnation)
        assert front.tick(1) == (StartInstance(ZERO, incarnation + 1),)
        front.ready(ZERO, incarnation + 1)


def test_a_loss_is_told_once() -> None:
    front = serving()
    front.lose(ZERO)
    assert front.lose(ZERO) == ()
    assert front.tick(1) == (StartInstance(ZERO, 1),)
    assert front.lose(ZERO, incarnation=0) == ()
    assert front.state(ZERO) is InstanceState.STARTING


def test_a_ready_message_that_its_sender_did_not_outlive_is_ignored() -> None:
    front = Front()
    front.lose(ZERO)
    assert front.ready(ZERO) == ()
    assert front.state(ZERO) is InstanceState.WAITING_RESTART
    assert front.tick(1) == (StartInstance(ZERO, 1),)
    assert front.ready(ZERO) == ()
    assert front.ready(ZERO, 1) == (FormGroup(ZERO, GroupId(0), EPOCH),)


@pytest.mark.parametrize("sign_of_life", [Heartbeat(ZERO, 0), report(), report(group=7)])
def test_a_silent_instance_is_killed_and_any_word_of_it_prevents_that(sign_of_life: Event) -> None:
    front = serving()
    assert front.tick(10) == ()
    front.handle(sign_of_life)
    assert front.tick(10) == ()
    front.handle(Heartbeat(ZERO, 7))  # of another incarnation
    (kill,) = front.tick(0.5)
    assert kill == KillInstance(ZERO, 0, "no heartbeat for 10.5 s")


# ---------------------------------------------------------------- drain


def test_an_idle_server_is_drained_at_once() -> None:
    assert serving().handle(DrainRequested()) == (DrainComplete(),)


@pytest.mark.parametrize(
    "end",
    [
        report(token(A, 0, FinishReason.LENGTH)),
        report(refused=[(A, INVALID, "no")]),
        RequestAborted(A),
    ],
)
def test_a_drain_is_complete_with_the_end_of_the_last_request(end: Event) -> None:
    front = serving()
    front.submit(A)
    assert front.handle(DrainRequested()) == ()
    assert front.tick(1) == ()
    assert front.handle(end)[-1] == DrainComplete()


def test_a_draining_server_restarts_instances_for_the_requests_it_has() -> None:
    front = serving(num_instances=1)
    front.submit(A)
    front.handle(DrainRequested())
    assert front.lose(ZERO) == ()
    assert front.tick(5) == (StartInstance(ZERO, 1),)


def leases(commands: tuple[Command, ...]) -> list[RequestId]:
    return [command.request.id for command in commands if isinstance(command, LeaseRequest)]


@pytest.mark.parametrize("is_said", [True, False])
def test_a_request_under_which_instances_keep_dying_is_given_up(is_said: bool) -> None:
    """Also when its instances die so early that none says that it has started."""
    front = serving(num_instances=4)
    front.submit(A)
    kinds = []
    for index in range(3):
        if is_said:
            front.handle(report(instance=InstanceId(index), group=index, started=[A]))
        kinds.append(type(front.lose(InstanceId(index))[0]))
    assert kinds == [LeaseRequest, LeaseRequest, RefuseRequest]
    assert front.controller.num_requests == 0


def test_a_token_clears_a_request() -> None:
    front = serving(num_instances=6)
    front.submit(A)
    for index in range(5):
        if index == 2:
            front.handle(report(token(A, 0), instance=TWO, group=2))
        assert leases(front.lose(InstanceId(index))) == ([A] if index < 4 else [])
    assert front.controller.num_requests == 0


def under_trial() -> Front:
    """a, b and c were lost together twice; instance 2 serves."""
    front = Front(num_instances=4)
    front.ready(ZERO)
    for request_id in (A, B, C):
        front.submit(request_id)
    front.lose(ZERO)
    assert leases(front.ready(ONE)) == [A, B, C]
    front.lose(ONE)
    assert leases(front.ready(TWO)) == [A]
    return front


def test_suspects_are_tried_one_at_a_time_and_only_the_guilty_is_given_up() -> None:
    front = under_trial()
    assert leases(front.submit(RequestId("d"))) == ["d"]
    assert leases(front.handle(report(token(A, 0), instance=TWO, group=2))) == [B]
    kind, message = refusal(front.lose(TWO))
    assert kind is RefusalKind.UNAVAILABLE
    assert message == "3 instances in a row were lost under this request: killed by SIGKILL"
    assert leases(front.ready(InstanceId(3))) == [A, C, "d"]


@pytest.mark.parametrize(
    "end",
    [
        RequestAborted(A),
        report(instance=TWO, group=2, refused=[(A, INVALID, "no")]),
        report(token(A, 0, FinishReason.STOP), instance=TWO, group=2),
    ],
)
def test_the_end_of_a_trial_begins_the_next(end: Event) -> None:
    front = under_trial()
    assert leases(front.handle(end)) == [B]
    assert leases(front.handle(RequestAborted(B))) == [C]
    assert leases(front.handle(RequestAborted(C))) == []


# ---------------------------------------------------------------- dispatch


def leased_to(commands: tuple[Command, ...]) -> InstanceId:
    (command,) = commands
    assert isinstance(command, LeaseRequest)
    return command.instance


def test_leases_on_the_way_count_as_load() -> None:
    front = serving(num_instances=2)
    targets = [leased_to(front.submit(RequestId(name), tokens=40)) for name in "abcd"]
    assert sorted(targets) == [ZERO, ZERO, ONE, ONE]


def test_a_lease_counts_until_a_report_has_seen_it() -> None:
    front = serving(num_instances=2)
    assert leased_to(front.submit(A, tokens=40)) == ZERO
    # The report was sent before the lease came: the instance only looks idle.
    front.handle(report(load=IDLE))
    assert leased_to(front.submit(B, tokens=40)) == ONE
    # Now both have taken theirs in, and instance 1 has more to do.
    front.handle(report(load=replace(IDLE, free_blocks=90, leases_seen=1)))
    front.handle(report(instance=ONE, group=1, load=replace(IDLE, free_blocks=80, leases_seen=1)))
    assert leased_to(front.submit(RequestId("c"))) == ZERO


def test_blocks_that_are_only_cached_count_as_free() -> None:
    front = serving(num_instances=2)
    front.handle(report(load=replace(IDLE, free_blocks=5, cached_blocks=95)))
    front.handle(report(instance=ONE, group=1, load=replace(IDLE, free_blocks=50)))
    assert leased_to(front.submit(A)) == ZERO


def test_equal_prompts_follow_each_other_only_as_long_as_the_load_is_equal() -> None:
    front = serving(num_instances=2)
    shared = tuple(range(40))

    def submit(name: str) -> InstanceId:
        params = SamplingParams(8, seed=0)
        request = Request(RequestId(name), (*shared, ord(name)), params, arrival_ns=0)
        return leased_to(front.handle(RequestSubmitted(request)))

    assert [submit(name) for name in "abcdef"].count(ONE) == 3
    # Both are idle again; only instance 0 has been sent the longer prefix.
    for index in (0, 1):
        load = replace(IDLE, leases_seen=3)
        front.handle(report(instance=InstanceId(index), group=index, load=load))
    assert submit("g") == ZERO
    front.handle(report(load=replace(IDLE, free_blocks=70, leases_seen=4)))
    assert submit("h") == ONE


# ---------------------------------------------------------------- check


def test_check_finds_lease_books_that_disagree() -> None:
    front = serving()
    front.submit(A)
    record = front.controller.group_record(ZERO)
    assert record is not None
    record.requests.clear()
    with pytest.raises(AccountingError, match="differ"):
        front.controller.check()
