"""The admin API of a server under test: layouts are wished for, watched, and waited for."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from tests.support.servers import ADMIN_KEY, DEADLINE_S, ServerProcess, until

Groups = Sequence[Sequence[int]]

SAMPLE_INTERVAL_S = 0.02


class Layouts:
    """Wishes for layouts, one connection. Use as a context manager."""

    def __init__(self, server: ServerProcess) -> None:
        assert server.admin_url, "the server was started without ADMIN_FLAGS"
        self.server = server
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        self._client = httpx.Client(
            base_url=server.admin_url, headers=headers, timeout=2 * DEADLINE_S
        )
        self._executor = ThreadPoolExecutor(4)

    def __enter__(self) -> Layouts:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._executor.shutdown(cancel_futures=True)
        self._client.close()

    # ------------------------------------------------------------ wishes

    def post(self, what: str, **body: Any) -> httpx.Response:
        """POST /admin/WHAT, whatever the answer."""
        return self._client.post(f"/admin/{what}", json=body)

    def post_ahead(self, what: str, **body: Any) -> Future[httpx.Response]:
        """The same without waiting for the answer."""
        return self._executor.submit(self.post, what, **body)

    def wish(self, groups: Groups) -> None:
        """Move to these groups; returns at the last COMMIT."""
        granted(self.post("layout", groups=[list(group) for group in groups]))

    def drop(self) -> None:
        """All into one group; returns at COMMIT."""
        granted(self.post("drop"))

    def restore(self) -> None:
        """Whole instances again; returns at COMMIT."""
        granted(self.post("restore"))

    # ------------------------------------------------------------ what is

    def now(self) -> dict[str, Any]:
        """GET /admin/layout."""
        response = self._client.get("/admin/layout")
        assert response.status_code == 200, response.text
        layout: dict[str, Any] = response.json()
        return layout

    def groups(self) -> set[frozenset[int]]:
        """Instances of each group."""
        return groups_of(self.now())

    def states(self) -> set[str]:
        """States of all transitions under way."""
        return {group["in_transition"] for group in self.now()["groups"]} - {None}

    def stages(self) -> dict[int, tuple[int, int]]:
        """Layers [a, b) that each instance computes."""
        return {
            stage["instance"]: tuple(stage["layers"])
            for group in self.now()["groups"]
            for stage in group["stages"]
        }

    def pids(self) -> dict[int, int | None]:
        """Process of each instance."""
        return {each["id"]: each["pid"] for each in self.now()["instances"]}

    def wait_state(self, *states: str) -> str:
        """Wait until a transition is in one of these states."""
        found = until(lambda: self.states() & set(states), f"a transition in {states}")
        state: str = found.pop()
        return state

    def wait_settled(self, groups: Groups | None = None, deadline_s: float = DEADLINE_S) -> None:
        """Wait until no transition is under way, every instance serves, and the groups are these
        (None: any)."""
        wanted = None if groups is None else {frozenset(group) for group in groups}

        def settled() -> bool:
            layout = self.now()
            found = groups_of(layout)
            return (
                not any(group["in_transition"] for group in layout["groups"])
                and sum(map(len, found)) == len(layout["instances"])
                and (wanted is None or found == wanted)
            )

        until(settled, f"a settled layout {groups or ''}", deadline_s)

    def wait_whole(self, deadline_s: float = DEADLINE_S) -> None:
        """Wait until every instance is a group of its own and nothing is under way."""
        count = len(self.now()["instances"])
        self.wait_settled([[instance] for instance in range(count)], deadline_s)


def groups_of(layout: dict[str, Any]) -> set[frozenset[int]]:
    """Instances of each group of a layout as the API shows it."""
    return {frozenset(stage["instance"] for stage in group["stages"]) for group in layout["groups"]}


def granted(response: httpx.Response) -> None:
    """The wish came true."""
    assert response.status_code == 200, response.text


# ---------------------------------------------------------------- memory


def pss_bytes(pids: Sequence[int]) -> int:
    """Proportional set size of these processes together."""
    total_kib = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines():
            if line.startswith("Pss:"):
                total_kib += int(line.split()[1])
    return total_kib << 10


@contextmanager
def sampled_pss(pids: Sequence[int]) -> Iterator[list[int]]:
    """Sums of PSS over these processes, from now until the end of the context."""
    samples = [pss_bytes(pids)]
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLE_INTERVAL_S):
            samples.append(pss_bytes(pids))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()
        samples.append(pss_bytes(pids))
