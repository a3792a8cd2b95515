"""A member of the cluster: what an instance decides, pure. No clock, no threads, no sockets.

Both worlds drive it, the process (`kunserve.runtime.instance`) and the simulator, turn by turn:

    for message in inbox:
        member.take(message)
    if a step is done:
        member.finish_step(result, now_ns)
    plan = member.next_plan(now_ns)
    send(member.take_report(timing))    # before the plan is computed: see `take_report`
    compute(plan)

and once in a while `send(member.heartbeat(layers_done))`.
"""

from __future__ import annotations

from collections.abc import Callable

from kunserve.core.errors import AccountingError, InvalidRequestError
from kunserve.core.events import (
    FormGroup,
    GroupReport,
    Heartbeat,
    LeaseRequest,
    RefusalKind,
    RevokeLease,
    StepTiming,
)
from kunserve.core.ids import Epoch, InstanceId, RequestId
from kunserve.core.request import TokenOutput
from kunserve.core.step import StepPlan, StepResult
from kunserve.policy.scheduler import Scheduler

MemberMessage = FormGroup | LeaseRequest | RevokeLease
"""What the front tells a member."""


class Member:
    """The group that an instance leads, its scheduler and the plan under way.

    Args:
        instance: whose decisions these are,
        incarnation: and in which of its lives.
        make_scheduler: makes the scheduler of a new group, empty, for plans of that epoch.
    """

    def __init__(
        self,
        instance: InstanceId,
        incarnation: int,
        make_scheduler: Callable[[Epoch], Scheduler],
    ) -> None:
        self._instance = instance
        self._incarnation = incarnation
        self._make_scheduler = make_scheduler
        self._group: FormGroup | None = None
        self._scheduler: Scheduler | None = None
        self._plan: StepPlan | None = None
        self._outputs: list[TokenOutput] = []
        self._started: list[RequestId] = []
        self._refused: list[tuple[RequestId, RefusalKind, str]] = []
        self._has_stepped = False  # since the last report
        self._has_changed = False  # what is leased, since the last report
        self._steps = 0
        self._layers_reported = 0

    # ------------------------------------------------------------ what others may read

    @property
    def group(self) -> FormGroup | None:
        """The group that it was told to lead."""
        return self._group

    @property
    def is_computing(self) -> bool:
        """True while a plan is under way."""
        return self._plan is not None

    @property
    def steps(self) -> int:
        """Steps done."""
        return self._steps

    @property
    def preemptions(self) -> int:
        """Preemptions under the group that it leads."""
        return self._scheduler.load().preemptions if self._scheduler is not None else 0

    def has_work(self) -> bool:
        """True while a request is leased or a plan is under way."""
        return self._scheduler is not None and self._scheduler.has_work()

    def check(self) -> None:
        """Raise AccountingError if blocks and queues do not add up."""
        if self._scheduler is not None:
            self._scheduler.check()

    # ------------------------------------------------------------ messages

    def take(self, message: MemberMessage) -> None:
        """Follow a message of the front. What was meant for an epoch that is over is ignored.

        Raises:
            AccountingError: a group is to be formed while a plan is under way, or the message is
                none for a member.
        """
        if isinstance(message, FormGroup):
            self._form_group(message)
        elif not isinstance(message, LeaseRequest | RevokeLease):
            raise AccountingError(f"a member does not take {type(message).__name__}")
        elif self._scheduler is not None and self._leads(message):
            self._has_changed = True
            if isinstance(message, LeaseRequest):
                self._lease(message, self._scheduler)
            else:
                self._scheduler.abort(message.request_id)

    def _form_group(self, message: FormGroup) -> None:
        if self._plan is not None:
            raise AccountingError("a group cannot be formed while a step is under way")
        self._group = message
        self._scheduler = self._make_scheduler(message.epoch)
        self._has_changed = True

    def _leads(self, message: LeaseRequest | RevokeLease) -> bool:
        group = self._group
        return group is not None and (group.group, group.epoch) == (message.group, message.epoch)

    def _lease(self, message: LeaseRequest, scheduler: Scheduler) -> None:
        try:
            scheduler.add(message.request)
        except InvalidRequestError as error:
            self._refused.append((message.request.id, RefusalKind.INVALID, str(error)))

    # ------------------------------------------------------------ steps

    def next_plan(self, now_ns: int) -> StepPlan | None:
        """The step to compute now; None while one is under way or nothing is to be done."""
        if self._scheduler is None or self._plan is not None:
            return None
        self._plan = self._scheduler.schedule(now_ns)
        self._started += self._scheduler.newly_started()
        return self._plan

    def finish_step(self, result: StepResult, now_ns: int) -> None:
        """Take in the result of the plan under way. Failed rows end their requests.

        Raises:
            AccountingError: no plan is under way, or the result is not its.
        """
        if self._scheduler is None or self._plan is None:
            raise AccountingError(f"step {result.step} is done, but none is under way")
        self._outputs += self._scheduler.update(self._plan, result, now_ns)
        self._refused += [(rid, RefusalKind.FAILED, message) for rid, message in result.failed]
        self._plan = None
        self._has_stepped = True
        self._steps += 1

    # ------------------------------------------------------------ what it says

    def take_report(self, execute_ns: int = 0, schedule_ns: int = 0) -> GroupReport | None:
        """What the front should hear now, or None.

        To be sent after `next_plan` and before its plan is computed: so the front knows which
        requests were about to start when a step takes the whole process with it. There is a
        report after every step, before every step with which requests start, and between steps
        when leases came or went.

        Args:
            execute_ns: time that the executor took since the start of the instance.
            schedule_ns: and the one who drives this member.
        """
        if self._group is None or self._scheduler is None:
            return None
        is_due = self._has_stepped or self._started or (self._has_changed and self._plan is None)
        if not is_due:
            return None
        report = GroupReport(
            instance=self._instance,
            incarnation=self._incarnation,
            group=self._group.group,
            epoch=self._group.epoch,
            step=self._steps,
            outputs=tuple(self._outputs),
            started=tuple(self._started),
            load=self._scheduler.load(),
            refused=tuple(self._refused),
            timing=StepTiming(self._steps, execute_ns, schedule_ns),
        )
        self._outputs.clear()
        self._started.clear()
        self._refused.clear()
        self._has_stepped = self._has_changed = False
        return report

    def heartbeat(self, layers_done: int) -> Heartbeat | None:
        """A sign of life, or None while the step under way stands still, so that the front
        sees it.

        Args:
            layers_done: layers computed since the start of the instance.
        """
        is_stuck = self._plan is not None and layers_done == self._layers_reported
        self._layers_reported = layers_done
        return None if is_stuck else Heartbeat(self._instance, self._incarnation)
