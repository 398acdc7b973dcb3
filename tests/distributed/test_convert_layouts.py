"""What convert writes is what Megatron would have saved: the same names, and any layout loads
it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch

from megatron_opd.architectures.architecture import Architecture, read_architecture
from megatron_opd.conversion.convert import convert
from megatron_opd.weights.distributed import DistributedCheckpoint
from megatron_opd.weights.hf import HfCheckpoint
from tests.distributed.test_weights_parity import make_reference
from tests.forked import REPOSITORY
from tests.tiny_config import tiny_config

# model -> (model_type, tied, heads, key-value heads, layers, RoPE type); 131 tokens: tensor
# parallelism has to pad them
MODELS = {
    "dense": ("qwen3", False, 8, 2, 4, "default"),
    "tied": ("qwen2", True, 4, 2, 2, "default"),
    "moe": ("qwen3_moe", False, 4, 2, 2, "default"),
}
# processes -> name: (TP, PP, EP)
LAYOUTS = {1: {"whole": (1, 1, 1)}, 2: {"tp2": (2, 1, 1), "pp2": (1, 2, 1), "ep2": (1, 1, 2)}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model as Hugging Face directory NAME and as Megatron directory NAME-megatron."""
    root = tmp_path_factory.mktemp("models")
    for name, sizes in MODELS.items():
        make_reference(root / name, *sizes)
        convert(str(root / name), str(root / f"{name}-megatron"))
    return root


@pytest.mark.parametrize("nproc", LAYOUTS)
def test_every_layout_loads_what_was_converted_and_saves_what_converts_back(
    nproc: int, models: Path, tmp_path: Path, run_distributed: Callable[..., CompletedProcess]
) -> None:
    run_distributed(__file__, nproc, models, tmp_path)
    for layout in LAYOUTS[nproc]:
        for name in names_of(layout):
            saved = tmp_path / layout / name
            ours, theirs = (
                described(models / f"{name}-megatron" / "model"),
                described(saved / "model"),
            )
            assert ours.keys() == theirs.keys()
            assert ours == theirs or nproc > 1
            convert(str(saved), f"{saved}-hf")
            before, after = HfCheckpoint(models / name), HfCheckpoint(f"{saved}-hf")
            assert before.shapes == after.shapes
            assert all(
                torch.equal(before.read(tensor), after.read(tensor)) for tensor in before.shapes
            )


def test_processes_that_the_command_starts_write_the_same(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "megatron_opd",
        "convert",
        str(models / "dense"),
        str(out),
        "--nproc",
        "2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=240)
    assert done.returncode == 0, done.stderr
    written = out / "model" / "__0_1.distcp"
    assert written.read_bytes() == (models / "dense-megatron" / "model" / written.name).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def names_of(layout: str) -> list[str]:
    return ["moe"] if layout == "ep2" else list(MODELS)


def described(directory: Path) -> dict[str, Any]:
    """Name -> shape, dtype and blocks of a tensor, or None of an object, as the format's metadata
    has them."""
    metadata = DistributedCheckpoint(directory).metadata.state_dict_metadata
    return {
        key: (each.size, each.properties.dtype, {(c.offsets, c.sizes) for c in each.chunks})
        if hasattr(each, "chunks")
        else None
        for key, each in metadata.items()
    }


# -------------------------------------------------------------------------------------- the program
def check_load(name: str, arch: Architecture, parallel: Any, models: Path) -> list[Any]:
    """Loads both forms as a run does: every parameter is the same."""
    from megatron_opd.architectures.config import ModelConfig
    from megatron_opd.runs.models import load

    hf, megatron = (
        load(tiny_config(), ModelConfig(str(models / each)), arch, parallel)
        for each in (name, f"{name}-megatron")
    )
    expected = dict(hf[0].named_parameters())
    for parameter_name, parameter in megatron[0].named_parameters():
        assert torch.equal(parameter, expected.pop(parameter_name)), parameter_name
    assert not expected
    return megatron


def save_as_runs_do(
    chunks: list[Any], parallel: Any, models: Path, name: str, out_dir: Path
) -> None:
    import shutil

    from megatron.core import dist_checkpointing

    from megatron_opd.files.manifest import write_manifest

    rank, out = torch.distributed.get_rank(), out_dir / name
    if rank == 0:
        (out / "model").mkdir(parents=True)
        shutil.copyfile(models / name / "config.json", out / "config.json")
    torch.distributed.barrier()
    with parallel.active():
        state = {
            "model": chunks[0].sharded_state_dict(metadata={"dp_cp_group": parallel.groups.dp_cp})
        }
        dist_checkpointing.save(state, str(out / "model"), async_strategy="mcore")
    torch.distributed.barrier()
    if rank == 0:
        write_manifest(out)


def main() -> int:
    from megatron_opd.architectures.config import LayoutConfig
    from megatron_opd.mcore import parallel as groups
    from megatron_opd.world import processes

    models, out_dir = map(Path, sys.argv[1:])
    processes.start()
    for layout, (tp, pp, ep) in LAYOUTS[torch.distributed.get_world_size()].items():
        parallel = groups.create(LayoutConfig(tp, pp, False, ep))
        for name in names_of(layout):
            chunks = check_load(name, read_architecture(models / name), parallel, models)
            save_as_runs_do(chunks, parallel, models, name, out_dir / layout)
    torch.distributed.barrier()
    processes.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
