"""Pretrain a GPT with selection inside the training step.

    megatron-eslm pretrain --eslm-alpha 0.1 --eslm-proxy-layers 1
    torchrun --nproc-per-node 8 -m megatron_eslm pretrain ...
    deepspeed --module megatron_eslm.commands.pretrain ...

Runs under deepspeed, torchrun, srun, mpirun and plain python, and as a script too.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and end the process with the exit codes of `megatron_eslm.training.main`."""
    # Before the imports that take seconds.
    from megatron_eslm.launch.signals import end_at_once
    from megatron_eslm.watchdog.parent import end_with_launcher

    launcher = end_with_launcher()
    end_at_once()
    from megatron_eslm.training.main import main as train

    train(argv, launcher)


if __name__ == "__main__":
    main()
