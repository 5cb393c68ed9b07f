"""What follows from the beats of the ranks; no processes, no clock."""

from __future__ import annotations

from dataclasses import replace

from megatron_eslm.watchdog.heartbeat import (
    HOW_TO_GO_ON,
    Beat,
    Diagnosis,
    find_hung,
    find_silent,
    ranks_text,
)
from megatron_eslm.watchdog.phases import PhaseStamp
from megatron_eslm.watchdog.process import Process


def beat(
    rank: int,
    phase: str = "forward",
    *,
    waits: bool = False,
    idle: float = 0.0,
    silent: float = 0.0,
    node: int = 0,
    iteration: int = 12,
    left: bool = False,
) -> Beat:
    process = Process(host=f"node{node}", pid=4700 + rank, namespace=f"place{node}", started=1)
    stamp = PhaseStamp(iteration, phase, waits)
    return Beat(rank, process, stamp, idle, left=left, silent_seconds=silent)


def hung(*beats: Beat, leaving: bool = False) -> Diagnosis | None:
    return find_hung(
        {b.rank: b for b in beats}, timeout_seconds=60, silence_seconds=15, leaving=leaving
    )


def silent(*beats: Beat) -> Diagnosis | None:
    return find_silent(
        {b.rank: b for b in beats}, namespace="place0", limit_seconds=15, start_limit_seconds=60
    )


def test_a_beat_comes_back_as_it_was_sent() -> None:
    sent = replace(beat(3, "proxy gather", waits=True, idle=1.5, left=True), number=7)
    assert Beat.decode(sent.encode()) == sent
    assert Beat.decode(sent.encode().encode()) == sent


def test_the_message_of_a_death() -> None:
    died = Diagnosis(3, "died")
    assert died.text(beat(3, "stage 1 forward", node=2), None) == (
        'rank 3 (host node2, pid 4703) died in "stage 1 forward" of iteration 12. ' + HOW_TO_GO_ON
    )
    assert '"loading" of iteration 13' in replace(
        died, stamp=PhaseStamp(13, "loading", False)
    ).text(beat(3), None)
    process = beat(3).process
    assert died.text(None, process) == f"rank 3 (host node0, pid 4703) died. {HOW_TO_GO_ON}"
    assert died.text(None, None) == f"rank 3 died. {HOW_TO_GO_ON}"


def test_no_hang_while_one_rank_goes_on() -> None:
    stuck = [beat(rank, "gather", waits=True, idle=100) for rank in range(3)]
    assert hung(*stuck, beat(3, "evaluation", idle=59)) is None
    assert hung(*stuck, beat(3, "evaluation", idle=60)) is not None


def test_the_rank_that_waits_for_nobody_is_to_blame() -> None:
    waiting = [beat(rank, "threshold gather", waits=True, idle=100) for rank in (0, 1, 4)]
    found = hung(*waiting, beat(3, "optimizer", idle=61), beat(2, "checkpoint", idle=60.4))
    assert found is not None and found.rank == 3 and not found.unresponsive
    assert found.text(beat(3, "optimizer"), None) == (
        'rank 3 (host node0, pid 4703) has been in "optimizer" of iteration 12 for 61 s, and no '
        "rank went on (--distributed-timeout-minutes 1); ranks 0-1, 4 waiting in "
        '"threshold gather" of iteration 12, rank 2 in "checkpoint" of iteration 12. '
        + HOW_TO_GO_ON
    )


def test_where_all_wait_it_is_the_one_behind_or_the_one_that_waits_longest() -> None:
    ahead = beat(0, "gather", waits=True, idle=90)
    first, last = beat(1, "backward", waits=True, idle=80), beat(2, "gather", waits=True, idle=60)
    found = hung(first, last)
    assert found is not None and found.rank == 1
    behind = replace(last, stamp=PhaseStamp(11, "optimizer", True))
    found = hung(ahead, first, behind)
    assert found is not None and found.rank == 2


def test_a_silent_rank_comes_before_a_busy_one() -> None:
    found = hung(beat(0, "optimizer", idle=100), beat(1, "gather", waits=True, idle=5, silent=56))
    assert found is not None and found.rank == 1 and found.unresponsive
    assert "has not answered for 56 s" in found.text(beat(1), None)
    # Idle and silent time together make the timeout.
    assert hung(beat(0, idle=100), beat(1, idle=5, silent=54)) is None


def test_a_start_may_take_long() -> None:
    starting = beat(1, "start", idle=500, iteration=0)
    assert hung(beat(0, "evaluation", idle=500, iteration=0), starting) is None
    assert silent(replace(starting, process=beat(1, node=1).process, silent_seconds=59)) is None
    # The first evaluation counts, and so does a rank that never starts while others are done.
    assert hung(beat(0, "evaluation", idle=500, iteration=0)) is not None
    found = hung(beat(0, left=True), starting, leaving=True)
    assert found is not None and found.rank == 1


def test_those_who_left_are_not_missed() -> None:
    gone = [beat(rank, idle=500, silent=500, left=True, node=1) for rank in range(3)]
    assert hung(*gone) is None and silent(*gone) is None
    assert hung(*gone, beat(3, idle=61)) is not None


def test_a_host_is_silent_when_all_its_ranks_are() -> None:
    first = beat(2, node=1, silent=16)
    assert silent(beat(1, silent=100), first, beat(3, node=1, silent=2)) is None
    found = silent(beat(1, silent=100), first, beat(3, node=1, silent=20))
    assert found is not None and found.rank == 2 and found.unresponsive and found.unless_left
    assert found.text(first, None).startswith(
        "rank 2 (host node1, pid 4702) has not answered for 16 s, nor has any other rank of its "
        'host (ranks 2-3); last seen in "forward" of iteration 12. '
    )
    alone = silent(first)
    assert alone is not None and "any other" not in alone.did


def test_a_message_lists_eight_groups_at_most() -> None:
    beats = [beat(rank, f"stage {rank} forward", idle=70 - rank) for rank in range(11)]
    found = hung(*(replace(b, idle_seconds=b.idle_seconds + 30) for b in beats))
    assert found is not None and found.rank == 0
    assert 'rank 8 in "stage 8 forward" of iteration 12, 2 more groups' in found.further
    assert "stage 9" not in found.further


def test_ranks_in_words() -> None:
    assert [ranks_text(r) for r in ([4], [0, 1], [0, 2, 3, 4, 7])] == [
        "rank 4",
        "ranks 0-1",
        "ranks 0, 2-4, 7",
    ]
