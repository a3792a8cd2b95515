"""Writes the diagram of the transition protocol into architecture.md, from the table in the code.

make docs
"""

from __future__ import annotations

from pathlib import Path

from kunserve.policy.transition import as_mermaid

PAGE = Path(__file__).with_name("architecture.md")
BEGIN, END = "```mermaid\n", "\n```"


def main() -> None:
    """Replace the block between the fences."""
    text = PAGE.read_text(encoding="utf-8")
    start = text.index(BEGIN) + len(BEGIN)
    stop = text.index(END, start)
    PAGE.write_text(text[:start] + as_mermaid() + text[stop:], encoding="utf-8")


if __name__ == "__main__":
    main()
