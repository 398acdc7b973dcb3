"""Float16 on two processes: dense parameters and experts are two parts of the optimizer with one
loss scale."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from megatron_opd.architectures.config import LayoutConfig
from megatron_opd.recipe.keys import LossScaleConfig
from megatron_opd.weights.table import weight_table
from tests.tiny_config import tiny_config
from tests.unit.test_planning_memory import EXPERTS

LAYOUTS = {
    "EP 2": LayoutConfig(expert_model_parallel_size=2),
    "TP 2": LayoutConfig(2, sequence_parallel=True, expert_model_parallel_size=2),
    "PP 2": LayoutConfig(1, 2),
}
SCALE = 2.0**14


def test_an_overflow_of_one_rank_and_part_is_everybodys(tmp_path: Path, run_distributed) -> None:
    run_distributed(__file__, 2, tmp_path)
    numbers = sum(math.prod(entry.full_shape) for entry in weight_table(EXPERTS))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    for name, found in first.items():
        assert found["parts"] == (1 if name == "PP 2" else 2)
        norm, applied, scales = found["clean"]
        assert applied and scales == [SCALE] * found["parts"]
        assert norm == pytest.approx(math.sqrt(numbers), rel=1e-6)
        assert found["dense"] == [None, False, [SCALE / 2] * found["parts"]]
        assert found["expert"] == [None, False, [SCALE / 4] * found["parts"]]
        assert found["kept"] == [False, True, True]


# -------------------------------------------------------------------------------------- the program
def updates(layout: LayoutConfig) -> dict:
    """An update on gradients of 1, and two with an infinity on the last rank: in a dense parameter,
    in an expert."""
    from megatron_opd.mcore import parallel as groups
    from megatron_opd.mcore.model import build_model
    from megatron_opd.trainer import step
    from megatron_opd.trainer.student import prepare

    config = tiny_config(
        1e-3,
        layout,
        precision="float16",
        clip_grad=0.0,
        loss_scale=LossScaleConfig(initial=SCALE, hysteresis=1),
    )
    parallel = groups.create(layout)
    chunks = build_model(EXPERTS, parallel, precision="float16")
    for parameter in chunks[0].parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    student = prepare(chunks, EXPERTS, parallel, config)
    parts = student.optimizer.chained_optimizers
    named = dict(chunks[0].named_parameters())
    last = torch.distributed.get_rank() == 1
    found: dict = {"parts": len(parts), "kept": []}
    student.scheduler.step(1)  # the schedule begins at 0
    for case, name in (("clean", ""), ("dense", "linear_qkv"), ("expert", "experts.linear_fc1")):
        for parameter in named.values():  # as backward passes and their sums leave them
            parameter.main_grad.fill_(SCALE)
        if name and last:
            next(p for key, p in named.items() if name in key).main_grad.view(-1).fill_(torch.inf)
        before = [parameter.clone() for parameter in named.values()]
        norm, applied = step._apply(student)
        scales = [float(part.grad_scaler.scale) for part in parts]
        found[case] = (norm if applied else None, applied, scales)
        found["kept"].append(all(map(torch.equal, before, named.values())))
    return found


def main() -> int:
    from megatron_opd.world import processes

    processes.start()
    found = {name: updates(layout) for name, layout in LAYOUTS.items()}
    Path(sys.argv[1], f"{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
    processes.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
