"""Phases name what a rank does; every change shows as another stamp."""

from __future__ import annotations

import pytest

from megatron_eslm.watchdog.phases import Phases, PhaseStamp


def test_phases_nest_and_end_in_the_one_around_them() -> None:
    phases = Phases()
    with phases("evaluation"):
        assert phases.now == PhaseStamp(0, "evaluation", False)
        with phases("proxy gather", waits=True):
            assert phases.now == PhaseStamp(0, "proxy gather", True)
        assert phases.now == PhaseStamp(0, "evaluation", False)
    assert phases.now == PhaseStamp(0, "start", False) and phases.now.starting
    phases.iteration = 1
    assert phases.now == PhaseStamp(1, "training", False) and not phases.now.starting
    with phases("optimizer"):
        assert phases.now == PhaseStamp(1, "optimizer", False)
        assert phases.iteration == 1
    assert phases.now == PhaseStamp(1, "training", False)


def test_every_change_is_another_object() -> None:
    """Also where nothing but time has passed: the same phase again is progress."""
    phases = Phases()
    seen = [phases.now]
    phases.iteration = 1
    seen.append(phases.now)
    for _ in range(2):
        with phases("forward"):
            seen.append(phases.now)
        seen.append(phases.now)
    phases.iteration = 1
    seen.append(phases.now)
    assert len({id(stamp) for stamp in seen}) == len(seen) == 7


def test_an_error_keeps_the_phase_that_it_comes_from() -> None:
    phases = Phases()
    phases.iteration = 3
    with pytest.raises(KeyError), phases("checkpoint"), phases("manifest"):
        raise KeyError
    assert phases.now == PhaseStamp(3, "manifest", False)
    phases.iteration = 4
    assert phases.now == PhaseStamp(4, "training", False)


def test_every_change_is_written() -> None:
    phases, written = Phases(), []
    phases.write = written.append
    phases.iteration = 1
    with phases("forward", waits=True):
        pass
    assert written == [
        PhaseStamp(1, "training", False),
        PhaseStamp(1, "forward", True),
        PhaseStamp(1, "training", False),
    ]


@pytest.mark.parametrize(
    ("stamp", "text"),
    [
        (PhaseStamp(0, "start", False), '"start"'),
        (PhaseStamp(0, "evaluation", False), '"evaluation" before the first iteration'),
        (PhaseStamp(12, "optimizer", False), '"optimizer" of iteration 12'),
    ],
)
def test_a_moment_in_words(stamp: PhaseStamp, text: str) -> None:
    assert str(stamp) == text
