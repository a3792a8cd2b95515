"""Messages: every type survives the wire as it is; anything else is a CodecError."""

from dataclasses import fields
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kunserve.core.events import (
    FormGroup,
    GroupReport,
    Heartbeat,
    InstanceReady,
    LeaseRequest,
    RefusalKind,
    RevokeLease,
    StepTiming,
)
from kunserve.core.migration import MigrationOrder, MigrationReport
from kunserve.core.request import (
    FinishReason,
    Request,
    SamplingParams,
    TokenLogprobs,
    TokenOutput,
)
from kunserve.core.step import GroupLoad
from kunserve.core.transition import TransitionOrder, TransitionReport
from kunserve.runtime.codec import (
    MESSAGE_TYPES,
    CodecError,
    LoadProgress,
    Shutdown,
    StartFailed,
    decode,
    encode,
)

counts = st.integers(0, (1 << 63) - 1)
texts = st.text(max_size=20)
token_ids = st.lists(st.integers(0, 300_000), max_size=20).map(tuple)
finite = st.floats(allow_nan=False)  # a logprob of -inf is sent as it is

params = st.builds(
    SamplingParams,
    max_tokens=st.integers(20, 1 << 20),
    seed=st.integers(0, (1 << 64) - 1),
    temperature=st.floats(0.0, 100.0),
    top_p=st.floats(0.01, 1.0),
    top_k=st.integers(0, 1000),
    min_p=st.floats(0.0, 1.0),
    presence_penalty=st.floats(-2.0, 2.0),
    frequency_penalty=st.floats(-2.0, 2.0),
    repetition_penalty=st.floats(0.1, 100.0),
    logit_bias=st.lists(st.tuples(st.integers(0, 300), st.floats(-100, 100)), max_size=5).map(
        tuple
    ),
    logprobs=st.none() | st.integers(0, 20),
    min_tokens=st.integers(0, 20),
    stop_token_ids=token_ids,
    ignore_eos=st.booleans(),
)
requests = st.builds(Request, texts, token_ids, params, counts, token_ids)
logprobs = st.builds(
    TokenLogprobs,
    finite,
    st.integers(1, 1000),
    st.lists(st.tuples(st.integers(0, 300), finite), max_size=3).map(tuple),
)
outputs = st.builds(
    TokenOutput,
    texts,
    st.integers(0, 1000),
    st.integers(0, 300_000),
    st.none() | logprobs,
    st.none() | st.sampled_from(FinishReason),
    st.booleans(),
)
loads = st.builds(GroupLoad, *[counts] * len(fields(GroupLoad)))
timings = st.builds(StepTiming, counts, counts, counts)
SAMPLES: dict[type, st.SearchStrategy[Any]] = {
    LoadProgress: st.builds(LoadProgress, counts, counts, texts, st.floats(0, 1)),
    StartFailed: st.builds(StartFailed, counts, counts, texts),
    GroupReport: st.builds(
        GroupReport,
        counts,
        counts,
        counts,
        counts,
        counts,
        st.lists(outputs, max_size=4).map(tuple),
        st.lists(texts, max_size=4).map(tuple),
        loads,
        st.lists(st.tuples(texts, st.sampled_from(RefusalKind), texts), max_size=3).map(tuple),
        timings,
    ),
    Heartbeat: st.builds(Heartbeat, counts, counts),
    FormGroup: st.builds(FormGroup, counts, counts, counts),
    LeaseRequest: st.builds(LeaseRequest, counts, counts, counts, requests),
    RevokeLease: st.builds(RevokeLease, counts, counts, counts, texts),
    Shutdown: st.builds(Shutdown),
}
# The rest follows from the types of their fields.
st.register_type_strategy(int, counts)
st.register_type_strategy(str, texts)
st.register_type_strategy(float, finite)
st.register_type_strategy(Request, requests)
for message_type in (
    InstanceReady,
    *get_args(TransitionOrder),
    *get_args(TransitionReport),
    *get_args(MigrationOrder),
    *get_args(MigrationReport),
):
    SAMPLES[message_type] = st.from_type(message_type)
messages = st.one_of(list(SAMPLES.values()))


def test_every_message_type_is_sampled():
    assert set(SAMPLES) == set(MESSAGE_TYPES)
    assert len({kind.__name__ for kind in MESSAGE_TYPES}) == len(MESSAGE_TYPES)


@pytest.mark.parametrize("kind", MESSAGE_TYPES, ids=lambda kind: kind.__name__)
def test_round_trip(kind: type):
    @given(SAMPLES[kind])
    def check(message: Any) -> None:
        decoded = decode(encode(message))
        assert type(decoded) is kind
        assert decoded == message

    check()


@given(messages)
def test_a_message_is_its_name_and_its_fields(message: Any):
    name, body = encode(message)
    assert name == type(message).__name__.encode()
    assert set(msgspec.msgpack.decode(body)) == {field.name for field in fields(message)}


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("count", [0, 1, 3])
def test_wrong_number_of_frames(count: int):
    with pytest.raises(CodecError, match=f"2 frames, got {count}"):
        decode([b"Shutdown", b"\x80", b"\x80"][:count])


@pytest.mark.parametrize("name", [b"", b"shutdown", b"Shutdown ", b"object", b"\xff\xfe", b"Event"])
def test_unknown_type(name: bytes):
    with pytest.raises(CodecError, match="unknown message type"):
        decode([name, b"\x80"])


def test_commands_between_controller_and_world_are_no_messages():
    with pytest.raises(CodecError):
        decode([b"StartInstance", msgspec.msgpack.encode({"instance": 0, "incarnation": 0})])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",  # never used in msgpack
        b"\x80",  # fields missing
        msgspec.msgpack.encode({"instance": 0}),
        msgspec.msgpack.encode({"instance": "0", "incarnation": 0}),
        msgspec.msgpack.encode({"instance": 0, "incarnation": 0.5}),
        msgspec.msgpack.encode({"instance": None, "incarnation": 0}),
        msgspec.msgpack.encode({"instance": 1 << 63, "incarnation": [0]}),
        msgspec.msgpack.encode([0, 0]),
        msgspec.msgpack.encode({"instance": 0, "incarnation": 0}) + b"\x00",
        msgspec.msgpack.encode({"instance": 0, "incarnation": 0})[:-1],
        b"\x81\xa2\xff\xfe\x00",  # text that is no UTF-8
        b"\x81\xa1x" + b"\x91" * 100_000,  # nested without end
    ],
)
def test_fields_of_another_shape(body: bytes):
    with pytest.raises(CodecError, match="Heartbeat"):
        decode([b"Heartbeat", body])


def test_values_out_of_range_are_refused_too():
    """The checks of a message's own types run at decoding."""
    values = {"max_tokens": 1, "seed": 0, "temperature": -1.0}
    request = {"id": "r", "prompt_token_ids": [1], "params": values, "arrival_ns": 0}
    body = {"instance": 0, "group": 0, "epoch": 0, "request": request}
    with pytest.raises(CodecError, match="temperature"):
        decode([b"LeaseRequest", msgspec.msgpack.encode(body)])


@given(st.lists(st.binary(max_size=40), max_size=4))
def test_garbage_is_a_codec_error_or_nothing(frames: list[bytes]):
    with pytest.raises(CodecError):
        decode(frames)


@given(st.sampled_from(MESSAGE_TYPES), st.binary(max_size=60))
def test_garbage_fields(kind: type, body: bytes):
    try:
        message = decode([kind.__name__.encode(), body])
    except CodecError:
        return
    assert type(message) is kind


@given(messages, st.data())
def test_a_damaged_message(message: Any, data: st.DataObject):
    """One byte changed: a message of the same type with other values, or a CodecError."""
    name, body = encode(message)
    index = data.draw(st.integers(0, max(0, len(body) - 1)))
    damaged = body[:index] + bytes([data.draw(st.integers(0, 255))]) + body[index + 1 :]
    try:
        assert type(decode([name, damaged])) is type(message)
    except CodecError:
        return
