"""Pretrain a GPT with selection inside the training step.

    deepspeed pretrain_gpt.py --eslm-alpha 0.1 --eslm-proxy-layers 1

Runs under deepspeed, torchrun and plain python. README.md has the first commands, --help the rest.
The same as `megatron-eslm pretrain`: see megatron_eslm/commands/pretrain.py.
"""

from megatron_eslm.commands.pretrain import main

if __name__ == "__main__":
    main()
