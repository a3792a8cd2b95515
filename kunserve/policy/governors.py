"""The one place that knows which policy is which governor."""

from __future__ import annotations

from collections.abc import Callable

from kunserve.core.ids import RequestId
from kunserve.core.policy import PolicyName
from kunserve.policy.book import Book
from kunserve.policy.coordinator import Coordinator
from kunserve.policy.dropping import DroppingGovernor
from kunserve.policy.governor import Commands, Governor, StaticPipelines
from kunserve.policy.migrate import MigrateGovernor


def create_governor(
    book: Book,
    coordinator: Coordinator,
    dispatch: Callable[[RequestId], Commands],
    now_ns: int,
) -> Governor:
    """The governor of `book.config.policy`. A cluster of whole instances only has no layout to
    govern.

    Args:
        dispatch: leases a request that no group has.
        now_ns: when the front started.
    """
    policy = book.config.policy
    has_partners = bool(book.config.part_pages)
    if policy is PolicyName.MIGRATE:
        return MigrateGovernor(book, coordinator, dispatch)
    if policy in (PolicyName.KUNSERVE, PolicyName.OBSERVE) and has_partners:
        return DroppingGovernor(book, coordinator, now_ns)
    if policy is PolicyName.STATIC_PP and has_partners:
        return StaticPipelines(book, coordinator)
    return Governor(book, coordinator)
