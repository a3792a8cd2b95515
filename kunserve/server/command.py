"""The command `kunserve serve`: flags, logging, and then `kunserve.server.serve`."""

from __future__ import annotations

import argparse
import logging

from kunserve.config import add_serve_arguments, config_from_args
from kunserve.server import serve

_CHATTY_LOGGERS = ("httpx", "httpcore", "asyncio", "urllib3")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one flag for every field of `ServeConfig`."""
    add_serve_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal; returns the exit code.

    Raises:
        KunserveError: the start failed; the message is one line.
    """
    config = config_from_args(args)
    logging.basicConfig(
        level=config.log_level.upper(),
        format="%(levelname)s %(asctime)s %(message)s",
        datefmt="%m-%d %H:%M:%S",
    )
    for name in _CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    return serve.run(config)
