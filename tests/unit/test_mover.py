"""Transfers of one member: credit, windows, retries, and what is given up."""

from __future__ import annotations

import pytest

from kunserve.core.actions import (
    CancelPulls,
    CheckPart,
    LoadPart,
    PageCopy,
    Pull,
    SendPeer,
)
from kunserve.core.errors import AccountingError
from kunserve.core.ids import InstanceId, SlotId, TransitionId
from kunserve.core.layout import Part, PartKind
from kunserve.core.memory import PageRun, pages_of
from kunserve.core.transition import PageMove, PagesPulled, PartSource
from kunserve.policy.cost_model import CostModel
from kunserve.policy.memory import MemoryBook
from kunserve.policy.mover import MOST_ATTEMPTS, Digest, Mover
from kunserve.policy.scheduler import SchedulerConfig
from kunserve.sim.instance import SimInstanceConfig
from kunserve.sim.memory import PhysicalPages, TableMapper

ZERO, ONE, TWO = InstanceId(0), InstanceId(1), InstanceId(2)
T = TransitionId(1)
CONFIG = SimInstanceConfig(
    SchedulerConfig(block_size=4, max_model_len=32),
    CostModel(0, 0, 1, 1),
    num_layers=4,
    kv_pages=4,
    blocks_per_page=2,
)
SLOTS = CONFIG.slots(3)
OWN, OTHER = SLOTS.slot_range(SlotId(0)).start, SLOTS.slot_range(SlotId(1)).start
LAYERS = tuple(Part(PartKind.LAYER, index) for index in range(4))


def make_memory() -> MemoryBook:
    """Instance 0; the parts of layers 2 and 3 and all KV of them are gone: 12 pages are free."""
    mapper = TableMapper(PhysicalPages(CONFIG.memory_plan.num_pages, 2, 4), 4)
    memory = MemoryBook(CONFIG.memory_plan, SLOTS, SlotId(0), mapper, poison=True)
    for part in LAYERS[2:]:
        memory.release_part(part)
    for layer in (2, 3):
        memory.unmap_kv(layer, memory.home_runs)
    return memory


def make_mover(
    window: int | None = 64, memory: MemoryBook | None = None, digest: Digest | None = None
) -> Mover:
    return Mover(ZERO, memory or make_memory(), window, digest)


def move(number: int, page: int | None = None, source: InstanceId = ONE, mask: int = 3) -> PageMove:
    """Layers 0 and 1 of a page of the other slot."""
    page = OTHER + number if page is None else page
    return PageMove(number, page, (0, 1), source, ZERO, (40 + number, 50 + number), mask)


def pulls(mover: Mover) -> list[Pull]:
    return [action for action in mover.take_actions() if isinstance(action, Pull)]


def use_up(memory: MemoryBook, left: int) -> None:
    """Give all free pages but `left` to a page range of layer 0."""
    memory.map_kv(0, [PageRun(SLOTS.slot_range(SlotId(2)).start, memory.free_pages - left)])


def test_a_move_copies_its_blocks_of_every_layer() -> None:
    memory = make_memory()
    mover = make_mover(memory=memory)
    mover.exchange(T, ZERO, [move(0, mask=0b10)])
    (pull,) = pulls(mover)
    here = [memory.physical_page(layer, OTHER) for layer in (0, 1)]
    assert pull.peer == ONE
    assert pull.copies == (PageCopy(here[0], 40, 1, 1), PageCopy(here[1], 50, 1, 1))
    assert mover.waits_for == ONE
    mover.pulled(pull.transfer, None)
    own = mover.announce()
    assert own == PagesPulled(ZERO, T, (0,), (OTHER,))
    assert not mover.is_moving


def test_a_source_and_a_leader_elsewhere_hear_of_what_arrived() -> None:
    mover = make_mover()
    mover.exchange(T, TWO, [move(0), move(1, source=TWO)])
    for pull in pulls(mover):
        mover.pulled(pull.transfer, None)
    assert mover.announce() is None
    said = {a.target: a.message for a in mover.take_actions() if isinstance(a, SendPeer)}
    assert said[ONE] == PagesPulled(ZERO, T, (0,), (OTHER,))
    assert said[TWO] == PagesPulled(ZERO, T, (0, 1), (OTHER, OTHER + 1))


def test_the_window_bounds_what_the_pump_has() -> None:
    mover = make_mover(window=4)
    mover.exchange(T, ZERO, [move(number) for number in range(4)])
    first = pulls(mover)
    assert len(first) == 2
    mover.pulled(first[0].transfer, None)
    assert len(pulls(mover)) == 1


def test_without_credit_a_move_waits_for_a_page_that_leaves() -> None:
    memory = make_memory()
    use_up(memory, left=2)
    memory.set_escrow(2)
    mover = make_mover(memory=memory)
    leaving = PageMove(7, OWN, (0, 1), ZERO, ONE, (0, 0), 3)
    mover.expect_departures([leaving])
    mover.exchange(T, ZERO, [move(0), move(1)])
    (pull,) = pulls(mover)
    assert memory.free_pages == memory.escrow_pages == 0
    mover.pulled(pull.transfer, None)
    assert pulls(mover) == []
    assert mover.waits_for == ONE
    mover.depart(PagesPulled(ONE, T, (7,), (OWN,)))
    (pull,) = pulls(mover)
    assert OWN not in pages_of(memory.kv_runs(0))
    mover.pulled(pull.transfer, None)
    mover.announce()
    assert not mover.is_moving
    memory.check()


def test_to_gather_ends_where_free_pages_end() -> None:
    memory = make_memory()
    use_up(memory, left=5)
    mover = make_mover(memory=memory)
    mover.gather(T, [move(number) for number in range(4)])
    for pull in pulls(mover):
        mover.pulled(pull.transfer, None)
    assert mover.gathered == (0, 1)
    assert not mover.is_moving
    assert memory.free_pages == 1


def test_a_failed_pull_is_tried_again_and_then_stands_still() -> None:
    mover = make_mover()
    mover.exchange(T, ZERO, [move(0)])
    for _ in range(MOST_ATTEMPTS):
        (pull,) = pulls(mover)
        mover.pulled(pull.transfer, "the link was lost")
    assert pulls(mover) == []
    assert mover.is_moving
    assert mover.waits_for == ONE


def test_a_page_that_arrived_changed_is_a_defect() -> None:
    mover = make_mover(digest=lambda places: "here")
    mover.expect_departures([PageMove(7, OWN, (0, 1), ZERO, ONE, (0, 0), 3)])
    with pytest.raises(AccountingError, match="arrived changed at 1"):
        mover.depart(PagesPulled(ONE, T, (7,), (OWN,), ("there",)))


def test_what_is_given_up_stays_until_its_transfer_has_ended() -> None:
    memory = make_memory()
    mover = make_mover(memory=memory)
    mover.exchange(T, ZERO, [move(0)])
    (pull,) = pulls(mover)
    free = memory.free_pages
    mover.give_up()
    assert mover.take_actions() == [CancelPulls()]
    assert mover.has_quarantine
    assert (memory.free_pages, OTHER in pages_of(memory.kv_runs(0))) == (free, False)
    memory.check()
    mover.pulled(pull.transfer, None)
    assert (mover.has_quarantine, memory.free_pages) == (False, free + 2)
    memory.check()


# ---------------------------------------------------------------- parts


def test_parts_come_from_a_peer_and_the_file_at_once() -> None:
    memory = make_memory()
    mover = make_mover(memory=memory)
    mover.bring([PartSource(LAYERS[2], ONE, (PageRun(30, 2),)), PartSource(LAYERS[3], None)])
    pull, load = sorted(
        mover.take_actions(), key=lambda action: type(action).__name__, reverse=True
    )
    assert isinstance(pull, Pull)
    assert isinstance(load, LoadPart)
    assert (pull.is_weights, [copy.remote_page for copy in pull.copies]) == (True, [30, 31])
    mover.pulled(pull.transfer, None)
    assert mover.take_actions() == [CheckPart(pull.transfer, LAYERS[2])]
    assert not memory.holds(LAYERS[2])
    mover.part_ready(pull.transfer, None)
    mover.part_ready(load.transfer, None)
    assert memory.holds(LAYERS[2])
    assert memory.holds(LAYERS[3])
    assert (mover.is_bringing, mover.gained_pages, mover.gained_from_file) == (False, 4, 2)


def test_a_part_that_came_wrong_is_read_from_the_file() -> None:
    mover = make_mover()
    mover.bring([PartSource(LAYERS[2], ONE, (PageRun(30, 2),))])
    (pull,) = pulls(mover)
    mover.pulled(pull.transfer, None)
    assert mover.take_actions() == [CheckPart(pull.transfer, LAYERS[2])]
    mover.part_ready(pull.transfer, "its checksum is wrong")
    (load,) = mover.take_actions()
    assert isinstance(load, LoadPart)
    assert load.part == LAYERS[2]


def test_a_part_without_room_is_refused() -> None:
    memory = make_memory()
    use_up(memory, left=1)
    mover = make_mover(memory=memory)
    mover.bring([PartSource(LAYERS[2], None)])
    assert "1" in mover.refusal
    assert not mover.is_bringing
    memory.check()


def test_a_part_on_its_way_is_given_up_when_nobody_writes_it() -> None:
    memory = make_memory()
    mover = make_mover(memory=memory)
    mover.bring([PartSource(LAYERS[2], None)])
    (load,) = mover.take_actions()
    assert isinstance(load, LoadPart)
    free = memory.free_pages
    mover.give_up()
    assert mover.has_quarantine
    mover.part_ready(load.transfer, None)
    assert not mover.has_quarantine
    assert not memory.holds(LAYERS[2])
    assert memory.free_pages == free + 2
    memory.check()
