"""The command line. Heavy imports happen inside the commands that need them."""

import sys
from collections.abc import Sequence

from megatron_opd.cli.arguments import parse
from megatron_opd.world.host import hide_gpus
from megatron_opd.world.worker import finish, outcome, quieten_dependencies


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Returns the exit code: 0, 1 (failed), 2 (bad input) or 130 (interrupted)."""
    own_process = argv is None
    argv = list(sys.argv[1:] if argv is None else argv)
    quieten_dependencies()

    def run() -> int | None:
        if own_process:
            hide_gpus()
        arguments = parse(argv)
        return arguments.command(arguments)

    return finish(*outcome(run))
