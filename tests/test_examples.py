"""The scripts in examples/, run with launchers that only note how they were called."""

from __future__ import annotations

import itertools
import math
import os
import re
import shlex
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile, parse_args

from megatron_eslm.config.run import RunConfig, parse_run
from megatron_eslm.cost.memory import estimate_memory
from megatron_eslm.cost.of_run import build_flops, step_work
from megatron_eslm.cost.stages import plan_stages
from megatron_eslm.model.arithmetic import num_params
from megatron_eslm.selection.state import SelectionState

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted([*EXAMPLES.glob("*.sh"), *EXAMPLES.glob("*.sbatch")])
GPT2_VOCAB_SIZE = 50257
A100_BYTES = 80e9

RECORDER = """#!/bin/sh
{ printf '%s\\0' "$(basename "$0")" "$@"; printf '\\n\\0'; } >>"$CALLS"
"""


@dataclass
class Example:
    """What a script did: its end, and the commands it called."""

    code: int
    out: str
    err: str
    calls: list[list[str]] = field(default_factory=list)

    def trainings(self) -> list[list[str]]:
        """Command lines that start pretrain_gpt.py."""
        return [words for words in self.calls if "pretrain_gpt.py" in words]

    def flags(self) -> list[list[str]]:
        """Their parts that our parser gets."""
        return [words[words.index("pretrain_gpt.py") + 1 :] for words in self.trainings()]

    def runs(self, world_size: int) -> list[RunConfig]:
        """What they mean to our parser."""
        return [parse_run(flags, world_size) for flags in self.flags()]


class Examples:
    """Runs scripts of examples/ with programs of its own first on PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        for name in ("deepspeed", "srun", "mpirun", "python"):
            self.program(name)

    def program(self, name: str, then: str = "") -> None:
        """A program that notes its words; `then` is what else it does."""
        path = self.bin / name
        path.write_text(RECORDER + then)
        path.chmod(0o755)

    def __call__(self, *command: str, **environment: str) -> Example:
        calls = self.folder / "calls"
        calls.write_text("")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "MASTER"))}
        for name in (
            "LAUNCH",
            "LAYOUT",
            "MICRO_BATCH",
            "NODES",
            "RUNS",
            "SELECTIONS",
            "WITH",
            "HOSTFILE",
        ):
            kept.pop(name, None)
        env = {
            **kept,
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "CALLS": str(calls),
            "DATA": "the data",
            **environment,
        }
        done = subprocess.run(
            ["bash", *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
        )
        texts = calls.read_text().removesuffix("\n\0").split("\n\0")
        words = [text.removesuffix("\0").split("\0") for text in texts if text]
        return Example(done.returncode, done.stdout, done.stderr, words)


@pytest.fixture
def examples(tmp_path: Path) -> Examples:
    return Examples(tmp_path)


def deepspeed_world_size(words: list[str]) -> int:
    """Processes that a `deepspeed ...` command starts, by DeepSpeed's own parser."""
    assert words[0] == "deepspeed"
    args = parse_args(words[1:])
    assert args.user_script == "pretrain_gpt.py"
    if args.num_gpus > 0:
        return args.num_gpus
    return sum(fetch_hostfile(args.hostfile).values())


def bytes_a_gpu(run: RunConfig) -> float:
    """As `--dry-run` estimates it."""
    shape, state = run.shape(GPT2_VOCAB_SIZE), SelectionState(alpha=run.selection.initial_alpha)
    flops = build_flops(run, shape, state)
    plan = plan_stages(run, shape, flops, step_work(run))
    return estimate_memory(run, shape, plan, flops).total


def check(
    example: Example, world_size: int, selections: tuple[str, ...] = ("clm", "eslm", "random")
) -> list[RunConfig]:
    """The runs of an example: whole, on the same data, each continuing itself."""
    assert example.code == 0, example.err
    runs = example.runs(world_size)
    assert tuple(run.selection.selection for run in runs) == selections
    same = {(run.data, run.training, run.optimizer, run.engine, run.model) for run in runs}
    assert len(same) == 1
    assert len({run.checkpoint.save for run in runs}) == len(runs)
    for run in runs:
        assert run.checkpoint.load == run.checkpoint.save
        assert run.selection.eslm_alpha == 0.1
        assert "the data/arxiv" in run.data.data_path
        assert bytes_a_gpu(run) < 0.5 * A100_BYTES
    # Then the table of exactly these runs.
    last = example.calls[-1]
    assert last[:2] == ["python", "tools/compare_runs.py"]
    assert last[2:-2] == [run.report.metrics_file for run in runs]
    return runs


def sequences_chosen_among(run: RunConfig) -> int:
    assert run.training.micro_batch_size
    return run.training.micro_batch_size * run.dp_size


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_it(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.access(script, os.X_OK) == (script.name != "common.sh")


@pytest.mark.parametrize("size", ["124M", "350M", "774M"])
def test_one_machine(examples: Examples, size: str) -> None:
    example = examples(f"examples/pretrain_{size}.sh", "--train-iters", "40000")
    assert {deepspeed_world_size(words) for words in example.trainings()} == {8}
    for run in check(example, 8):
        assert run.model.model_size == size and run.training.train_iters == 40_000
        assert run.gradient_accumulation_steps == 5


def test_two_machines_choose_among_as_many_sequences_as_one(
    examples: Examples, tmp_path: Path
) -> None:
    hosts = tmp_path / "two hosts"
    hosts.write_text("# two\nnode1 slots=8\nnode2 slots=8\n")
    script = "examples/pretrain_774M.sh"
    two = examples("examples/launch_hostfile.sh", script, NODES="2", HOSTFILE=str(hosts))
    assert {deepspeed_world_size(words) for words in two.trainings()} == {16}
    one = check(examples(script), 8)[0]
    for run in check(two, 16):
        assert sequences_chosen_among(run) == sequences_chosen_among(one) == 64
        assert run.training.global_batch_size == one.training.global_batch_size
    assert "NODES=3 is neither" in examples(script, NODES="3").err


LAYOUTS = {"1x1x32": 160, "1x4x8": 16, "2x4x4": 16}
"""TP x PP x DP of the 1.5B runs, and how many sequences selection chooses among."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_four_machines_by_a_hostfile(examples: Examples, layout: str) -> None:
    script = "examples/pretrain_1.5B.sh"
    example = examples("examples/launch_hostfile.sh", script, LAYOUT=layout)
    world_size = math.prod(map(int, layout.split("x")))
    assert {deepspeed_world_size(words) for words in example.trainings()} == {world_size}
    for run in check(example, world_size):
        sizes = (
            run.engine.tensor_model_parallel_size,
            run.engine.pipeline_model_parallel_size,
            run.dp_size,
        )
        assert "x".join(map(str, sizes)) == layout
        assert sequences_chosen_among(run) == LAYOUTS[layout]
        assert run.training.global_batch_size == 160
        assert num_params(run.shape(GPT2_VOCAB_SIZE)) == pytest.approx(1.557e9, rel=1e-3)


def test_the_1_5B_runs_need_a_launcher_and_a_layout(examples: Examples) -> None:
    script = "examples/pretrain_1.5B.sh"
    assert "start this with examples/launch_hostfile.sh" in examples(script).err
    wrong = examples("examples/launch_hostfile.sh", script, LAYOUT="1x2x16")
    assert (wrong.code, wrong.calls) == (2, [])
    assert "LAYOUT=1x2x16 is not 1x1x32, 1x4x8 or 2x4x4" in wrong.err


def test_deepspeed_with_open_mpi(examples: Examples) -> None:
    from deepspeed.launcher.multinode_runner import OpenMPIRunner

    launch, script = "examples/launch_openmpi.sh", "examples/pretrain_1.5B.sh"
    example = examples(launch, script, WITH="deepspeed", INTERFACE="ib0", SELECTIONS="eslm")
    (words,) = example.trainings()
    assert deepspeed_world_size(words) == 32
    check(example, 32, ("eslm",))
    # What DeepSpeed makes of it: its own default interface does not creep in.
    args = parse_args(words[1:])
    assert args.launcher == "openmpi"
    runner = OpenMPIRunner(args, "", fetch_hostfile(args.hostfile))
    command = shlex.join(runner.get_cmd({}, {}))
    assert command.startswith("mpirun -n 32 -hostfile ")
    assert "--mca btl_tcp_if_include ib0" in command and "eth0" not in command


def test_plain_mpirun(examples: Examples) -> None:
    launch, script = "examples/launch_openmpi.sh", "examples/pretrain_1.5B.sh"
    example = examples(launch, script, NCCL_DEBUG="WARN", MASTER_PORT="29501")
    for words in example.trainings():
        # Without -np, mpirun starts a process for each slot.
        assert words[:2] == ["mpirun", "--hostfile"] and "-np" not in words
        assert sum(fetch_hostfile(words[2]).values()) == 32
        exported = {b for a, b in itertools.pairwise(words) if a == "-x"}
        assert {"NCCL_DEBUG", "MASTER_PORT", "PATH"} <= exported
        assert "HOME" not in exported
        assert words[words.index("pretrain_gpt.py") - 1] == "python"
    check(example, 32)
    assert "WITH=ssh is neither mpirun nor deepspeed" in examples(launch, script, WITH="ssh").err


def test_launchers_name_what_is_missing(examples: Examples) -> None:
    for launch in ("examples/launch_hostfile.sh", "examples/launch_openmpi.sh"):
        assert "name the script to start" in examples(launch).err
        none = examples(launch, "examples/pretrain_1.5B.sh", HOSTFILE="no/such")
        assert none.code != 0 and none.calls == [] and "no/such" in none.err
    assert "set DATA" in examples("examples/pretrain_124M.sh", DATA="").err


def test_a_run_that_ends_early_ends_the_script(examples: Examples) -> None:
    examples.program("deepspeed", "exit 143")
    example = examples("examples/pretrain_124M.sh")
    assert (example.code, len(example.calls)) == (143, 1)


# Slurm.


def directives() -> dict[str, str]:
    """#SBATCH lines of the batch script."""
    text = (EXAMPLES / "slurm_1.5B.sbatch").read_text()
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", text, flags=re.MULTILINE))


def slurm(
    examples: Examples,
    *,
    exit_code: int = 0,
    preempted: str = "None",
    **env: str,
) -> Example:
    """The batch script, where srun ends with `exit_code` and scontrol knows this of the job."""
    lines = (
        "   StartTime=2026-01-01T00:00:00 EndTime=2026-01-02T00:00:00 Deadline=N/A\n"
        f"   PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime={preempted}"
    )
    examples.program("srun", f"exit {exit_code}\n")
    examples.program("scontrol", f'[ "$1" = requeue ] || echo "{lines}"\n')
    job = {"SLURM_JOB_ID": "4711", "SLURM_CPUS_PER_TASK": "8"}
    return examples("examples/slurm_1.5B.sbatch", **job, **env)


def requeued(example: Example) -> bool:
    return ["scontrol", "requeue", "4711"] in example.calls


@pytest.mark.parametrize("layout", LAYOUTS)
def test_slurm(examples: Examples, layout: str) -> None:
    given = directives()
    assert given["signal"] == "USR1@300" and {"requeue", "exclusive"} <= given.keys()
    world_size = int(given["nodes"]) * int(given["ntasks-per-node"])
    example = slurm(examples, LAYOUT=layout)
    for run in check(example, world_size):
        assert run.training.exit_signal == "USR1"
    for words in example.trainings():
        assert words[0] == "srun" and "--kill-on-bad-exit=1" in words
    assert not requeued(example)


@pytest.mark.parametrize(
    ("exit_code", "preempted", "again"),
    [
        (138, False, True),  # SIGUSR1: the time limit
        (143, True, True),
        (143, False, False),  # a rank failed and srun ended the others
        (2, False, False),
        (1, True, False),
    ],
)
def test_slurm_requeues_what_the_batch_system_stopped(
    examples: Examples, exit_code: int, preempted: bool, again: bool
) -> None:
    when = "2026-01-01T12:00:00" if preempted else "None"
    example = slurm(examples, exit_code=exit_code, preempted=when)
    assert (example.code, example.err) == (exit_code, "")
    assert len(example.trainings()) == 1
    assert requeued(example) == again
