#!/usr/bin/env python
"""The same as `megatron-eslm score-reference`: see megatron_eslm/commands/score_reference.py."""

import sys

from megatron_eslm.commands.score_reference import main

if __name__ == "__main__":
    sys.exit(main())
