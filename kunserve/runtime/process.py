"""What a child process must do so that it never outlives the front."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from collections.abc import Callable
from functools import partial

# Loaded here: between fork and exec, when other threads may hold locks, as little as possible runs.
_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1
_MOST_FILES = 65536


def die_with_parent(parent_pid: int) -> Callable[[], None]:
    """A `preexec_fn` for a child that the kernel kills when the thread that started it ends.

    Survives the exec of an ordinary program, so that there is no time in which the child could
    be left behind. The front starts instances from a thread that lives as long as itself.

    Args:
        parent_pid: the process that starts the child, os.getpid() there.
    """
    return partial(_signal_at_parents_end, signal.SIGKILL, parent_pid)


def end_with_parent(parent_pid: int) -> Callable[[], None]:
    """A `preexec_fn` for a command that serves on behalf of its parent: SIGTERM, so that it ends
    its own children in order, when the parent's thread ends.

    Args:
        parent_pid: the process that starts the child, os.getpid() there.
    """
    return partial(_end_with_parent, parent_pid)


def _end_with_parent(parent_pid: int) -> None:
    # A handler of the parent's would swallow the signal if it came just before the exec.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _signal_at_parents_end(signal.SIGTERM, parent_pid)


def _signal_at_parents_end(number: int, parent_pid: int) -> None:
    if _LIBC.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:  # it ended before the call
        os._exit(1)


def ignore_terminal_signals() -> None:
    """Ctrl-C and a service manager's SIGTERM reach the whole process group: the front decides
    what ends when, or a drain would lose the requests it waits for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def raise_file_limit() -> None:
    """Raise the soft limit on open files: each request under way holds a connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
