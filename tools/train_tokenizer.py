#!/usr/bin/env python
"""The same as `megatron-eslm train-tokenizer`: see megatron_eslm/commands/train_tokenizer.py."""

import sys

from megatron_eslm.commands.train_tokenizer import main

if __name__ == "__main__":
    sys.exit(main())
