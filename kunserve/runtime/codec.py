"""Messages between the front and the instances: plain dataclasses as msgpack, never pickle.

A message is two frames: the name of its type and its fields. A name that is not in the table, or
fields of another shape, is an error and never an object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import msgspec

from kunserve.core.errors import KunserveError
from kunserve.core.events import (
    FormGroup,
    GroupReport,
    Heartbeat,
    InstanceReady,
    LeaseRequest,
    RevokeLease,
)
from kunserve.core.ids import InstanceId
from kunserve.core.migration import MigrationOrder, MigrationReport
from kunserve.core.transition import TransitionOrder, TransitionReport


class CodecError(KunserveError):
    """A message that this version does not understand."""


@dataclass(frozen=True)
class LoadProgress:
    """An instance says how far its start is. `fraction` is in 0..1."""

    instance: InstanceId
    incarnation: int
    activity: str
    fraction: float


@dataclass(frozen=True)
class StartFailed:
    """An instance could not start; it ends after this message."""

    instance: InstanceId
    incarnation: int
    message: str


@dataclass(frozen=True)
class Shutdown:
    """The front ends the instance."""


MESSAGE_TYPES: tuple[type, ...] = (
    LoadProgress,
    StartFailed,
    InstanceReady,
    GroupReport,
    Heartbeat,
    FormGroup,
    LeaseRequest,
    RevokeLease,
    Shutdown,
    *get_args(TransitionOrder),
    *get_args(TransitionReport),
    *get_args(MigrationOrder),
    *get_args(MigrationReport),
)

# msgspec lets text that is no UTF-8 and too deep nesting through as Python's own errors.
_BAD_FIELDS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_ENCODER = msgspec.msgpack.Encoder()
_DECODERS: dict[bytes, msgspec.msgpack.Decoder[Any]] = {
    message_type.__name__.encode(): msgspec.msgpack.Decoder(message_type)
    for message_type in MESSAGE_TYPES
}


def encode(message: Any) -> tuple[bytes, bytes]:
    """The two frames of a message."""
    return type(message).__name__.encode(), _ENCODER.encode(message)


def decode(frames: Sequence[bytes]) -> Any:
    """The message of two frames.

    Raises:
        CodecError: unknown type, wrong number of frames, or fields of another shape.
    """
    if len(frames) != 2:
        raise CodecError(f"a message has 2 frames, got {len(frames)}")
    decoder = _DECODERS.get(frames[0])
    if decoder is None:
        raise CodecError(f"unknown message type {frames[0]!r}")
    try:
        return decoder.decode(frames[1])
    except (*_BAD_FIELDS, KunserveError) as error:  # the latter by a type's own checks
        raise CodecError(f"bad {frames[0].decode()} message: {error}") from error
