"""What convert writes is what Megatron would have saved: the same names, and any layout loads it."""

import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch

from megatron_opd.config.architecture import Architecture, read_architecture
from megatron_opd.convert import run
from megatron_opd.weights.distributed import DistributedCheckpoint
from megatron_opd.weights.hf import HfCheckpoint
from tests.distributed.test_weights_parity import make_reference

# model -> (model_type, tied, heads, key-value heads, layers); 131 tokens: tensor parallelism has to pad them
MODELS = {
    "dense": ("qwen3", False, 8, 2, 4),
    "tied": ("qwen2", True, 4, 2, 2),
    "moe": ("qwen3_moe", False, 4, 2, 2),
}
# processes -> name: (TP, PP, EP)
LAYOUTS = {1: {"whole": (1, 1, 1)}, 2: {"tp2": (2, 1, 1), "pp2": (1, 2, 1), "ep2": (1, 1, 2)}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model as Hugging Face directory NAME and as Megatron directory NAME-megatron."""
    root = tmp_path_factory.mktemp("models")
    for name, sizes in MODELS.items():
        make_reference(root / name, *sizes)
        run(str(root / name), str(root / f"{name}-megatron"))
    return root


@pytest.mark.parametrize("nproc", LAYOUTS)
def test_every_layout_loads_what_was_converted_and_saves_what_converts_back(
    nproc: int, models: Path, tmp_path: Path, run_distributed: Callable[..., CompletedProcess]
) -> None:
    run_distributed(__file__, nproc, models, tmp_path)
    for layout in LAYOUTS[nproc]:
        for name in names_of(layout):
            saved = tmp_path / layout / name
            ours, theirs = described(models / f"{name}-megatron" / "model"), described(saved / "model")
            assert ours.keys() == theirs.keys()
            assert ours == theirs or nproc > 1
            run(str(saved), f"{saved}-hf")
            before, after = HfCheckpoint(models / name), HfCheckpoint(f"{saved}-hf")
            assert before.shapes == after.shapes
            assert all(torch.equal(before.read(tensor), after.read(tensor)) for tensor in before.shapes)


def names_of(layout: str) -> list[str]:
    return ["moe"] if layout == "ep2" else list(MODELS)


def described(directory: Path) -> dict[str, Any]:
    """Name -> shape, dtype and blocks of a tensor, or None of an object, as the format's metadata has them."""
    metadata = DistributedCheckpoint(directory).metadata.state_dict_metadata
    return {
        key: (each.size, each.properties.dtype, {(c.offsets, c.sizes) for c in each.chunks})
        if hasattr(each, "chunks")
        else None
        for key, each in metadata.items()
    }


# ------------------------------------------------------------------------------------------------ the program
def check_load(name: str, arch: Architecture, parallel: Any, models: Path) -> list[torch.nn.Module]:
    """Loads both forms; the parameters must be equal and all filled."""
    from megatron_opd.mcore.model import build_model
    from megatron_opd.train.checkpoint import load_weights
    from megatron_opd.weights.load import load_hf

    loaded, expected = (build_model(arch, parallel, precision="float32") for _ in range(2))
    for parameter in [*loaded[0].parameters(), *expected[0].parameters()]:
        parameter.data.fill_(float("nan"))
    load_hf(expected, models / name, arch, parallel)
    load_weights(models / f"{name}-megatron", loaded, parallel)
    ours, theirs = dict(loaded[0].named_parameters()), dict(expected[0].named_parameters())
    for parameter_name, parameter in theirs.items():
        assert torch.equal(ours[parameter_name], parameter), parameter_name
    return loaded


def save_as_runs_do(chunks: list[Any], parallel: Any, models: Path, name: str, out_dir: Path) -> None:
    import shutil

    from megatron.core import dist_checkpointing

    from megatron_opd.manifest import write_manifest

    rank, out = torch.distributed.get_rank(), out_dir / name
    if rank == 0:
        (out / "model").mkdir(parents=True)
        shutil.copyfile(models / name / "config.json", out / "config.json")
    torch.distributed.barrier()
    with parallel.active():
        state = {"model": chunks[0].sharded_state_dict(metadata={"dp_cp_group": parallel.groups.dp_cp})}
        dist_checkpointing.save(state, str(out / "model"), async_strategy="mcore")
    torch.distributed.barrier()
    if rank == 0:
        write_manifest(out)


def main() -> int:
    from megatron_opd.config.schema import LayoutConfig
    from megatron_opd.mcore import parallel as groups

    models, out_dir = map(Path, sys.argv[1:])
    groups.start()
    for layout, (tp, pp, ep) in LAYOUTS[torch.distributed.get_world_size()].items():
        parallel = groups.create(LayoutConfig(tp, pp, False, ep))
        for name in names_of(layout):
            chunks = check_load(name, read_architecture(models / name), parallel, models)
            save_as_runs_do(chunks, parallel, models, name, out_dir / layout)
    torch.distributed.barrier()
    groups.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
