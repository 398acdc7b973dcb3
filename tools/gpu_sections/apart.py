"""What sections ask of a process of its own.

python -m tools.gpu_sections.apart references|planned full|small FILE
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

ROOT = Path(__file__).resolve().parents[2]
Question = Literal["references", "planned"]


def ask[Answer](
    question: Question, read: Callable[[Path], Answer], *, small: bool, hide_cuda: bool
) -> Answer:
    """What `read` makes of the file that the process wrote. Raises RuntimeError with the end of
    what it printed."""
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    if hide_cuda:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "MEGATRON_OPD_DEVICE": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        path, size = Path(folder, "answer"), "small" if small else "full"
        command = [sys.executable, "-m", "tools.gpu_sections.apart", question, size, str(path)]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
        )
        if done.returncode:
            raise RuntimeError(f"{question}: {done.stderr[-300:]}")
        return read(path)


def main(question: str, size: str, path: Path) -> None:
    from megatron_opd.world import processes
    from tools.gpu_sections import planner, updates

    small = size == "small"
    if question == "planned":
        path.write_text(json.dumps(planner.planned_bytes(small=small)))
        return
    models = updates.architectures(small=small)
    torch.save({name: updates.one_update(arch, "float32") for name, arch in models.items()}, path)
    processes.stop()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
