"""The one place that knows which policy is which governor."""

from __future__ import annotations

from kunserve.core.policy import PolicyName
from kunserve.policy.book import Book
from kunserve.policy.coordinator import Coordinator
from kunserve.policy.dropping import DroppingGovernor
from kunserve.policy.governor import Governor, StaticPipelines


def create_governor(book: Book, coordinator: Coordinator, now_ns: int) -> Governor:
    """The governor of `book.config.policy`. A cluster of whole instances only has nothing to
    govern."""
    policy = book.config.policy
    has_partners = bool(book.config.part_pages)
    if policy in (PolicyName.KUNSERVE, PolicyName.OBSERVE) and has_partners:
        return DroppingGovernor(book, coordinator, now_ns)
    if policy is PolicyName.STATIC_PP and has_partners:
        return StaticPipelines(book, coordinator)
    return Governor(book, coordinator)
