"""Laws of a server, checked from outside: only from what went into the controller and came out.

Safety, after every event:

    tokens      each request's stream is its reference stream, every token once and in order
    leases      a request is leased to one living group at a time, with exactly the tokens delivered
    refusals    each has a reason that is true when it is given, and no request ends otherwise
    deaths      no request ends more instances than a request may before it is given up
    groups      (group, epoch) is never reused
    kills       nothing that makes progress is killed
    drain       complete exactly when nothing is left

Liveness is the world's: after the last fault, every request ends before a virtual deadline.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from kunserve.core.errors import KunserveError
from kunserve.core.events import (
    Command,
    DeliverTokens,
    DrainComplete,
    FormGroup,
    LeaseRequest,
    RefusalKind,
    RefuseRequest,
    RevokeLease,
)
from kunserve.core.ids import Epoch, GroupId, InstanceId, RequestId
from kunserve.core.request import Request, TokenOutput
from kunserve.sim.toy_model import KILLER_TOKEN_ID, POISON_TOKEN_ID, reference_outputs


class LawBrokenError(KunserveError):
    """The server did what it must never do. The same seed shows it again."""


class StreamState(Enum):
    """How a request stands with its client."""

    OPEN = "open"
    FINISHED = "finished"
    REFUSED = "refused"
    ABORTED = "aborted"


@dataclass(frozen=True)
class FrontFacts:
    """What is true of the world at a moment, for judging refusals.

    `has_given_up`: no process is left, and each was lost more often than it is restarted.
    """

    draining: bool
    has_given_up: bool


@dataclass
class Stream:
    """One request as its client sees it."""

    request: Request
    expected: tuple[TokenOutput, ...]
    fits: bool
    state: StreamState = StreamState.OPEN
    refusal: RefusalKind | None = None
    delivered: int = 0
    has_started: bool = False
    leased_to: InstanceId | None = None
    leases: int = 0
    losses: int = 0
    deaths: int = 0

    @property
    def is_poison(self) -> bool:
        """Its rows give no token."""
        return POISON_TOKEN_ID in self.request.prompt_token_ids


class Laws:
    """Watches one front.

    Args:
        max_request_tokens: most tokens, prompt and `max_tokens`, of a request that can be served.
        max_num_queued_reqs: bound of the requests that wait for their first step.
        eos_token_ids: tokens that end a stream.
        max_losses: instances that may be lost under a request before it is given up.
    """

    def __init__(
        self,
        max_request_tokens: int,
        max_num_queued_reqs: int,
        eos_token_ids: tuple[int, ...],
        max_losses: int,
    ) -> None:
        self._max_losses = max_losses
        self._max_request_tokens = max_request_tokens
        self._max_num_queued_reqs = max_num_queued_reqs
        self._eos_token_ids = eos_token_ids
        self._streams: dict[RequestId, Stream] = {}
        self._formed: set[GroupId | tuple[GroupId, Epoch]] = set()

    # ------------------------------------------------------------ what went in

    def submitted(self, request: Request) -> None:
        """A client hands in a request."""
        needed = len(request.prompt_token_ids) + request.params.max_tokens
        fits = needed <= self._max_request_tokens
        has_tokens = fits and not {POISON_TOKEN_ID, KILLER_TOKEN_ID} & {*request.prompt_token_ids}
        expected = reference_outputs(request, self._eos_token_ids) if has_tokens else ()
        self._streams[request.id] = Stream(request, expected, fits)

    def aborted(self, request_id: RequestId) -> None:
        """A client has gone."""
        stream = self._streams.get(request_id)
        if stream is not None and stream.state is StreamState.OPEN:
            stream.state = StreamState.ABORTED

    def started(self, request_ids: tuple[RequestId, ...]) -> None:
        """An instance says that these requests left its queue."""
        for request_id in request_ids:
            self._streams[request_id].has_started = True

    def instance_lost(self, instance: InstanceId) -> None:
        """The front was told that a process is gone, and its leases with it."""
        for stream in self._streams.values():
            if stream.leased_to == instance:
                stream.leased_to = None
                stream.losses += 1

    def instance_killed_by(self, request_id: RequestId) -> None:
        """A process ended because it computed this request.

        Raises:
            LawBrokenError: it was let loose on too many.
        """
        stream = self._streams[request_id]
        stream.deaths += 1
        _law(stream.deaths <= self._max_losses, f"{request_id} ended {stream.deaths} instances")

    # ------------------------------------------------------------ what came out

    def judge(self, command: Command, facts: FrontFacts) -> None:
        """Check one command.

        Raises:
            LawBrokenError: it breaks a law.
        """
        if isinstance(command, DeliverTokens):
            self._judge_tokens(command)
        elif isinstance(command, RefuseRequest):
            self._judge_refusal(command, facts)
        elif isinstance(command, LeaseRequest):
            self._judge_lease(command)
        elif isinstance(command, RevokeLease):
            self._judge_revoke(command)
        elif isinstance(command, FormGroup):
            self._judge_group(command)
        elif isinstance(command, DrainComplete):
            _law(facts.draining, "a drain is complete that nobody asked for")
            _law(not self.open_requests, f"a drain is complete before {self.open_requests}")

    def _open_stream(self, request_id: RequestId, what: str) -> Stream:
        stream = self._streams.get(request_id)
        if stream is None:
            raise LawBrokenError(f"{what}: {request_id} was never submitted")
        _law(stream.state is StreamState.OPEN, f"{what}: {request_id} is {stream.state.value}")
        return stream

    def _judge_tokens(self, command: DeliverTokens) -> None:
        stream = self._open_stream(command.request_id, "tokens")
        _law(bool(command.outputs), f"a delivery to {command.request_id} has no tokens")
        end = stream.delivered + len(command.outputs)
        due = stream.expected[stream.delivered : end]
        _law(command.outputs == due, f"{due} was due, {command.outputs} was delivered")
        stream.delivered = end
        stream.has_started = True
        if end == len(stream.expected):
            self._end(stream, StreamState.FINISHED)

    def _judge_refusal(self, command: RefuseRequest, facts: FrontFacts) -> None:
        stream = self._open_stream(command.request_id, "refusal")
        is_new = not stream.leases
        if command.kind is RefusalKind.INVALID:
            is_true = not stream.fits
        elif command.kind is RefusalKind.FAILED:
            is_true = stream.is_poison and stream.leased_to is not None
        elif command.kind is RefusalKind.QUEUE_FULL:
            # The new one is open as well. The front may not yet know of all that started, so it
            # counts at least those of which no report has come.
            others = len(self.open_requests) - 1
            is_true = is_new and others >= self._max_num_queued_reqs
        else:
            is_blamed = stream.losses >= self._max_losses
            is_true = facts.has_given_up or (facts.draining and is_new) or is_blamed
        _law(is_true, f"{command.request_id} was refused without cause: {command}")
        _law(bool(command.message), "a refusal says nothing")
        stream.refusal = command.kind
        self._end(stream, StreamState.REFUSED)

    def _judge_lease(self, command: LeaseRequest) -> None:
        stream = self._open_stream(command.request.id, "lease")
        _law(
            stream.leased_to is None,
            f"{command.request.id} is leased to instances {stream.leased_to} and "
            f"{command.instance} at a time",
        )
        known = tuple(output.token_id for output in stream.expected[: stream.delivered])
        _law(command.request.output_token_ids == known, f"{command} should continue {known}")
        stream.leased_to = command.instance
        stream.leases += 1

    def _judge_revoke(self, command: RevokeLease) -> None:
        stream = self._streams[command.request_id]
        _law(
            stream.leased_to == command.instance,
            f"{command.request_id} is taken back from instance {command.instance}, "
            f"but it is leased to {stream.leased_to}",
        )
        stream.leased_to = None

    def _judge_group(self, command: FormGroup) -> None:
        name = (command.group, command.epoch)
        _law(name not in self._formed, f"group {name} is formed twice")
        self._formed.add(name)

    def _end(self, stream: Stream, state: StreamState) -> None:
        stream.state = state
        stream.leased_to = None

    def check_queue(self) -> None:
        """Raise LawBrokenError if more requests wait for their first step than may."""
        waiting = sum(not self._streams[rid].has_started for rid in self.open_requests)
        limit = self._max_num_queued_reqs
        _law(waiting <= limit, f"{waiting} requests wait, at most {limit} may")

    # ------------------------------------------------------------ what it saw

    @property
    def open_requests(self) -> tuple[RequestId, ...]:
        """Requests without an end so far."""
        return tuple(r for r, s in self._streams.items() if s.state is StreamState.OPEN)

    @property
    def streams(self) -> tuple[Stream, ...]:
        """All requests, in order of submission."""
        return tuple(self._streams.values())

    def delivered_tokens(self, request_id: RequestId) -> int:
        """How many tokens the client has."""
        return self._streams[request_id].delivered


def _law(holds: bool, otherwise: str) -> None:
    if not holds:
        raise LawBrokenError(otherwise)
