"""What the measurements of steps have in common on the command line."""

from __future__ import annotations

import argparse

GPT2_VOCAB = 50_257
SHAPES = {
    "124M": ("--model-size", "124M"),
    "350M": ("--model-size", "350M"),
    # 1.5B's blocks, as many as fit here.
    "1.5B-8": (
        *("--num-layers", "8", "--hidden-size", "1600", "--num-attention-heads", "25"),
        *("--lr", "1e-4"),
    ),
    "1.5B": ("--model-size", "1.5B"),
    "llama-1B-4": ("--model-size", "llama-1B", "--num-layers", "4"),
    # That of examples/reproduce/scales/small.yaml; --vocab-size 4096 --rows 40 --seq-length 128.
    "1.3M": (
        *("--num-layers", "4", "--hidden-size", "128", "--num-attention-heads", "4"),
        *("--lr", "1e-4"),
    ),
    # That of examples/reproduce/scales/medium.yaml; the same flags.
    "7.4M": (
        *("--num-layers", "8", "--hidden-size", "256", "--num-attention-heads", "4"),
        *("--lr", "1e-4"),
    ),
    "tiny": (
        *("--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "2"),
        *("--lr", "1e-4"),
    ),
}


def parser(description: str | None) -> argparse.ArgumentParser:
    """With the flags that all have."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--shape", choices=SHAPES, default="124M")
    made.add_argument("--dtype", choices=("float32", "bf16"), default="float32")
    made.add_argument("--rows", type=int, default=10, help="sequences a micro-step (%(default)s)")
    made.add_argument("--seq-length", type=int, default=512, help="(%(default)s)")
    made.add_argument("--repetitions", type=int, default=5, help="(%(default)s)")
    return made


def training_flags(args: argparse.Namespace, ranks: int = 1) -> tuple[str, ...]:
    """Flags of pretrain_gpt.py for steps of one micro-step."""
    return (
        *SHAPES[args.shape],
        *("--seq-length", str(args.seq_length), "--train-iters", "1000"),
        *("--micro-batch-size", str(args.rows), "--global-batch-size", str(args.rows * ranks)),
        *("--lr-warmup-iters", "10", "--lr-decay-iters", "1000"),
        *(("--bf16",) if args.dtype == "bf16" else ()),
    )


def settings(args: argparse.Namespace) -> dict[str, int]:
    """What a report is to say of the measurement."""
    return {
        "rows": args.rows,
        "seq_length": args.seq_length,
        "repetitions": args.repetitions,
    }
