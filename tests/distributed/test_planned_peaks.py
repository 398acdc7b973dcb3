"""The planner's peaks where ranks talk to each other: pipeline stages, replicas, experts on other
ranks."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from megatron_opd.architectures.architecture import Architecture
from megatron_opd.architectures.config import LayoutConfig
from megatron_opd.recipe.keys import RunConfig
from tests.unit import test_planning_memory as measured

STAGES, REPLICAS, SHARED = (
    LayoutConfig(1, 2),
    LayoutConfig(),
    LayoutConfig(expert_model_parallel_size=2),
)
DEEP = replace(measured.QWEN3, num_layers=6)
EXPERTS = measured.EXPERTS
TRAINED = {"stages": (DEEP, STAGES), "replicas": (DEEP, REPLICAS), "experts": (EXPERTS, SHARED)}
TRAINED |= {
    "experts of replicas": (EXPERTS, REPLICAS),
    "context": (DEEP, LayoutConfig(context_parallel_size=2)),
}


def recipe(layout: LayoutConfig) -> RunConfig:
    return measured.recipe(
        fused=True, predicted=100, layout=layout, precision="bfloat16", sequences=1
    )


def test_measured_peaks_are_within_a_tenth_of_the_planned_ones(tmp_path, run_distributed):
    from megatron_opd.planning import activations
    from megatron_opd.planning.case import Case
    from megatron_opd.planning.hardware import hardware
    from megatron_opd.planning.memory import in_flight, rank_kinds

    run_distributed(__file__, 2, tmp_path)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for name, (arch, layout) in TRAINED.items():
        case = Case(recipe(layout), {"student": arch}, hardware("cpu", 2), 2, 2)
        kinds = rank_kinds(case)
        assert [in_flight(case, stage) for stage in range(len(kinds))] == (
            [2, 1] if name == "stages" else [1]
        )
        for rank in range(2):
            measured.assert_within_a_tenth(kinds[rank % len(kinds)], found[rank][name])
    batch = measured.micro_batch(EXPERTS, SHARED)
    planned = activations.forward(batch) + EXPERTS.num_layers * activations.routing(batch)
    for rank in range(2):
        assert abs(planned - found[rank]["forward"]) < planned / 10


# -------------------------------------------------------------------------------------- the program
def update_peak(arch: Architecture, layout: LayoutConfig) -> int:
    from megatron_opd.mcore import parallel as groups
    from megatron_opd.mcore.model import build_model

    parallel = groups.create(layout)
    chunks = build_model(arch, parallel, precision="bfloat16")
    for parameter in chunks[0].parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return measured.peak_of_update(chunks, parallel, arch, recipe(layout))


@torch.no_grad()
def experts_peak() -> int:
    from megatron_opd.mcore import parallel as groups
    from megatron_opd.mcore.model import build_model

    torch.manual_seed(0)
    parallel = groups.create(SHARED)
    (chunk,) = build_model(EXPERTS, parallel, precision="float32")
    for parameter in chunk.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    with measured.LiveBytes() as live:
        live.ignore(*chunk.parameters())
        measured.hidden_states(chunk, parallel)
        measured.hidden_states(chunk, parallel)
    return live.peak


def main() -> int:
    from megatron_opd.world import processes

    processes.start()
    results = {name: update_peak(arch, layout) for name, (arch, layout) in TRAINED.items()}
    results["forward"] = experts_peak()
    Path(sys.argv[1], f"{torch.distributed.get_rank()}.json").write_text(json.dumps(results))
    processes.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
