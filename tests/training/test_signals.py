"""What SIGTERM, SIGINT and --exit-signal do at each stage of the program."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_eslm.config.training_options import TrainingOptions
from megatron_eslm.launch import signals
from megatron_eslm.launch.signals import EXIT_SIGNALS, Interrupted, StopSignal

TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
ROOT = Path(__file__).parents[2]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The time that the handlers read; afterwards signals do what they did before."""
    numbers = (TERM, INT, *(signal.Signals[f"SIG{name}"] for name in EXIT_SIGNALS))
    before = {number: signal.getsignal(number) for number in numbers}
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: clock.now))
    yield clock
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("arrivals", "aborts"),
    [
        ([(0, TERM)], False),
        ([(0, INT), (0.01, INT), (0.02, TERM)], False),  # a launcher's echo
        ([(t, TERM) for t in (0, 5, 10, 60, 600)], False),  # a batch system that insists
        ([(0.2 * n, INT) for n in range(60)], False),  # a hail of them
        ([(0, TERM), (10, INT)], False),  # the first Ctrl-C
        ([(0, INT), (10, TERM), (20, USR1)], False),
        ([(0, USR1), (5, USR1)], False),
        ([(0, INT), (4, INT)], True),
        ([(0, TERM), (5, INT), (9, INT)], True),
        ([(0, INT), (0.1, INT), (0.2, INT), (5, INT)], True),
    ],
)
def test_only_a_second_ctrl_c_after_a_pause_does_not_wait_for_the_step(
    clock: SimpleNamespace, arrivals: list[tuple[float, signal.Signals]], aborts: bool
) -> None:
    first = arrivals[0][1]
    with StopSignal((TERM, INT, USR1)) as stop:
        *before, (last, number) = arrivals
        for seconds, earlier in before:
            clock.now = 100.0 + seconds
            signal.raise_signal(earlier)
        clock.now = 100.0 + last
        if aborts:
            with pytest.raises(Interrupted) as caught:
                signal.raise_signal(number)
            assert caught.value.code == 128 + first
            assert str(caught.value).startswith(f"stopped by {first.name}, at once by a second")
        else:
            signal.raise_signal(number)
        assert stop.received == first
    for number in (TERM, INT, USR1):  # it has said that it stops
        assert signal.getsignal(number) == signal.SIG_IGN


def test_without_a_request_everything_is_as_before(clock: SimpleNamespace) -> None:
    before = signal.getsignal(INT)
    with StopSignal() as stop:
        pass
    assert stop.received is None and signal.getsignal(INT) is before


def test_an_error_on_its_way_up_is_not_interrupted(clock: SimpleNamespace) -> None:
    with pytest.raises(RuntimeError), StopSignal():
        raise RuntimeError
    signal.raise_signal(INT)
    signal.raise_signal(TERM)


def test_what_is_half_built_is_unwound(clock: SimpleNamespace) -> None:
    signals.unwind((TERM, INT, USR1))
    with pytest.raises(Interrupted) as caught:
        signal.raise_signal(USR1)
    assert caught.value.code == 138
    assert str(caught.value) == "stopped by SIGUSR1, without a checkpoint."
    signal.raise_signal(INT)  # an echo: what is being removed goes on being removed
    clock.now += 10
    with pytest.raises(Interrupted) as caught:  # somebody has swallowed the first
        signal.raise_signal(TERM)
    assert caught.value.code == 138


def test_the_end_is_silent(clock: SimpleNamespace) -> None:
    signals.unwind(TrainingOptions(exit_signal="usr1").stop_signals)
    signals.ignore()
    for number in (TERM, INT, USR1):
        assert signal.getsignal(number) == signal.SIG_IGN
    # Others' signals are left alone.
    assert signal.getsignal(signal.SIGUSR2) != signal.SIG_IGN


@pytest.mark.parametrize("name", EXIT_SIGNALS)
def test_names_of_signals(name: str) -> None:
    number = signal.Signals[f"SIG{name}"]
    assert TrainingOptions(exit_signal=name).stop_signals == (INT, TERM, number)
    assert TrainingOptions(exit_signal=f"SIG{name}").stop_signals == (INT, TERM, number)


@pytest.mark.parametrize(
    ("number", "rank", "line"),
    [(INT, "0", "stopped by SIGINT"), (TERM, "0", "stopped by SIGTERM"), (INT, "1", None)],
)
def test_before_anything_is_there(number: signal.Signals, rank: str, line: str | None) -> None:
    code = (
        "import signal, sys; from megatron_eslm.launch.signals import end_at_once; "
        "end_at_once(); assert 'torch' not in sys.modules; "
        f"signal.raise_signal({int(number)})"
    )
    environment = {"PYTHONPATH": str(ROOT), "RANK": rank}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 128 + number
    assert done.stderr == ("" if line is None else f"error: {line}, without a checkpoint.\n")


def catches(pid: int, number: signal.Signals) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask.split()[1], 16) >> (number - 1) & 1)


def test_a_signal_while_the_program_is_imported(tmp_path: Path) -> None:
    """From its first line on, and not only once everything is there to deal with it."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "pretrain_gpt.py")],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not catches(process.pid, TERM):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(INT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert err == "error: stopped by SIGINT, without a checkpoint.\n"
