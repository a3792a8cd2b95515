"""Incremental text: exact at character borders, and stop strings wherever token borders lie."""

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from kunserve.server.detokenizer import (
    ByteDecoder,
    OutputText,
    StopConditions,
    StopMatcher,
    WindowDecoder,
)
from kunserve.server.tokenizer import Tokenizer
from tests.support.tiny_tokenizer import EOS, load_tokenizer

TEXT = st.text(st.sampled_from("ab cé€日本😀\n\u0301\ufffd") | st.characters(codec="utf-8"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def byte_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """`text` as single-byte tokens, so that every character border is inside of tokens."""
    by_byte = {
        tokenizer.token_bytes(i): i
        for i in range(tokenizer.vocab_size)
        if len(tokenizer.token_bytes(i)) == 1 and i not in tokenizer.special_ids
    }
    return [by_byte[bytes([byte])] for byte in text.encode()]


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.backend.encode(text, add_special_tokens=False).ids)


def deltas(text: OutputText, token_ids: Sequence[int]) -> list[str]:
    pieces = []
    for count, token_id in enumerate(token_ids, start=1):
        pieces.append(text.push(token_id, count))
        if text.matched is not None:
            return pieces
    return [*pieces, text.flush(len(token_ids))]


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_deltas_join_to_the_decoding_of_any_tokens(tokenizer: Tokenizer, data: st.DataObject):
    """Any token ids: merged, single bytes, invalid UTF-8, special and added tokens."""
    token_ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    for skip in (True, False):
        text = OutputText(tokenizer, (), StopConditions(), skip)
        assert "".join(deltas(text, token_ids)) == tokenizer.decode(token_ids, skip)


@given(text=TEXT, cuts=st.lists(st.booleans(), max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_deltas_join_to_text_whatever_the_split(tokenizer: Tokenizer, text: str, cuts: list[bool]):
    token_ids: list[int] = []
    for index, char in enumerate(text):
        as_bytes = index < len(cuts) and cuts[index]
        token_ids += byte_ids(tokenizer, char) if as_bytes else encode(tokenizer, char)
    pieces = deltas(OutputText(tokenizer, (), StopConditions()), token_ids)
    assert "".join(pieces) == text == tokenizer.decode(token_ids)


def test_a_character_comes_whole_with_its_last_byte(tokenizer: Tokenizer):
    text = OutputText(tokenizer, (), StopConditions())
    pieces = deltas(text, byte_ids(tokenizer, "a😀é"))
    assert pieces == ["a", "", "", "", "😀", "", "é", ""]


def test_an_incomplete_character_is_shown_at_the_end(tokenizer: Tokenizer):
    token_ids = byte_ids(tokenizer, "a😀")[:-1]
    pieces = deltas(OutputText(tokenizer, (), StopConditions()), token_ids)
    assert pieces == ["a", "", "", "", "\ufffd"]
    assert "".join(pieces) == tokenizer.decode(token_ids)


def test_special_tokens_are_skipped_or_shown(tokenizer: Tokenizer):
    [special] = encode(tokenizer, EOS)
    token_ids = [*encode(tokenizer, "hello"), special]
    hidden = deltas(OutputText(tokenizer, (), StopConditions(), True), token_ids)
    shown = deltas(OutputText(tokenizer, (), StopConditions(), False), token_ids)
    assert ("".join(hidden), "".join(shown)) == ("hello", "hello" + EOS)


def test_byte_table_agrees_with_the_library(tokenizer: Tokenizer):
    assert tokenizer.byte_level
    for token_id in range(tokenizer.vocab_size):
        assert tokenizer.token_text(token_id) == tokenizer.decode([token_id], False)


def test_a_long_run_of_invalid_bytes_is_shown_as_it_comes(tokenizer: Tokenizer):
    [start, *_] = byte_ids(tokenizer, "😀")
    pieces = deltas(OutputText(tokenizer, (), StopConditions()), [start] * 1000)
    assert pieces[1:-1] == ["\ufffd"] * 999
    assert "".join(pieces) == tokenizer.decode([start] * 1000)


# ---------------------------------------------------------------- stop strings


def oracle(text: str, stops: Sequence[str], include: bool, search_from: int) -> tuple[str, str]:
    """Read character by character; the first moment at which a stop string is complete."""
    for end in range(search_from + 1, len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return text[: end if include else end - len(stop)], stop
    return text, ""


@given(
    text=st.text("ab€", max_size=30),
    stops=st.lists(st.text("ab€", min_size=1, max_size=5), max_size=4),
    sizes=st.lists(st.integers(1, 4), min_size=30, max_size=30),
    include=st.booleans(),
    min_tokens=st.integers(0, 6),
)
@settings(max_examples=500)
def test_stop_strings_agree_with_a_search_by_character(
    text: str, stops: list[str], sizes: list[int], include: bool, min_tokens: int
):
    matcher = StopMatcher(StopConditions(tuple(stops), include, min_tokens))
    shown, at, search_from = "", 0, 0
    for count, size in enumerate(sizes, start=1):
        shown += matcher.push(text[at : at + size], count)
        at += size
        if count <= min_tokens:
            search_from = min(at, len(text))
        expected, stop = oracle(text[:at], stops, include, search_from)
        assert expected.startswith(shown), "text of a stop string was shown too early"
        if matcher.matched is not None:
            assert (shown, matcher.matched) == (expected, stop)
            return
        assert not stop
    assert shown + matcher.flush() == text


@given(text=st.text("ab", max_size=20), stop=st.text("ab", min_size=1, max_size=6))
def test_nothing_is_held_back_without_need(text: str, stop: str):
    matcher = StopMatcher(StopConditions((stop,)))
    shown = matcher.push(text, 1)
    if matcher.matched is None:
        held = text[len(shown) :]
        longest = max(k for k in range(len(stop)) if text.endswith(stop[:k]))
        assert held == stop[:longest]


@pytest.mark.parametrize(
    ("text", "stops", "shown", "matched"),
    [
        ("one STOP two", ("STOP",), "one ", "STOP"),
        ("abc", ("abc", "b"), "a", "b"),
        ("aab", ("aab", "ab"), "", "aab"),
        ("aab", ("ab", "aab"), "a", "ab"),
        ("aaab", ("aab",), "a", "aab"),
        ("price 5€ and", ("€",), "price 5", "€"),
        ("x😀y", ("😀",), "x", "😀"),
        ("almost STO", ("STOP",), "almost STO", None),
    ],
)
def test_stop_strings_across_token_borders(
    tokenizer: Tokenizer, text: str, stops: tuple[str, ...], shown: str, matched: str | None
):
    for token_ids in (byte_ids(tokenizer, text), encode(tokenizer, text)):
        output = OutputText(tokenizer, (), StopConditions(stops))
        assert "".join(deltas(output, token_ids)) == shown
        assert output.matched == matched


def test_stop_string_is_shown_when_asked_for(tokenizer: Tokenizer):
    output = OutputText(tokenizer, (), StopConditions(("STOP",), include_in_output=True))
    pieces = deltas(output, byte_ids(tokenizer, "a STOP b"))
    assert pieces == ["a", " ", "S", "T", "O", "P"]


def test_stop_strings_wait_for_min_tokens(tokenizer: Tokenizer):
    output = OutputText(tokenizer, (), StopConditions(("b",), min_tokens=3))
    assert "".join(deltas(output, byte_ids(tokenizer, "abcb"))) == "abc"
    assert output.matched == "b"


# ---------------------------------------------------------------- tokenizers with byte fallback


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """As Llama 2's: words with U+2581 for the space, and tokens for single bytes."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁Hello", "▁world", "!", "▁"]
    backend = Backend(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_window_keeps_the_space_after_the_prompt(sentencepiece: Tokenizer):
    hello, world = (sentencepiece.backend.token_to_id(word) for word in ("▁Hello", "▁world"))
    assert not sentencepiece.byte_level
    assert deltas(OutputText(sentencepiece, (hello,), StopConditions()), [world]) == [" world", ""]
    assert deltas(OutputText(sentencepiece, (), StopConditions()), [hello, world]) == [
        "Hello",
        " world",
        "",
    ]


@given(text=st.text(max_size=20))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_window_joins_to_text(sentencepiece: Tokenizer, text: str):
    hello = sentencepiece.backend.token_to_id("▁Hello")
    token_ids = [1 + byte for byte in text.encode()]
    decoder = WindowDecoder(sentencepiece, (hello,), True)
    pieces = [decoder.push(token_id) for token_id in [*token_ids, hello]]
    assert "".join(pieces) + decoder.flush() == text + " Hello"


@given(token_ids=st.lists(st.integers(0, 260), max_size=80))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_window_takes_any_tokens(sentencepiece: Tokenizer, token_ids: list[int]):
    decoder = WindowDecoder(sentencepiece, (), True)
    text = "".join(decoder.push(token_id) for token_id in token_ids) + decoder.flush()
    assert text.count("Hello") == token_ids.count(257)


def test_byte_decoder_is_what_byte_level_tokenizers_get(tokenizer: Tokenizer):
    decoder = ByteDecoder(tokenizer, True)
    assert decoder.push(10_000) == ""
