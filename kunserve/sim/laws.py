"""Laws of a server, checked from outside: only from what went into the controller and came out.

Safety, after every event:

    tokens      each request's stream is its reference stream, every token once and in order
    leases      a request is leased to one living group at a time, with exactly what was delivered;
                from COMMIT to its Adopt it is on its way to one group; under which too many
                instances in a row were lost, it is leased no more
    refusals    each has a reason that is true when it is given, and no request ends otherwise
    deaths      no request ends more instances than a request may before it is given up
    groups      (group, epoch) is never reused, epochs grow, stages cover every layer exactly once
    orders      only members of a transition hear of it; they are fenced, then all remapped; an
                instance is in one transition at a time; who is to give parts to others has them
                by its stage, so that it keeps them
    wishes      each is answered once: granted when the layout is as wished, else a reason is given
    migrations  the lease moves from one living leader to another, once the source has been told to
                stop, with exactly what was delivered; nobody is in two of them at a time
    kills       nothing that makes progress is killed
    drain       complete exactly when nothing is left

Liveness is the world's: after the last fault, every request ends before a virtual deadline.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from kunserve.core.errors import KunserveError
from kunserve.core.events import (
    AnswerWish,
    Command,
    DeliverTokens,
    DrainComplete,
    FormGroup,
    InstanceDrainWished,
    LayoutWished,
    LeaseRequest,
    LogMigration,
    LogRedispatch,
    LogTransition,
    RefusalKind,
    RefuseRequest,
    RevokeLease,
    WishKind,
)
from kunserve.core.ids import Epoch, GroupId, InstanceId, MigrationId, RequestId, TransitionId
from kunserve.core.layout import Group, Layout, PartKind, whole_instance
from kunserve.core.migration import ActivateRequest, OfferBlocks, PullBlocks, StopRequest
from kunserve.core.request import Request, TokenOutput
from kunserve.core.transition import Adopt, Fence, PartSource, Peers, Prepare, Remap, Reset
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

    `has_given_up`: no process is left, and each was lost more often than it is restarted. `layout`:
    what the controller says it is; `draining_instances` are to leave it.
    """

    draining: bool
    has_given_up: bool
    layout: Layout | None = None
    draining_instances: frozenset[InstanceId] = frozenset()


GroupName = tuple[GroupId, Epoch]


@dataclass
class Stream:
    """One request as its client sees it.

    `losses`: of instances in a row, without a token since. All requests of a lost group count one;
    beside one on trial, never the last one.
    """

    request: Request
    expected: tuple[TokenOutput, ...]
    fits: bool
    state: StreamState = StreamState.OPEN
    refusal: RefusalKind | None = None
    delivered: int = 0
    has_started: bool = False
    leased_to: GroupName | None = None
    on_its_way: TransitionId | None = None
    leases: int = 0
    losses: int = 0
    deaths: int = 0

    @property
    def is_poison(self) -> bool:
        """Its rows give no token."""
        return POISON_TOKEN_ID in self.request.prompt_token_ids


@dataclass
class Moving:
    """A migration under way. `source` names the group that has the lease."""

    request_id: RequestId
    source: GroupName
    instances: set[InstanceId]
    is_stopped: bool = False


class Laws:
    """Watches one front.

    Args:
        max_request_tokens: most tokens, prompt and `max_tokens`, of a request that can be served.
        max_num_queued_reqs: bound of the requests that wait for their first step.
        eos_token_ids: tokens that end a stream.
        max_losses: instances that may be lost under a request before it is given up.
        num_layers: of the model.
    """

    def __init__(
        self,
        max_request_tokens: int,
        max_num_queued_reqs: int,
        eos_token_ids: tuple[int, ...],
        max_losses: int,
        num_layers: int = 4,
    ) -> None:
        self._num_layers = num_layers
        self._max_losses = max_losses
        self._max_request_tokens = max_request_tokens
        self._max_num_queued_reqs = max_num_queued_reqs
        self._eos_token_ids = eos_token_ids
        self._streams: dict[RequestId, Stream] = {}
        self._living: dict[InstanceId, Group] = {}
        self._names: set[GroupName] = set()
        self._made_by: dict[GroupName, TransitionId] = {}
        self._fenced: dict[TransitionId, set[InstanceId]] = {}
        self._orphans: list[Stream] = []  # of the loss that the front has just been told
        self._on_trial: Stream | None = None
        self._wishes: dict[int, LayoutWished | InstanceDrainWished] = {}
        self._answered: set[int] = set()
        self.commits = 0
        self.granted = 0
        self.outcomes: list[str] = []
        self._moving: dict[MigrationId, Moving] = {}
        self.migration_outcomes: list[str] = []
        self.redispatched = 0

    # ------------------------------------------------------------ what went in

    def submitted(self, request: Request) -> None:
        """A client hands in a request."""
        needed = len(request.prompt_token_ids) + request.params.max_tokens
        fits = needed <= self._max_request_tokens
        has_tokens = fits and not {POISON_TOKEN_ID, KILLER_TOKEN_ID} & {*request.prompt_token_ids}
        expected: tuple[TokenOutput, ...] = ()
        if has_tokens:
            expected = reference_outputs(request, self._eos_token_ids, self._num_layers)
        self._streams[request.id] = Stream(request, expected, fits)

    def aborted(self, request_id: RequestId) -> None:
        """A client has gone."""
        self._count_losses()
        stream = self._streams.get(request_id)
        if stream is not None and stream.state is StreamState.OPEN:
            stream.state = StreamState.ABORTED
            self._end_trial(stream)

    def started(self, request_ids: tuple[RequestId, ...]) -> None:
        """An instance says that these requests left its queue."""
        for request_id in request_ids:
            self._streams[request_id].has_started = True

    def instance_lost(self, instance: InstanceId) -> None:
        """The front was told that a process is gone, and its group with it."""
        self._count_losses()
        self._break_group(instance)

    def _break_group(self, instance: InstanceId) -> None:
        group = self._living.get(instance)
        if group is None:
            return
        for member in group.instances:
            del self._living[member]
        name = (group.id, group.epoch)
        made_by = self._made_by.get(name)
        for stream in self._streams.values():
            is_on_its_way = stream.on_its_way is not None and stream.on_its_way == made_by
            if stream.leased_to == name or is_on_its_way:
                stream.leased_to = stream.on_its_way = None
                self._orphans.append(stream)

    def _count_losses(self) -> None:
        """All groups that broke by one loss are known."""
        orphans, self._orphans = self._orphans, []
        trial = self._on_trial
        for stream in orphans:
            is_beside_trial = trial in orphans and stream is not trial
            most = self._max_losses - 1 if is_beside_trial else self._max_losses
            stream.losses = min(stream.losses + 1, most)

    def _end_trial(self, stream: Stream) -> None:
        if self._on_trial is stream:
            self._on_trial = None

    def wished(self, wish: LayoutWished | InstanceDrainWished) -> None:
        """Somebody asks for another layout."""
        self._wishes[wish.wish] = wish

    def instance_killed_by(self, request_id: RequestId) -> None:
        """A process ended because it computed this request.

        Raises:
            LawBrokenError: it was let loose on too many.
        """
        stream = self._streams[request_id]
        stream.deaths += 1
        most = self._max_losses
        _law(stream.deaths <= most, f"{request_id} ended {stream.deaths} instances")

    # ------------------------------------------------------------ what came out

    def judge(self, command: Command, facts: FrontFacts) -> None:
        """Check one command.

        Raises:
            LawBrokenError: it breaks a law.
        """
        if not isinstance(command, Peers | Reset):
            self._count_losses()
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
        elif isinstance(command, Prepare):
            for source in command.gains:
                self._judge_source(source)
        elif isinstance(command, Fence | Remap | Adopt | Reset | LogTransition):
            self._judge_transition(command)
        elif isinstance(command, AnswerWish):
            self._judge_answer(command, facts)
        elif isinstance(command, DrainComplete):
            _law(facts.draining, "a drain is complete that nobody asked for")
            _law(not self.open_requests, f"a drain is complete before {self.open_requests}")
        else:
            self._judge_migration(command)

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
        _law(stream.leased_to is not None, f"tokens of {command.request_id} come from nowhere")
        _law(command.outputs == due, f"{due} was due, {command.outputs} was delivered")
        stream.delivered = end
        stream.losses = 0
        self._end_trial(stream)
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
            stream.leased_to is None and stream.on_its_way is None,
            f"{command.request.id} is leased to group {stream.leased_to} and "
            f"{command.group} at a time (on its way: {stream.on_its_way})",
        )
        group = self._living.get(command.instance)
        is_right = (
            group is not None
            and group.leader == command.instance
            and (group.id, group.epoch) == (command.group, command.epoch)
        )
        _law(is_right, f"{command} goes to nobody who leads such a group, but {group}")
        self._check_known(stream, command.request)
        losses = stream.losses
        _law(losses < self._max_losses, f"{command.request.id} is leased after {losses} losses")
        if 0 < losses >= self._max_losses - 1:
            _law(self._on_trial is None, f"{command.request.id} is leased during another's trial")
            self._on_trial = stream
        stream.leased_to = (command.group, command.epoch)
        stream.leases += 1

    def _check_known(self, stream: Stream, request: Request) -> None:
        known = tuple(output.token_id for output in stream.expected[: stream.delivered])
        _law(request.output_token_ids == known, f"{request} should continue {known}")

    def _judge_revoke(self, command: RevokeLease) -> None:
        stream = self._streams[command.request_id]
        name = (command.group, command.epoch)
        on_its_way = stream.on_its_way is not None and stream.on_its_way == self._made_by.get(name)
        _law(
            stream.leased_to == name or on_its_way,
            f"{command.request_id} is taken back from group {name}, "
            f"but it is leased to {stream.leased_to}",
        )
        stream.leased_to = stream.on_its_way = None

    def _judge_group(self, command: FormGroup) -> None:
        group = whole_instance(command.group, command.epoch, command.instance, self._num_layers)
        _law(command.instance not in self._living, f"{command} goes to a member of a living group")
        self._name_group(group)
        self._living[command.instance] = group

    def _name_group(self, group: Group) -> None:
        Layout(self._num_layers, (group,))  # raises unless its stages cover all layers once
        name = (group.id, group.epoch)
        _law(name not in self._names, f"group {name} is formed twice")
        older = [epoch for group_id, epoch in self._names if group_id == group.id]
        _law(group.epoch > max(older, default=-1), f"the epoch of group {name} does not grow")
        self._names.add(name)

    def _end(self, stream: Stream, state: StreamState) -> None:
        stream.state = state
        stream.leased_to = stream.on_its_way = None
        self._end_trial(stream)

    # ------------------------------------------------------------ transitions

    def _judge_source(self, source: PartSource) -> None:
        peer, part = source.peer, source.part
        if peer is None:
            return
        group = self._living.get(peer)
        if group is None:
            raise LawBrokenError(f"{part} is to come from {peer}, which is in no group")
        if part.kind is PartKind.LAYER:
            has_it = part.index in group.stages[group.instances.index(peer)].layers
        else:
            has_it = group.leader == peer
        _law(has_it, f"{part} is to come from {peer}, whose stage of {group} has none")

    def _judge_transition(self, command: Command) -> None:
        if isinstance(command, Fence):
            group = self._living.get(command.instance)
            is_right = group is not None and (group.id, group.epoch) == (
                command.group,
                command.epoch,
            )
            _law(is_right, f"{command} goes to a member of {group}")
            others = [t for t, members in self._fenced.items() if command.instance in members]
            _law(not others, f"{command} comes, but transition {others} has fenced it")
            self._fenced.setdefault(command.transition, set()).add(command.instance)
        elif isinstance(command, Remap):
            self._judge_remap(command)
        elif isinstance(command, Adopt):
            self._judge_adopt(command)
        elif isinstance(command, Reset):
            self._break_group(command.instance)
        elif isinstance(command, LogTransition):
            record = command.record
            members = {i for group in record.sources for i in group.instances}
            if record.outcome == "commit":
                _law(self._fenced[record.id] == members, f"not all of {members} are fenced")
                self._take_leases(record.id, record.sources)
                self.commits += 1
            else:
                self._fenced.pop(record.id, None)
                self.outcomes.append(record.outcome)

    def _take_leases(self, transition: TransitionId, sources: tuple[Group, ...]) -> None:
        """COMMIT: the source groups are no more."""
        names = {(group.id, group.epoch) for group in sources}
        for group in sources:
            for instance in group.instances:
                _law(self._living.get(instance) == group, f"{group} is none that lives")
                del self._living[instance]
        for stream in self._streams.values():
            if stream.leased_to in names:
                stream.leased_to, stream.on_its_way = None, transition

    def _judge_remap(self, command: Remap) -> None:
        fenced = self._fenced.get(command.transition, set())
        _law(command.instance in fenced, f"{command.instance} is remapped, but not fenced")
        name = (command.group.id, command.group.epoch)
        if name not in self._names:
            self._name_group(command.group)
            self._made_by[name] = command.transition
        known = self._living.setdefault(command.instance, command.group)
        _law(known == command.group, f"instance {command.instance} is in {known} and {name}")

    def _judge_adopt(self, command: Adopt) -> None:
        group = self._living.get(command.instance)
        name = (command.group, command.epoch)
        is_right = group is not None and (group.id, group.epoch) == name
        _law(is_right, f"{command.instance} adopts for {name}, but is in {group}")
        _law(
            not command.requests or (group is not None and group.leader == command.instance),
            f"requests are adopted by {command.instance}, which does not lead",
        )
        for adopted in command.requests:
            stream = self._open_stream(adopted.request.id, "adoption")
            _law(
                stream.on_its_way == command.transition,
                f"{adopted.request.id} is adopted, but it is not on its way there",
            )
            self._check_known(stream, adopted.request)
            stream.leased_to, stream.on_its_way = name, None

    # ------------------------------------------------------------ migrations

    def _judge_migration(self, command: Command) -> None:
        if isinstance(command, OfferBlocks):
            moving = Moving(command.request_id, (command.group, command.epoch), set())
            moving = self._moving.setdefault(command.migration, moving)
            self._join(moving, command.instance)
        elif isinstance(command, PullBlocks):
            self._join(self._moving[command.migration], command.instance)
        elif isinstance(command, StopRequest):
            self._moving[command.migration].is_stopped = True
        elif isinstance(command, ActivateRequest):
            self._judge_activation(command)
        elif isinstance(command, LogMigration):
            self._moving.pop(command.record.id, None)
            self.migration_outcomes.append(command.record.outcome)
        elif isinstance(command, LogRedispatch):
            self.redispatched += len(command.request_ids)

    def _join(self, moving: Moving, instance: InstanceId) -> None:
        others = [m for m in self._moving.values() if m is not moving and instance in m.instances]
        _law(not others, f"instance {instance} is in two migrations: {moving} and {others}")
        moving.instances.add(instance)

    def _judge_activation(self, command: ActivateRequest) -> None:
        request, moving = command.request, self._moving[command.migration]
        stream = self._open_stream(request.id, "activation")
        _law(moving.request_id == request.id, f"{request.id} moves in the place of {moving}")
        _law(moving.is_stopped, f"{request.id} moves, but its source was not told to stop")
        _law(stream.leased_to == moving.source, f"{request.id} moves, but not from {moving}")
        group = self._living.get(command.instance)
        name = (command.group, command.epoch)
        is_right = group is not None and (group.id, group.epoch) == name
        _law(is_right, f"{request.id} moves to {name}, but {command.instance} is in {group}")
        self._check_known(stream, request)
        known = len(request.prompt_token_ids) + len(request.output_token_ids)
        _law(command.computed_tokens < known, f"{request.id} moves with nothing left to compute")
        stream.leased_to = name

    # ------------------------------------------------------------ wishes

    def _judge_answer(self, command: AnswerWish, facts: FrontFacts) -> None:
        if command.wish < 0:  # the controller's own
            return
        wish = self._wishes.get(command.wish)
        if wish is None:
            raise LawBrokenError(f"{command}, but nobody wished it")
        _law(command.wish not in self._answered, f"wish {command.wish} is answered twice")
        _law(bool(command.message), f"wish {command.wish} gets no reason")
        self._answered.add(command.wish)
        self.granted += command.granted
        if not command.granted or not isinstance(wish, LayoutWished) or facts.layout is None:
            return
        now = {frozenset(group.instances) for group in facts.layout.groups}
        everybody = frozenset(i for group in now for i in group)
        wanted = {frozenset(group) for group in wish.groups}
        if wish.kind is WishKind.RESTORE:
            wanted = {frozenset((i,)) for i in everybody}
        elif wish.kind is WishKind.DROP:
            drained = {frozenset((i,)) for i in everybody & facts.draining_instances}
            rest = everybody - facts.draining_instances
            wanted = drained | ({rest} if rest else set())
        _law(now == wanted, f"wish {wish} is granted, but the layout is {now}")

    @property
    def open_wishes(self) -> tuple[int, ...]:
        """Wishes without an answer so far."""
        return tuple(wish for wish in self._wishes if wish not in self._answered)

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
