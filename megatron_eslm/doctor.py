"""`python -m megatron_eslm.doctor`, the same as `megatron-eslm doctor`."""

import sys

from megatron_eslm.commands.doctor import main

if __name__ == "__main__":
    sys.exit(main())
