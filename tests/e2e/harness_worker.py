"""`megatron-opd ARGUMENTS` with the packages of a folder: harness_worker.py FOLDER ARGUMENTS."""

import sys

from megatron_opd.cli.main import main

sys.path.insert(0, sys.argv[1])
sys.exit(main(sys.argv[2:]))
