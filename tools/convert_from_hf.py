#!/usr/bin/env python
"""The same as `megatron-eslm convert-from-hf`: see megatron_eslm/commands/convert_from_hf.py."""

import sys

from megatron_eslm.commands.convert_from_hf import main

if __name__ == "__main__":
    sys.exit(main())
