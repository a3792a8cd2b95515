"""Request bodies: defaults, bounds, what is refused by name and what is ignored."""

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest

from kunserve.core.errors import ConfigError, InvalidRequestError, RequestTooLargeError
from kunserve.core.request import SamplingParams
from kunserve.server.errors import HttpError
from kunserve.server.protocol import (
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    parse_request,
)
from kunserve.server.settings import GenerationDefaults, ServerConfig, load_generation_defaults

VOCAB = 1000
NO_DEFAULTS = GenerationDefaults()
HI = [{"role": "user", "content": "hi"}]
SEEDS = random.Random(0)


def completion(**fields: Any) -> CompletionRequest:
    return parse_request(json.dumps({"prompt": "hi", **fields}).encode(), CompletionRequest)


def chat(**fields: Any) -> ChatCompletionRequest:
    return parse_request(json.dumps({"messages": HI, **fields}).encode(), ChatCompletionRequest)


def sampling(
    request: GenerationRequest, defaults: GenerationDefaults = NO_DEFAULTS, **given: Any
) -> SamplingParams:
    given = {
        "max_tokens": 16,
        "seed": request.first_seed(SEEDS),
        "logprobs": None,
    } | given
    return request.sampling_params(vocab_size=VOCAB, defaults=defaults, **given)


def convert(raw: bytes, model: type[GenerationRequest]) -> None:
    """Everything that a route does with a body before the engine sees it."""
    request = parse_request(raw, model)
    assert isinstance(request, CompletionRequest | ChatCompletionRequest)
    logprobs = request.num_logprobs(20)
    if isinstance(request, CompletionRequest):
        request.prompts(VOCAB, 256)
    else:
        for message in request.messages:
            message.for_template()
    request.stop_conditions()
    max_tokens = request.max_output_tokens(10, 100, None)
    sampling(request, logprobs=logprobs, max_tokens=max_tokens)


def param_of(body: bytes | dict[str, Any], model: type[GenerationRequest]) -> str | None:
    """The field that a body is refused for."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises((HttpError, InvalidRequestError)) as caught:
        convert(raw, model)
    assert getattr(caught.value, "status", 400) == 400
    return caught.value.param


# ---------------------------------------------------------------- defaults


def test_defaults_are_openais():
    params = sampling(completion(), seed=5)
    assert params == SamplingParams(max_tokens=16, seed=5)
    assert params.temperature == 1.0
    assert not completion().output_options(None).stream


def test_the_models_defaults_stand_behind_the_request():
    defaults = GenerationDefaults(0.6, 0.9, 20, 0.1, 1.1)
    params = sampling(completion(), defaults)
    got = (params.temperature, params.top_p, params.top_k, params.min_p, params.repetition_penalty)
    assert got == (0.6, 0.9, 20, 0.1, 1.1)
    explicit = sampling(completion(temperature=0, top_p=1, top_k=-1), defaults)
    assert (explicit.temperature, explicit.top_p, explicit.top_k) == (0.0, 1.0, 0)


def test_generation_config_file(tmp_path: Path):
    assert load_generation_defaults(tmp_path) == GenerationDefaults()
    path = tmp_path / "generation_config.json"
    path.write_text('{"temperature": 0.6, "top_k": -1, "max_new_tokens": 7, "eos_token_id": [1]}')
    assert load_generation_defaults(tmp_path) == GenerationDefaults(
        temperature=0.6, top_k=0, max_tokens_limit=7
    )
    for bad in ("[]", "{", '{"temperature": -1}', '{"top_p": "x"}', '{"top_k": NaN}'):
        path.write_text(bad)
        with pytest.raises(ConfigError):
            load_generation_defaults(tmp_path)


@pytest.mark.parametrize(("given", "used"), [(0, 0.0), (1e-9, 0.0), (0.005, 0.01), (2.5, 2.5)])
def test_tiny_temperatures_as_vllm(given: float, used: float):
    assert sampling(completion(temperature=given)).temperature == used


def test_seeds():
    assert completion(seed=7).first_seed(SEEDS) == 7
    assert completion(seed=-2).first_seed(SEEDS) == (1 << 64) - 2
    assert completion(seed=(1 << 63) - 1).first_seed(SEEDS) == (1 << 63) - 1
    drawn = {completion(seed=seed).first_seed(SEEDS) for seed in (None, -1, None, -1)}
    assert len(drawn) == 4
    assert sampling(completion(), seed=(1 << 64) + 3).seed == 3


def test_output_lengths():
    assert completion().max_output_tokens(10, 100, None) == 16
    assert completion().max_output_tokens(95, 100, None) == 5
    assert completion(max_tokens=None).max_output_tokens(10, 100, None) == 90
    assert completion(max_tokens=90).max_output_tokens(10, 100, None) == 90
    assert completion(max_tokens=50).max_output_tokens(10, 100, 20) == 20
    assert chat().max_output_tokens(10, 100, None) == 90
    assert chat().max_output_tokens(10, 100, 20) == 20
    both = chat(max_tokens=1, max_completion_tokens=2)
    assert both.max_output_tokens(10, 100, None) == 2
    for request, prompt_len in ((completion(max_tokens=91), 10), (completion(), 100)):
        with pytest.raises(RequestTooLargeError):
            request.max_output_tokens(prompt_len, 100, None)


# ---------------------------------------------------------------- prompts and messages


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ("a",)),
        ("", ("",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 999]], ((1,), (2, 999))),
    ],
)
def test_forms_of_prompts(prompt: Any, expected: Any):
    assert completion(prompt=prompt).prompts(VOCAB, 256) == expected


@pytest.mark.parametrize(
    "prompt",
    [
        None, [], [[]], {}, 7, True, [1, "a"], ["a", [1]], [True], [1.5], [-1], [1000], [[1], []],
        [[1], ["a"]], [[[1]]], [None], ["a"] * 257, [10**30],
    ],
)  # fmt: skip
def test_nonsense_prompts(prompt: Any):
    assert param_of({"prompt": prompt}, CompletionRequest) == "prompt"


def test_answers_of_one_request_are_bounded():
    with pytest.raises(InvalidRequestError, match="at most 256 answers"):
        completion(prompt=["a"] * 17, n=16).prompts(VOCAB, 256)


def test_message_content():
    parts = [{"type": "text", "text": "a"}, "b", {"type": "input_text", "text": "c"}]
    request = chat(messages=[{"role": "user", "content": parts, "name": "x", "other": 1}])
    assert request.messages[0].for_template() == {"role": "user", "content": "a\nb\nc", "name": "x"}
    assert chat(messages=[{"role": "user"}]).messages[0].for_template()["content"] == ""


@pytest.mark.parametrize(
    "messages",
    [
        None, [], "hi", [None], [{}], [{"content": "x"}], [{"role": 1, "content": "x"}],
        [{"role": "user", "content": 5}], [{"role": "user", "content": {"text": "x"}}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": [{"type": ["text"], "text": "x"}]}],
        [{"role": "user", "content": [5]}], [{"role": "x" * 65, "content": "x"}],
        [{"role": "assistant", "tool_calls": [{"id": "1"}]}], HI * 4097,
    ],
)  # fmt: skip
def test_nonsense_messages(messages: Any):
    assert param_of({"messages": messages}, ChatCompletionRequest) == "messages"


# ---------------------------------------------------------------- fields


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", 1e9), ("temperature", "hot"), ("temperature", []),
        ("top_p", 0), ("top_p", 1.1), ("top_k", -2), ("top_k", 1.5), ("min_p", 2),
        ("presence_penalty", 3), ("frequency_penalty", -3), ("repetition_penalty", 0),
        ("seed", 1 << 63), ("seed", -(1 << 63) - 1), ("seed", "x"), ("seed", 10**400),
        ("n", 0), ("n", 17), ("n", 10**30), ("max_tokens", 0), ("max_tokens", -1),
        ("max_tokens", 10**30), ("min_tokens", 17), ("min_tokens", -1),
        ("stop", [""]), ("stop", ""), ("stop", ["x"] * 17), ("stop", "x" * (MAX_STOP_CHARS + 1)),
        ("stop", [1]), ("stop", {"a": 1}), ("stop_token_ids", [1000]), ("stop_token_ids", [-1]),
        ("stop_token_ids", [True]), ("stop_token_ids", ["1"]), ("stop_token_ids", [1] * 129),
        ("logit_bias", {"1000": 1}), ("logit_bias", {"-1": 1}), ("logit_bias", {"x": 1}),
        ("logit_bias", {"9" * 5000: 1}), ("logit_bias", {"²": 1}), ("logit_bias", {"1": 101}),
        ("logit_bias", {"1": "much"}), ("logit_bias", {str(i): 1 for i in range(301)}),
        ("model", "x" * 1025), ("model", 5), ("stream", "perhaps"), ("stream_options", 5),
        ("stream_options", {"include_usage": True}), ("best_of", 2), ("use_beam_search", True),
        ("echo", True), ("prompt_logprobs", 0), ("response_format", {"type": "json_object"}),
        ("guided_json", {}), ("structured_outputs", {"regex": "x"}), ("priority", 1),
        ("truncate_prompt_tokens", 5), ("bad_words", ["x"]), ("allowed_token_ids", [1]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_fields_are_bounded(field: str, value: Any, kind: str):
    if kind == "completion":
        body: dict[str, Any] = {"prompt": "hi", "max_tokens": 16, field: value}
        assert param_of(body, CompletionRequest) == field
    else:
        body = {"messages": HI, "max_tokens": 16, field: value}
        assert param_of(body, ChatCompletionRequest) == field


@pytest.mark.parametrize(
    ("field", "value"),
    [("suffix", "x"), ("prompt_embeds", "x"), ("logprobs", 21), ("logprobs", -1)],
)
def test_fields_of_completions(field: str, value: Any):
    assert param_of({"prompt": "hi", field: value}, CompletionRequest) == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]), ("tool_choice", "auto"), ("functions", [{}]),
        ("chat_template", "{{ 1 }}"), ("top_logprobs", 3), ("top_logprobs", 21),
        ("max_completion_tokens", 0), ("chat_template_kwargs", {"tokenize": True}),
        ("chat_template_kwargs", {"chat_template": "x"}), ("chat_template_kwargs", 1),
        ("chat_template_kwargs", {str(i): 1 for i in range(65)}), ("modalities", ["audio"]),
        ("continue_final_message", True), ("documents", [{}]), ("audio", {}),
    ],
)  # fmt: skip
def test_fields_of_chat(field: str, value: Any):
    assert param_of({"messages": HI, field: value}, ChatCompletionRequest) == field


def test_neutral_and_unknown_fields_are_accepted(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG, "kunserve")
    completion(suffix=None, best_of=1, echo=False, user="me", response_format={"type": "text"})
    chat(tools=[], tool_choice="none", modalities=["text"], priority=0, store=True)
    completion(frobnicate={"a": [1]})
    assert "ignored request fields (1): ['frobnicate']" in caplog.text
    assert "echo" not in caplog.text


def test_logprobs():
    assert completion(logprobs=0).num_logprobs(20) == 0
    assert completion().num_logprobs(20) is None
    assert chat(logprobs=True).num_logprobs(20) == 0
    assert chat(logprobs=True, top_logprobs=20).num_logprobs(20) == 20
    assert chat(logprobs=False, top_logprobs=0).num_logprobs(20) is None


def test_other_values_arrive():
    params = sampling(
        completion(
            top_k=2000, logit_bias={"5": -100, "3": 1.5}, stop_token_ids=[7], ignore_eos=True,
            min_tokens=3, presence_penalty=1, frequency_penalty=-1,
        )
    )  # fmt: skip
    assert params.top_k == 0
    assert params.logit_bias == ((3, 1.5), (5, -100.0))
    assert (params.stop_token_ids, params.ignore_eos, params.min_tokens) == ((7,), True, 3)
    assert (params.presence_penalty, params.frequency_penalty) == (1.0, -1.0)
    stop = completion(stop=["a", "b"], include_stop_str_in_output=True, min_tokens=2)
    assert stop.stop_conditions().strings == ("a", "b")
    options = completion(stream=True, stream_options={"continuous_usage_stats": True})
    assert not options.output_options(None).continuous_usage


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        (["x"] * 17, f"stop has 17 strings; at most {MAX_STOP_STRINGS} are allowed"),
        ("x" * 1025, f"a string of 1025 characters; at most {MAX_STOP_CHARS} are allowed"),
        (["a", "x" * 2000], f"a string of 2000 characters; at most {MAX_STOP_CHARS} are allowed"),
        (["a", 1], "stop must be a string or a list of strings"),
        (7, "stop must be a string or a list of strings"),
        (["a", ""], "stop must not contain an empty string"),
    ],
)
def test_errors_about_stop_name_the_limit(stop: Any, message: str):
    with pytest.raises(InvalidRequestError, match=message):
        completion(stop=stop)


def test_the_largest_stop():
    strings = ["x" * MAX_STOP_CHARS] * MAX_STOP_STRINGS
    assert completion(stop=strings).stop_conditions().strings == tuple(strings)
    assert completion(stop=None).stop_conditions().strings == ()
    assert completion(stop=[]).stop_conditions().strings == ()


def test_template_kwargs():
    request = chat(reasoning_effort="low", chat_template_kwargs={"enable_thinking": False})
    assert request.template_kwargs() == {"reasoning_effort": "low", "enable_thinking": False}


# ---------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"nonsense", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "x": Infinity}',
        b"[" * 100_000, b'{"a":' * 300 + b"1" + b"}" * 300, b'{"prompt": "a"} x',
        b'{"seed": ' + b"9" * 10_000 + b"}",
    ],
)  # fmt: skip
def test_malformed_json(body: bytes):
    assert param_of(body, CompletionRequest) is None


def test_infinity_by_overflow_is_refused():
    body = b'{"prompt": "a", "temperature": 1e999}'
    assert param_of(body, CompletionRequest) == "temperature"


def test_server_config_checks():
    with pytest.raises(ConfigError):
        ServerConfig(served_model_names=())
    with pytest.raises(ConfigError):
        ServerConfig(served_model_names=("m",), api_keys=("",))
