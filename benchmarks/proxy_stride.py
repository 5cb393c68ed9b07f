r"""How well the early exit ranks sequences when it scores every s-th position only.

    python -m benchmarks.proxy_stride --load runs/small/eslm-loss-0.1-seed1/checkpoints \
        --data-path runs/small-data/book runs/small-data/github ...

On validation sequences of a trained model: instance scores of --eslm-proxy-stride 2 to 64 against
those of stride 1, in micro-batches of --rows: Spearman's rank correlation, and the share of the
dropped sequences that are the same (of random ones: alpha). And the early exit against the whole
model. "Corrected" is an estimate that training does not have: the mean over all positions of what
is usual for their token (the label's for the loss, the input's for the entropy), plus the mean over
scored positions of what they have beyond that. The usual is taken from the other half of the
sequences.
"""

from __future__ import annotations

import argparse
import json
from datetime import date

import numpy as np
import torch

from megatron_eslm.launch.bootstrap import single_process
from megatron_eslm.model.gpt import bare_gpt, load_weights
from megatron_eslm.ops.head.statistics import VocabShard, head_statistics
from megatron_eslm.ops.keep_rule import num_to_keep
from megatron_eslm.parallel.mesh import build_mesh
from megatron_eslm.reports.held_out import held_out
from megatron_eslm.reports.passages import validation_passages
from megatron_eslm.reports.token_scores import open_scoring_model

STRIDES = (1, 2, 4, 8, 16, 32, 64)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--load", required=True)
    parser.add_argument("--data-path", nargs="+", required=True, metavar="PREFIX")
    parser.add_argument("--split", help="default: that of the run")
    parser.add_argument("--proxy-layers", type=int, default=1)
    parser.add_argument("--samples", type=int, default=1600)
    parser.add_argument("--rows", type=int, default=10, help="sequences that compete (%(default)s)")
    parser.add_argument("--alpha", type=float, default=0.1)
    args = parser.parse_args()
    with single_process():
        exit_MT2, end_MT2, tokens_MU = token_risks(args)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(exit_MT2))  # neighbours are of one document
    seen, order = np.split(order, 2) if len(order) % 2 == 0 else np.split(order[1:], 2)
    groups = [order[i : i + args.rows] for i in range(0, len(order) - args.rows + 1, args.rows)]
    strides = [s for s in STRIDES if s < exit_MT2.shape[1]]
    for column, (score, of_token_MT) in enumerate(
        {"loss": tokens_MU[:, 1:], "entropy": tokens_MU[:, :-1]}.items()
    ):
        risk_MT = exit_MT2[:, :, column]
        usual_MT = usual_of_token(risk_MT[seen], of_token_MT[seen])[of_token_MT]
        beyond_MT = risk_MT - usual_MT
        table = {f"stride {s}": risk_MT[:, ::s].mean(axis=1) for s in strides}
        table |= {
            f"stride {s}, corrected": usual_MT.mean(axis=1) + beyond_MT[:, ::s].mean(axis=1)
            for s in strides[1:]
        }
        table["what is usual alone"] = usual_MT.mean(axis=1)
        table["whole model"] = end_MT2[:, :, column].mean(axis=1)
        exact_M = risk_MT.mean(axis=1)
        for name, scores_M in table.items():
            ranks = [spearman(scores_M[g], exact_M[g]) for g in groups]
            same = [same_dropped(scores_M[g], exact_M[g], args.alpha) for g in groups]
            record = {
                "row": f"early exit, {score}, {name} against stride 1",
                "rank_correlation": round(float(np.mean(ranks)), 4),
                "same_dropped": round(float(np.mean(same)), 4),
                "rows": args.rows,
                "alpha": args.alpha,
                "sequences": len(order),
                "date": date.today().isoformat(),
            }
            print(json.dumps(record))
            print(
                f"| {score} | {name} | {record['rank_correlation']:.3f} | "
                f"{record['same_dropped']:.1%} |"
            )


def usual_of_token(risk_MT: np.ndarray, of_token_MT: np.ndarray) -> np.ndarray:
    """Mean risk by token id, drawn to the mean of all as if that had been seen four times."""
    size = 1 << 18
    sums = np.bincount(of_token_MT.ravel(), weights=risk_MT.ravel(), minlength=size)
    counts = np.bincount(of_token_MT.ravel(), minlength=size)
    return (sums + 4 * risk_MT.mean()) / (counts + 4)


@torch.no_grad()
def token_risks(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[M, T, 2], loss and entropy of every token at the early exit, and at the end; int64 [M, T+1],
    the tokens."""
    scoring = open_scoring_model(args.load)
    shape, length = scoring.weights.shape, scoring.context
    split = held_out([scoring], args.split).split
    passages = validation_passages(args.data_path, split, scoring.tokenizer, length, args.samples)
    whole = [p for p in passages if len(p.ids) == length]
    model = bare_gpt(shape, build_mesh())
    load_weights(model, scoring.weights.weights)
    shard = VocabShard.of(shape.vocab_size, shape.padded_vocab_size)

    def risks(hidden_TMD: torch.Tensor, labels_TM: torch.Tensor) -> np.ndarray:
        found = head_statistics(
            model.final_norm(hidden_TMD).flatten(0, 1),
            model.output_layer.weight,
            labels_TM.flatten(),
            shard,
            entropy=True,
        )
        assert found.entropy_N is not None
        both = torch.stack([found.loss_N, found.entropy_N], dim=-1)
        return both.view(*labels_TM.shape, 2).transpose(0, 1).numpy()

    exits, ends = [], []
    for first in range(0, len(whole), 16):
        rows = [[p.before, *p.ids.tolist()] for p in whole[first : first + 16]]
        tokens_MU = torch.tensor(rows)
        labels_TM = tokens_MU[:, 1:].t().contiguous()
        hidden_TMD = model.embedding(tokens_MU)
        for number, block in enumerate(model.blocks.values(), start=1):
            hidden_TMD = block(hidden_TMD)
            if number == args.proxy_layers:
                exits.append(risks(hidden_TMD, labels_TM))
        ends.append(risks(hidden_TMD, labels_TM))
    tokens_MU = np.array([[p.before, *p.ids.tolist()] for p in whole])
    return np.concatenate(exits), np.concatenate(ends), tokens_MU


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation; scores are distinct."""
    ranks = [np.argsort(np.argsort(x)).astype(float) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def same_dropped(a: np.ndarray, b: np.ndarray, alpha: float) -> float:
    """Share of what b drops that a drops, too."""
    dropped = len(a) - num_to_keep(len(a), alpha)
    low_a, low_b = (set(np.argsort(x)[:dropped].tolist()) for x in (a, b))
    return len(low_a & low_b) / dropped


if __name__ == "__main__":
    main()
