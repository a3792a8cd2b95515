"""Greedy tokens of transformers for the embedded model, as the reference of what kunserve serves.

    python tests/references/generate.py [--model DIR] [--output FILE]

float32, eager attention, one prompt at a time, always `NEW_TOKENS` tokens (end-of-sequence is
ignored). Another implementation sums in another order, so that two tokens whose logits differ by
less than about 1e-4 may swap: a candidate with a step whose margin (best logit less second) is
below `MIN_MARGIN` is left out, and listed in the file as such.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from kunserve.runtime.embedded import WEIGHTS_FILE
from kunserve.runtime.model_source import default_cache_dir, resolve_model

NEW_TOKENS = 160
MIN_MARGIN = 4e-3
WANTED_OF_EACH_KIND = 8
MARGIN_DECIMALS = 5
OUTPUT = Path(__file__).with_name("smollm2_greedy.json")

# More candidates than wanted: those with a near-tie are left out, in this order.
CHAT_CANDIDATES: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", "What is the capital of France?"),),
    (("user", "Write a short story about a lighthouse keeper who finds a message in a bottle."),),
    (("system", "You answer in one sentence."), ("user", "Why is the sky blue?")),
    (("user", "Give me five tips for learning to play the guitar."),),
    (
        ("user", "My name is Anna and I have two cats."),
        ("assistant", "Nice to meet you, Anna! What are your cats called?"),
        ("user", "They are called Milo and Luna. How many legs do my cats have together?"),
    ),
    (("user", "Explain how a refrigerator works to a ten-year-old."),),
    (("user", "Write a Python function that returns the n-th Fibonacci number."),),
    (("user", "Translate to French: Good morning, how are you today?"),),
    (("system", "You are a pirate."), ("user", "Tell me about your ship.")),
    (("user", "List the planets of the solar system from the Sun outwards."),),
    (("user", "What are the advantages and disadvantages of electric cars?"),),
    (("user", "Summarize the plot of Romeo and Juliet."),),
    (("user", "How do I bake a simple loaf of bread?"),),
    (("user", "Write a polite e-mail asking for a day off next Friday."),),
    (("user", "What is 17 * 23? Show the steps."),),
    (("user", "Name three famous painters and one work of each."),),
)

_HARBOUR = (
    "The harbour town woke slowly. Gulls circled above the fishing boats, and the smell of salt "
    "and tar drifted up the narrow streets. Old Matthias opened his shop as he had done for forty "
    "years, swept the steps, and set out the baskets of rope and lanterns. "
)
_ENGINE = (
    "A steam engine turns heat into motion. Water is boiled in a closed vessel, the steam expands "
    "and pushes a piston, and a crank turns the back-and-forth movement into rotation. In {year}, "
    "engineers measured its efficiency at {percent} percent. "
)

TEXT_CANDIDATES = (
    "The quick brown fox jumps over the lazy dog.",
    "In the beginning, the universe was",
    "def quicksort(items):\n    ",
    "The three most important inventions of the nineteenth century were",
    _HARBOUR * 4 + "That morning, however,",
    "Photosynthesis is the process by which",
    "Once upon a time there was a small village at the foot of a mountain.",
    "".join(_ENGINE.format(year=1780 + 10 * i, percent=2 + i) for i in range(12))
    + "In conclusion,",
    "Chapter 1: Introduction to Linear Algebra\n\nA vector is",
    "Ingredients:\n- 2 cups of flour\n- 1 cup of sugar\n-",
    "The history of the Roman Empire can be divided into",
    "Q: What is the boiling point of water?\nA:",
    "import numpy as np\n\n# Compute the mean and variance of an array\n",
    "Climate change affects the oceans in several ways. First,",
    "1, 2, 3, 5, 8, 13,",
    "Dear Sir or Madam,\n\nI am writing to",
)


@dataclass(frozen=True)
class Generated:
    """Greedy tokens of one prompt, and by step the best logit less the second."""

    tokens: list[int]
    margins: list[float]


@torch.inference_mode()
def generate(model: Any, prompt_token_ids: list[int]) -> Generated:
    """`NEW_TOKENS` greedy tokens after `prompt_token_ids`, whatever end-of-sequence says."""
    tokens: list[int] = []
    margins: list[float] = []
    inputs = torch.tensor([prompt_token_ids])
    cache = None
    for _ in range(NEW_TOKENS):
        output = model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        best = torch.topk(output.logits[0, -1], 2)
        tokens.append(int(best.indices[0]))
        margins.append(round(float(best.values[0] - best.values[1]), MARGIN_DECIMALS))
        inputs = torch.tensor([[tokens[-1]]])
    return Generated(tokens, margins)


def collect(model: Any, kind: str, candidates: list[tuple[Any, list[int]]]) -> tuple[Any, Any]:
    """(accepted, left out) entries for the candidates (prompt, prompt token ids) of one kind."""
    accepted: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    for prompt, prompt_token_ids in candidates:
        if len(accepted) == WANTED_OF_EACH_KIND:
            break
        generated = generate(model, prompt_token_ids)
        entry = {"kind": kind, "prompt": prompt, "min_margin": min(generated.margins)}
        print(f"{kind:5} {entry['min_margin']:.5f} {str(prompt)[:60]!r}", file=sys.stderr)
        if entry["min_margin"] < MIN_MARGIN:
            left_out.append(entry | {"near_tie_step": generated.margins.index(entry["min_margin"])})
            continue
        accepted.append(
            entry
            | {
                "prompt_token_ids": prompt_token_ids,
                "tokens": generated.tokens,
                "margins": generated.margins,
            }
        )
    return accepted, left_out


def main() -> None:
    """Write the reference file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a Hugging Face directory instead of the embedded model")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    started = time.monotonic()
    source = resolve_model(arguments.model, default_cache_dir(os.environ), print)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source.directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    conversations = [
        [{"role": role, "content": content} for role, content in chat] for chat in CHAT_CANDIDATES
    ]
    chats = [
        (
            chat,
            tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False),
        )
        for chat in conversations
    ]
    texts = [(text, tokenizer.encode(text)) for text in TEXT_CANDIDATES]
    chat_prompts, chat_left_out = collect(model, "chat", chats)
    text_prompts, text_left_out = collect(model, "text", texts)
    with (source.directory / WEIGHTS_FILE).open("rb") as file:
        weights_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    result = {
        "model": source.name,
        "weights_sha256": weights_sha256,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "dtype": "float32",
        "attention": "eager",
        "new_tokens": NEW_TOKENS,
        "required_margin": MIN_MARGIN,
        "note": "Candidates with a near-tie (a margin below required_margin) were replaced by the "
        "next candidate of their kind and are listed in left_out; end-of-sequence is ignored.",
        "prompts": chat_prompts + text_prompts,
        "left_out": chat_left_out + text_left_out,
    }
    arguments.output.write_text(_dump(result), encoding="utf-8")
    print(f"{arguments.output} in {time.monotonic() - started:.0f} s", file=sys.stderr)


def _dump(result: dict[str, Any]) -> str:
    """JSON with one line for every prompt, so that a change shows as the prompts it concerns."""
    lists = {key: value for key, value in result.items() if isinstance(value, list)}
    lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in result.items() if k not in lists]
    for key, entries in lists.items():
        rows = ",\n    ".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
        lines.append(f"  {json.dumps(key)}: [\n    {rows}\n  ]")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    main()
