"""Peak memory of our plain step against transformers' GPT-2, at 8192 tokens a micro-step.

    python -m benchmarks.peer_memory

On a CPU: the peak of the resident set over three steps, in a process for each, less what the same
process held when all was imported. On a GPU: the peak of torch's allocator.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.engines import BenchRun
from benchmarks.flags import parser, training_flags
from benchmarks.interleave import report
from benchmarks.peer import peer_stepper
from megatron_eslm.launch.bootstrap import init_distributed


def main() -> None:
    made = parser(__doc__)
    made.set_defaults(rows=8, seq_length=1024)
    made.add_argument("--one", choices=("ours", "peer"), help="print the bytes of one of them")
    args = made.parse_args()
    if args.one is not None:
        print(peak_bytes(args.one, training_flags(args)))
        return
    ours, peer = (_in_process(which) for which in ("ours", "peer"))
    report(
        f"CLM peak memory / transformers' GPT-2, {args.rows} x {args.seq_length} tokens, "
        f"{args.shape}, {args.dtype}",
        ours / peer,
        "<= 0.75",
        our_gib=round(ours / 2**30, 3),
        peer_gib=round(peer / 2**30, 3),
    )


def peak_bytes(which: str, flags: tuple[str, ...]) -> int:
    """Of three steps in this process."""
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401

    init_distributed()
    run = BenchRun(*flags, "--selection", "clm")
    before = resident_bytes()
    step = run.stepper() if which == "ours" else peer_stepper(run)
    for _ in range(3):
        step()
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


def resident_bytes() -> int:
    """Of this process, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _in_process(which: str) -> int:
    command = [sys.executable, "-m", "benchmarks.peer_memory", *sys.argv[1:], "--one", which]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
