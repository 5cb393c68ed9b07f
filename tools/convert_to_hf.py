#!/usr/bin/env python
"""The same as `megatron-eslm convert-to-hf`: see megatron_eslm/commands/convert_to_hf.py."""

import sys

from megatron_eslm.commands.convert_to_hf import main

if __name__ == "__main__":
    sys.exit(main())
