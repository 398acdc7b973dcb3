"""`python -m megatron_opd`, which torchrun starts on every rank."""

import sys

from megatron_opd.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
