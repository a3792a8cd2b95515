"""Identifiers. Distinct types, so that an instance is never taken for a slot."""

from __future__ import annotations

from typing import NewType

InstanceId = NewType("InstanceId", int)
"""Position of an instance in the cluster, 0..N-1. A restarted instance keeps it."""

GroupId = NewType("GroupId", int)
"""Identity of a group of stages. Never reused within one run of the front."""

Epoch = NewType("Epoch", int)
"""Version of a group's layout. Per group, grows by every transition, never reused."""

RequestId = NewType("RequestId", str)
"""Identity of one request, given by the front, unique for the life of the front."""

BlockId = NewType("BlockId", int)
"""slot * slot_blocks + index: the permanent name of a KV block (see `kunserve.policy.pages`)."""

HostBlock = NewType("HostBlock", int)
"""Index of a block of an instance's host memory, which holds all layers of one KV block."""

SlotId = NewType("SlotId", int)
"""Permanent slot of an instance inside its partner domain, 0..15."""

TransitionId = NewType("TransitionId", int)
"""Identity of one transition between layouts. Never reused within one run of the front."""

MigrationId = NewType("MigrationId", int)
"""Identity of one migration of a request. Never reused within one run of the front."""
