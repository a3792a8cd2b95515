"""The command line: `kunserve serve`, `kunserve top`, `kunserve demo`, `kunserve profile`,
`kunserve bench engine`, `kunserve bench serve`, `kunserve bench transition`,
`kunserve bench pipeline`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from kunserve.core.errors import ConfigError, KunserveError
from kunserve.version import VERSION

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class CommandModule(Protocol):
    """What a module that is a command offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's flags."""

    def run(self, args: argparse.Namespace) -> int:
        """Do it; returns the exit code."""


@dataclass(frozen=True)
class Command:
    """A command and the module that does it, loaded only when it is asked for: the front must not
    carry what only benchmarks need (torch alone is 150 MiB)."""

    words: tuple[str, ...]
    module: str
    help_text: str

    def load(self) -> CommandModule:
        """Import the module."""
        return cast(CommandModule, importlib.import_module(self.module))


COMMANDS = (
    Command(("serve",), "kunserve.server.command", "serve a model over HTTP (OpenAI's API)"),
    Command(("top",), "kunserve.server.top", "watch a running server in the terminal"),
    Command(("demo",), "kunserve.bench.demo", "serve the embedded model and show that it works"),
    Command(
        ("profile",), "kunserve.bench.profile", "measure what steps cost here and store the fit"
    ),
    Command(
        ("bench", "engine"),
        "kunserve.bench.engine",
        "speed of one instance beside the machine's limits",
    ),
    Command(
        ("bench", "serve"),
        "kunserve.bench.serve",
        "replay a workload against an OpenAI endpoint",
    ),
    Command(
        ("bench", "transition"),
        "kunserve.bench.transition",
        "what a drop and a restore cost on a server of its own",
    ),
    Command(
        ("bench", "pipeline"),
        "kunserve.bench.pipeline",
        "throughput of two whole instances against the merged pair",
    ),
)


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of all commands, with the flags of the one that `argv` names."""
    parser = argparse.ArgumentParser(
        prog="kunserve",
        description="An LLM server that answers memory overload by dropping replicated parameters.",
    )
    parser.add_argument("--version", action="version", version=f"kunserve {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    bench = commands.add_parser("bench", help="measure")
    levels = {1: commands, 2: bench.add_subparsers(dest="bench", required=True, metavar="BENCH")}
    words = tuple(word for word in argv if not word.startswith("-"))
    for command in COMMANDS:
        added = levels[len(command.words)].add_parser(command.words[-1], help=command.help_text)
        if words[: len(command.words)] == command.words:
            module = command.load()
            module.add_arguments(added)
            added.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns its exit code: 0 done, 1 failed, 2 bad usage, 130 interrupted."""
    words = sys.argv[1:] if argv is None else argv
    try:
        args = build_parser(words).parse_args(words)
        code: int = args.run(args)
        return code
    except ConfigError as error:
        print(f"kunserve: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KunserveError as error:
        print(f"kunserve: error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("kunserve: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
