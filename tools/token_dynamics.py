#!/usr/bin/env python
"""The same as `megatron-eslm token-dynamics`: see megatron_eslm/commands/token_dynamics.py."""

import sys

from megatron_eslm.commands.token_dynamics import main

if __name__ == "__main__":
    sys.exit(main())
