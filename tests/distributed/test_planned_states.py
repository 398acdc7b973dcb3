"""The planner's bytes of parameters, gradients and optimizer states are those of really built
models, exactly."""

import itertools
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_opd.architectures.architecture import Architecture, read_architecture
from megatron_opd.architectures.config import LayoutConfig
from tests.tiny_config import tiny_config
from tests.unit.tiny_model_files import write_model

# Sizes that no alignment divides, so that padding shows: tied embeddings, biases, an odd
# vocabulary.
MODELS = {
    "student": {
        "model_type": "qwen2",
        "vocab_size": 101,
        "hidden_size": 24,
        "head_dim": 6,
        "intermediate_size": 38,
        "tie_word_embeddings": True,
    },
    "untied": {"vocab_size": 67, "hidden_size": 12, "intermediate_size": 22},
    "experts": {
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 14,
    },
}
PRECISIONS = ("bfloat16", "float32")
SHAPES = {  # processes -> TP, PP, EP, CP, ETP
    1: [(1, 1, 1, 1, 1)],
    2: [
        (1, 1, 1, 1, 1),
        (2, 1, 1, 1, 1),
        (1, 2, 1, 1, 1),
        (1, 1, 2, 1, 1),
        (2, 1, 2, 1, 1),
        (1, 1, 1, 2, 1),
        (2, 1, 1, 1, 2),
        (1, 1, 1, 1, 2),
    ],
    4: [  # with experts on several replicas
        (1, 1, 2, 1, 1),
        (2, 1, 1, 1, 1),
        (2, 1, 2, 1, 1),
        (2, 1, 4, 1, 1),
        (1, 2, 2, 1, 1),
        (2, 2, 2, 1, 1),
        (2, 1, 2, 2, 1),
        (1, 1, 1, 1, 2),
        (2, 1, 2, 1, 2),
    ],
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("planned")
    for name, sizes in MODELS.items():
        write_model(folder / name, **sizes)
    return folder


@pytest.mark.parametrize("nproc", SHAPES)
def test_planned_bytes_are_those_held(nproc, directory, run_distributed):
    run_distributed(__file__, nproc, directory)
    for rank in range(nproc):
        held = json.loads((directory / f"{nproc}-{rank}.json").read_text())
        assert [json.loads(key) for key in held] == [[*case] for case in cases(nproc)]
        for key, real in held.items():
            assert planned(directory, nproc, *json.loads(key), rank) == real, (nproc, rank, key)


def cases(world: int) -> list[tuple[bool, str, str, list[int]]]:
    """Trained or frozen, model, precision, shape."""
    found = []
    for shape, precision in itertools.product(SHAPES[world], PRECISIONS):
        found.append((False, "experts", precision, [*shape]))
        names = ["experts"] if max(shape[2], shape[4]) > 1 or world == 4 else [*MODELS]
        found += [(True, name, precision, [*shape]) for name in names]
    return found


def layout_of(shape: list[int]) -> LayoutConfig:
    tp, pp, ep, cp, etp = shape
    return LayoutConfig(tp, pp, tp > 1, ep, etp, context_parallel_size=cp)


def planned(
    directory: Path,
    world: int,
    trained: bool,
    name: str,
    precision: str,
    shape: list[int],
    rank: int,
) -> dict[str, int]:
    from megatron_opd.planning.states import stages, trained_bytes

    layout, arch = layout_of(shape), read_architecture(directory / name)
    ranks_of_stage = world // layout.pipeline_model_parallel_size
    stage = stages(arch, layout, precision)[rank // ranks_of_stage]
    if not trained:
        return {"parameters": stage.num_bytes}
    return asdict(trained_bytes(stage, layout, ranks_of_stage)[rank % ranks_of_stage])


# -------------------------------------------------------------------------------------- the program
def held_bytes(
    trained: bool, arch: Architecture, shape: list[int], precision: str
) -> dict[str, int]:
    """Of a trained model after one update, from which on the moments exist."""
    from megatron_opd.mcore import parallel as groups
    from megatron_opd.mcore.model import build_model
    from megatron_opd.trainer.student import prepare

    layout = groups.create(layout_of(shape))
    chunks = build_model(arch, layout, precision=precision)
    if not trained:
        return {"parameters": storages(chunks[0].parameters())}
    for parameter in chunks[0].parameters():
        torch.nn.init.zeros_(parameter)
    return held_by(prepare(chunks, arch, layout, tiny_config(precision=precision)))


def held_by(student: Any) -> dict[str, int]:
    """After an update, which this is."""
    with student.parallel.active():
        student.optimizer.step()
    chunk = student.bare_chunks[0]
    own = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
    state = []
    for optimizer in getattr(student.optimizer, "chained_optimizers", [student.optimizer]):
        inner = optimizer.optimizer
        main = [each for group in inner.param_groups for each in group["params"]]
        state += [each for each in main if each.untyped_storage().data_ptr() not in own]
        state += [
            inner.state[each][moment] for each in main for moment in ("exp_avg", "exp_avg_sq")
        ]
    buffers = [*student.chunks[0].buffers, *student.chunks[0].expert_parallel_buffers]
    return {
        "parameters": storages(chunk.parameters()),
        "gradients": storages(buffer.grad_data for buffer in buffers),
        "optimizer": storages(state),
    }


def storages(tensors) -> int:
    """Bytes, each storage once."""
    return sum(
        {
            each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors
        }.values()
    )


def main() -> int:
    from megatron_opd.world import processes

    directory = Path(sys.argv[1])
    processes.start()
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    results = {}
    for trained, name, precision, shape in cases(world):
        arch = read_architecture(directory / name)
        results[json.dumps([trained, name, precision, shape])] = held_bytes(
            trained, arch, shape, precision
        )
    (directory / f"{world}-{rank}.json").write_text(json.dumps(results))
    processes.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
