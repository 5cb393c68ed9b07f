"""Pretrain a GPT with selection inside the training step.

    deepspeed pretrain_gpt.py --eslm-alpha 0.1 --eslm-proxy-layers 1

Runs under deepspeed, torchrun and plain python. README.md has the first commands, --help the rest.
"""

if __name__ == "__main__":
    # Before the imports that take seconds.
    from megatron_eslm.launch.signals import end_at_once
    from megatron_eslm.watchdog.parent import end_with_launcher

    launcher = end_with_launcher()
    end_at_once()
    from megatron_eslm.training.main import main

    main(launcher=launcher)
