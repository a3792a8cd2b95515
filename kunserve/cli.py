"""The command line: `kunserve serve`, `kunserve bench engine`, `kunserve bench serve`,
`kunserve demo`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

from kunserve.bench import demo, engine
from kunserve.bench import serve as bench_serve
from kunserve.config import add_serve_arguments, config_from_args
from kunserve.core.errors import ConfigError, KunserveError
from kunserve.server import serve
from kunserve.version import VERSION

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def _serve(args: argparse.Namespace) -> int:
    config = config_from_args(args)
    logging.basicConfig(
        level=config.log_level.upper(),
        format="%(levelname)s %(asctime)s %(message)s",
        datefmt="%m-%d %H:%M:%S",
    )
    for chatty in ("httpx", "httpcore", "asyncio", "urllib3"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    return serve.run(config)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run`, which takes the parsed arguments."""
    parser = argparse.ArgumentParser(
        prog="kunserve",
        description="An LLM server that answers memory overload by dropping replicated parameters.",
    )
    parser.add_argument("--version", action="version", version=f"kunserve {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve_parser = commands.add_parser("serve", help="serve a model over HTTP (OpenAI's API)")
    add_serve_arguments(serve_parser)
    serve_parser.set_defaults(run=_serve)

    demo_parser = commands.add_parser(
        "demo", help="serve the embedded model and show that it works"
    )
    demo.add_arguments(demo_parser)
    demo_parser.set_defaults(run=demo.run)

    bench_parser = commands.add_parser("bench", help="measure")
    benches = bench_parser.add_subparsers(dest="bench", required=True, metavar="BENCH")
    _add_bench(benches, "engine", "speed of one instance beside the machine's limits", engine)
    _add_bench(benches, "serve", "replay a workload against an OpenAI endpoint", bench_serve)
    return parser


def _add_bench(
    benches: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    help_text: str,
    module: object,
) -> None:
    parser = benches.add_parser(name, help=help_text)
    add_arguments: Callable[[argparse.ArgumentParser], None] = module.add_arguments  # type: ignore[attr-defined]
    add_arguments(parser)
    parser.set_defaults(run=module.run)  # type: ignore[attr-defined]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns its exit code: 0 done, 1 failed, 2 bad usage, 130 interrupted."""
    try:
        args = build_parser().parse_args(argv)
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
