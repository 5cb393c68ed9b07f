"""How long a save makes training stand still, and what it costs in all, waited for or in a thread.

python -m benchmarks.saving

Each repetition takes the same number of steps without a save, with one that is waited for after the
first step, and with one that a thread writes meanwhile and that is complete at the end. The disk of
`--folder` is part of what is measured.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from benchmarks.engines import BenchRun
from benchmarks.flags import parser, settings, training_flags
from benchmarks.interleave import interleaved, report
from megatron_eslm.checkpoint.manifest import new_run_id
from megatron_eslm.checkpoint.save_folder import SaveFolder
from megatron_eslm.checkpoint.saver import CheckpointSaver
from megatron_eslm.checkpoint.train_state import TrainState
from megatron_eslm.data.tokenizers.build import ByteTokenizer
from megatron_eslm.launch.bootstrap import init_distributed
from megatron_eslm.parallel.collectives import on_rank_zero

MODES = ("no save", "waited for", "in a thread")


class Saves:
    """Steps of one engine with saves; seconds in which the steps waited for a save, by mode."""

    def __init__(self, bench: BenchRun, folder: Path, steps: int) -> None:
        self.step, self.steps = bench.stepper(), steps
        self.state = TrainState(selection=bench.state, run_id=new_run_id())
        self.stood: defaultdict[str, list[float]] = defaultdict(list)
        saves = SaveFolder(folder)
        on_rank_zero(lambda: saves.take(load=None))
        run = {
            "options": bench.run.to_dict(),
            "shape": bench.shape.to_dict(),
            "data": {},
            "domains": [{"name": "none", "epochs": 0.0}],
        }
        self.saver = CheckpointSaver(
            bench.engine,
            saves,
            run=run,
            tokenizer=ByteTokenizer(),
            keep_last=1,
            phases=bench.policy.peers.phases,
        )

    def case(self, mode: str) -> Callable[[], None]:
        """So many steps, with a save or without."""

        def run() -> None:
            stood = 0.0
            for number in range(self.steps):
                self.step()
                self.state.iteration += 1
                begin = time.perf_counter()
                if number == 0 and mode == "waited for":
                    self.saver.save(self.state)
                elif number == 0 and mode == "in a thread":
                    self.saver.begin(self.state)
                elif number == self.steps - 1:
                    self.saver.finish()
                else:
                    self.saver.poll()
                stood += time.perf_counter() - begin
            self.stood[mode].append(stood)

        return run


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=8, help="with one save (%(default)s)")
    arguments.add_argument("--folder", default=".", help="where to save (%(default)s)")
    arguments.set_defaults(rows=1, seq_length=256, repetitions=3)
    args = arguments.parse_args()
    init_distributed()
    ranks = dist.get_world_size()
    bench = BenchRun(*training_flags(args, ranks), "--selection", "clm")
    made: list = [None]
    with tempfile.TemporaryDirectory(prefix="saving-", dir=args.folder) as own:
        made[0] = own
        dist.broadcast_object_list(made)
        saves = Saves(bench, Path(made[0]) / "run", args.steps)
        timings = interleaved({mode: saves.case(mode) for mode in MODES}, args.repetitions)
        dist.barrier()
    if dist.get_rank() != 0:
        return
    what = f"{args.shape}, {args.dtype}, {ranks} rank{'s' if ranks > 1 else ''}"
    own_settings = {**settings(args), "steps": args.steps}
    for mode in MODES[1:]:
        seconds = saves.stood[mode][1:]
        report(
            f"seconds that steps wait for a save {mode}, {what}",
            statistics.median(seconds),
            "less in a thread",
            spread=seconds,
            **own_settings,
        )
    for mode in MODES[1:]:
        report(
            f"{args.steps} steps and a save {mode} / the steps alone, {what}",
            timings.ratio(mode, "no save"),
            "less in a thread",
            spread=timings.ratios(mode, "no save"),
            seconds=round(timings.median(mode), 3),
            seconds_without=round(timings.median("no save"), 3),
            **own_settings,
        )


if __name__ == "__main__":
    main()
