r"""Tasks by our evaluation and by lm-eval's own HFLM, number by number and choice by choice.

    python -m benchmarks.evaluation --load runs/eslm --hf runs/hf --limit 100

--load is a folder of checkpoints, --hf what tools/convert_to_hf.py wrote from it (a Hugging Face
folder may be both). Both get the same documents and shots and compute in float32. Needs the extra
`eval`; documents come from where tools/evaluate.py takes them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any

from megatron_eslm.errors import ConfigError

KINDS = ("loglikelihood", "generate_until")
TITLES = (
    *("task", "shots", "documents", "metric", "chance", "ours", "HFLM"),
    *("choices", "largest difference (nats)", "relative", "seconds, ours", "seconds, HFLM"),
)


class Recorded:
    """An LM that keeps the answers it gave to the requests of the last task."""

    def __init__(self, lm: Any) -> None:
        self._lm = lm
        self.answers: list[Any] = []
        self.documents: list[int] = []
        """Document of each answer."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._lm, name)
        return self._keeping(found) if name in KINDS else found

    def _keeping(self, answer: Any) -> Any:
        def keep(requests: Any) -> Any:
            self.answers = answer(requests, disable_tqdm=True)
            self.documents = [request.doc_id for request in requests]
            return self.answers

        return keep


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--load", required=True, help="folder of checkpoints")
    parser.add_argument("--hf", required=True, help="Hugging Face folder of the same model")
    parser.add_argument("--tasks", nargs="+", help="default: those of the paper with documents")
    parser.add_argument("--task-data", help="folder of documents, as of tools/evaluate.py")
    parser.add_argument("--limit", type=int, help="documents of each task at most")
    parser.add_argument("--batch-size", type=int, default=8, help="of HFLM (%(default)s)")
    args = parser.parse_args()
    try:
        rows = measure(args)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    for row in (TITLES, ["---"] * len(TITLES), *rows):
        print("| " + " | ".join(row) + " |")


def measure(args: argparse.Namespace) -> list[list[str]]:
    """A row of the table for each task."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from megatron_eslm.evaluation.tasks import need_lm_eval

    need_lm_eval("benchmarks.evaluation")
    import torch
    from lm_eval.models.huggingface import HFLM

    from megatron_eslm.evaluation.models import find_candidate, load_lm
    from megatron_eslm.evaluation.run import run_tasks
    from megatron_eslm.evaluation.suite import PAPER, shown_metric
    from megatron_eslm.evaluation.tasks import TaskSources, load_suite
    from megatron_eslm.launch.bootstrap import single_process
    from megatron_eslm.parallel.mesh import build_mesh

    wanted = [each for each in PAPER if args.tasks is None or each.name in args.tasks]
    tasks, missing = load_suite(wanted, TaskSources(task_data=args.task_data))
    for name, why in missing.items():
        print(f"without {name}: {why}", file=sys.stderr)
    rows = []
    with single_process():
        candidate, device = find_candidate(args.load, None), torch.device("cpu")
        native = load_lm(candidate, build_mesh(), torch.float32, device, 16384, quiet=True)
        hflm = HFLM(args.hf, device="cpu", dtype="float32", batch_size=args.batch_size)
        ours, theirs = Recorded(native), Recorded(hflm)
        for task in tasks:
            (mine,) = run_tasks(ours, [task], args.limit)  # type: ignore[arg-type]
            (his,) = run_tasks(theirs, [task], args.limit)  # type: ignore[arg-type]
            metric = shown_metric(task.name, mine.metrics, PAPER)
            rows.append(
                [
                    *(task.name, str(mine.shots), str(mine.documents), metric),
                    _chance(task.task.OUTPUT_TYPE, ours.documents),
                    *(f"{each.metrics[metric]:.4f}" for each in (mine, his)),
                    str(len(ours.answers)),
                    *_differences(ours.answers, theirs.answers),
                    *(f"{each.seconds:.1f}" for each in (mine, his)),
                ]
            )
            print(f"{task.name}: done", file=sys.stderr)
    return rows


def _chance(kind: str, documents: Iterable[int]) -> str:
    """Accuracy of guesses: the mean of one over the number of answers."""
    if kind != "multiple_choice":
        return ""
    counts = Counter(documents).values()
    return f"{sum(1 / count for count in counts) / len(counts):.4f}"


def _differences(ours: list[Any], theirs: list[Any]) -> tuple[str, str]:
    """The largest, absolute and relative to the log-probability; for texts, how many differ."""
    if isinstance(ours[0], str):
        unlike = sum(mine != his for mine, his in zip(ours, theirs, strict=True))
        return f"{unlike} texts differ", ""
    pairs = [(mine[0], his[0]) for mine, his in zip(ours, theirs, strict=True)]
    absolute = max(abs(mine - his) for mine, his in pairs)
    relative = max(abs(mine - his) / abs(his) for mine, his in pairs)
    return f"{absolute:.1e}", f"{relative:.1e}"


if __name__ == "__main__":
    main()
