"""Ranks that meet, in processes of their own; and those that do not, or belong to another job."""

from __future__ import annotations

import os
import signal
import socket
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_eslm.errors import ConfigError
from megatron_eslm.launch import rendezvous
from megatron_eslm.launch.rendezvous import meet
from megatron_eslm.parallel.meeting import Meeting

from .ranks import Ranks, connections, environment, free_port, stay

pytestmark = pytest.mark.timeout(60)

OWN_PORT = "Give each job a port of its own: --master_port of the launcher, or MASTER_PORT."


def exchange(meeting: Meeting) -> list[str]:
    """What all ranks have written into the store that they share."""
    meeting.store.set(f"from/{meeting.rank}", str(meeting.rank))
    keys = [f"from/{rank}" for rank in range(meeting.world_size)]
    meeting.store.wait(keys, timedelta(seconds=20))
    found = [value.decode() for value in meeting.store.multi_get(keys)]
    # Rank 0 keeps the store, and leaves last.
    meeting.store.add("done", 1)
    while meeting.rank == 0 and meeting.store.add("done", 0) < meeting.world_size:
        time.sleep(0.01)
    return found


def test_one_rank_needs_no_port_and_no_address() -> None:
    """Two commands on one machine, which a launcher gives the same port, do not meet."""
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        for variables in ({}, environment(0, 1, port, MASTER_ADDR="no.such.host")):
            with pytest.MonkeyPatch.context() as patch:
                for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
                    patch.delenv(name, raising=False)
                for name, value in variables.items():
                    patch.setenv(name, value)
                meeting = meet()
                assert (meeting.rank, meeting.world_size) == (0, 1)
                assert isinstance(meeting.store, dist.HashStore)
                assert os.environ["WORLD_SIZE"] == "1"


def test_ranks_meet_in_any_order(ranks: Ranks) -> None:
    port = free_port()
    pids = []
    for rank in (2, 0, 1):
        pids.append(ranks.start(environment(rank, 3, port), work=exchange))
        time.sleep(0.3)
    assert [ranks.said(pid) for pid in pids] == [["0", "1", "2"]] * 3


def test_the_missing_are_named_by_all_who_came(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(rendezvous, "NOTE_SECONDS", 0.3)
    monkeypatch.setattr(
        rendezvous.logger, "log", lambda level, form, text: os.write(2, text.encode())
    )
    port = free_port()
    zero = ranks.start(environment(0, 5, port), seconds=1.0)
    two = ranks.start(environment(2, 5, port), seconds=60.0)
    for pid in (zero, two):
        message = ranks.said(pid)
        assert message.startswith(
            "ConfigError: rank 0 waited 1 s for 3 of 5 ranks (ranks 1, 3-4) at "
            f"127.0.0.1:{port}, in vain. Start all ranks with the same MASTER_ADDR, MASTER_PORT "
            "and WORLD_SIZE, "
        )
        assert message.endswith("raise --rendezvous-timeout-minutes.")
    assert capfd.readouterr().err == (
        f"rank 0 waits for 3 of 5 ranks (ranks 1, 3-4) at 127.0.0.1:{port}"
    )


def test_nobody_at_the_address(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(rendezvous, "NOTE_SECONDS", 0.3)
    monkeypatch.setattr(
        rendezvous.logger, "log", lambda level, form, text: os.write(2, text.encode())
    )
    port = free_port()
    pids = [ranks.start(environment(rank, 3, port), seconds=1.0) for rank in (1, 2)]
    for rank, pid in zip((1, 2), pids, strict=True):
        assert ranks.said(pid).startswith(
            f"ConfigError: rank {rank} waited 1 s for rank 0 (Connection refused) at "
            f"127.0.0.1:{port}, in vain. Start all ranks "
        )
    # One rank of a machine speaks.
    assert capfd.readouterr().err == f"rank 1 waits for rank 0 at 127.0.0.1:{port}"


def test_a_port_that_is_taken(ranks: Ranks) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        assert ranks.said(ranks.start(environment(0, 2, port))) == (
            f"ConfigError: MASTER_PORT {port} is taken on {socket.gethostname()} by another job "
            f"or program. {OWN_PORT}"
        )


def test_a_rank_zero_that_dies_is_noticed(ranks: Ranks) -> None:
    port = free_port()
    zero, one = (ranks.start(environment(rank, 3, port)) for rank in (0, 1))
    while connections(port) < 2:  # Its own, and that of rank 1.
        time.sleep(0.05)
    time.sleep(0.3)
    ranks.kill(zero)
    assert ranks.said(one).startswith(
        f"ConfigError: The store at 127.0.0.1:{port}, hosted by rank 0, was lost before all "
        "ranks had met ("
    )


def test_ranks_of_another_job_are_refused_and_this_one_goes_on(ranks: Ranks) -> None:
    """All meet at one port: ranks of other launchers and sizes, one too many; last comes ours."""
    port = free_port()
    zero = ranks.start(environment(0, 2, port, LOCAL_SIZE="2"), launcher=11, then=stay)
    others = {
        "belongs to a job of WORLD_SIZE=3": ranks.start(environment(1, 3, port, LOCAL_SIZE="2")),
        f"belongs to another job (launcher 12 on {socket.gethostname()}) than rank 0": ranks.start(
            environment(1, 2, port, LOCAL_SIZE="2"), launcher=12
        ),
        "belongs to another job (unnamed) than rank 0": ranks.start(
            environment(1, 2, port, LOCAL_SIZE="2")
        ),
    }
    for text, pid in others.items():
        message = ranks.said(pid)
        assert text in message and message.endswith(OWN_PORT)
        assert f"(host {socket.gethostname()}, pid {pid})" in message
    ours = ranks.start(environment(1, 2, port, LOCAL_SIZE="2"), launcher=11)
    assert (ranks.said(zero), ranks.said(ours)) == ("met", "met")
    late = ranks.start(environment(1, 2, port, LOCAL_SIZE="2"), launcher=12)
    assert f"is not part of the job that runs at 127.0.0.1:{port}: all its 2 ranks" in ranks.said(
        late
    )


def test_a_rank_that_is_there_twice_is_refused_unless_the_first_has_died(ranks: Ranks) -> None:
    port = free_port()
    zero = ranks.start(environment(0, 3, port), then=stay)
    pair = [ranks.start(environment(1, 3, port)) for _ in range(2)]
    refused = ranks.first_to_speak(*pair)
    (seated,) = set(pair) - {refused}
    assert f"the seat of this rank is taken by pid {seated} on host" in ranks.said(refused)
    ranks.kill(seated)
    third = ranks.start(environment(1, 3, port))
    time.sleep(0.3)
    two = ranks.start(environment(2, 3, port))
    assert [ranks.said(pid) for pid in (zero, third, two)] == ["met"] * 3


@pytest.mark.parametrize("counts", [("0", "1"), ("0", "0")], ids=["restart", "new members"])
def test_the_next_attempt_does_not_read_what_the_first_has_left(
    ranks: Ranks, counts: tuple[str, str]
) -> None:
    """torchrun keeps one store for all; it does not count a restart for a change of members."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    met = []
    for count in counts:
        more = {
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RUN_ID": "x",
            "TORCHELASTIC_RESTART_COUNT": count,
        }

        def tokens(meeting: Meeting) -> list[str]:
            before = meeting.store.check(["from/0"]) or meeting.store.check(["decision"])
            meeting.store.add("come", 1)
            while meeting.store.add("come", 0) < 2:
                time.sleep(0.01)
            meeting.store.set("decision", "it failed")
            meeting.store.set("from/0", "x")
            return ["old" if before else "new", str(meeting.launcher_keeps_store)]

        pids = [
            ranks.start(environment(rank, 2, store.port, **more), work=tokens) for rank in (1, 0)
        ]
        met += [ranks.said(pid) for pid in pids]
    assert met == [["new", "True"]] * 4


def test_what_listens_does_not_answer(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program; or rank 0, which was stopped."""
    monkeypatch.setattr(rendezvous, "STORE_SECONDS", 1.0)
    port = free_port()
    zero = ranks.start(environment(0, 3, port))
    while connections(port) < 1:
        time.sleep(0.05)
    os.kill(zero, signal.SIGSTOP)
    with socket.create_server(("127.0.0.1", 0)) as other:
        for taken in (port, other.getsockname()[1]):
            one = ranks.start(environment(1, 3, taken))
            assert ranks.said(one) == (
                f"ConfigError: rank 1 has had no answer at 127.0.0.1:{taken} for 1 s. Either "
                f"rank 0 is stopped there, or another program uses the port. {OWN_PORT}"
            )


def test_an_environment_that_contradicts_itself_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "environ", environment(2, 2, 1))
    with pytest.raises(ConfigError, match="RANK=2 contradicts WORLD_SIZE=2"):
        meet()
