"""One of the doctor's processes: `python -m megatron_opd.doctor.worker FOLDER`, under torchrun.

Reads FOLDER/recipe.yaml, leaves FOLDER/measured.json.
"""

import json
import os
import signal
import sys
from pathlib import Path

from megatron_opd.errors import OpdError
from megatron_opd.recipe.load import load_config
from megatron_opd.world import torchrun
from megatron_opd.world.worker import quieten_dependencies


def main(folder: Path) -> int:
    torchrun.die_with_parent(signal.SIGKILL)
    quieten_dependencies()  # before their imports, which print
    from megatron_opd.doctor.measure import measure
    from megatron_opd.runs.roles import run_in_role

    try:
        config = load_config(str(folder / "recipe.yaml"))

        def work() -> None:
            measured = measure(config)
            if int(os.environ["RANK"]) == 0:
                (folder / "measured.json").write_text(json.dumps(measured))

        run_in_role(config, work)
    except OpdError as error:
        return torchrun.record_outcome(error.exit_code, str(error))
    return torchrun.record_outcome(0, "")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
