"""A training checkpoint as a Hugging Face directory, on one process."""

from pathlib import Path

from megatron_opd.config.architecture import architecture_of
from megatron_opd.config.load import load_config
from megatron_opd.config.schema import LayoutConfig
from megatron_opd.errors import DataError


def run(checkpoint: str, out: str) -> Path:
    """Writes the student of `RUN/checkpoints/step-NNNNNN` to `out`, for transformers and vLLM.

    The layout it was trained in does not matter. Raises DataError when `checkpoint` is not a whole checkpoint of a
    run, or `out` exists.
    """
    from megatron_opd.mcore import parallel as groups
    from megatron_opd.mcore.model import build_model
    from megatron_opd.train.checkpoint import find_damage, load_weights
    from megatron_opd.weights.export import export_hf
    from megatron_opd.weights.hf import check_out_dir

    directory, target = Path(checkpoint), Path(out)
    recipe = directory.parent.parent / "config.yaml"
    if not recipe.is_file():
        raise DataError(f"{checkpoint}: not a checkpoint of a run (no {recipe}); give RUN/checkpoints/step-NNNNNN")
    if not directory.is_dir():
        raise DataError(f"{checkpoint}: no such checkpoint; there are {_names(directory.parent)}")
    if problem := find_damage(directory):
        raise DataError(f"{checkpoint}: {problem}; convert another checkpoint of the run")
    check_out_dir(target)
    config = load_config(str(recipe), [])
    arch = architecture_of(config.student)
    groups.start()
    try:
        layout = groups.create(LayoutConfig())
        chunks = build_model(arch, layout, precision=config.precision)
        load_weights(directory, chunks, layout)
        export_hf(chunks, arch, layout, config.student.path, target)
    finally:
        groups.stop()
    print(f"{target}: {config.student.path} as trained by {checkpoint}")
    return target


def _names(checkpoints: Path) -> str:
    return ", ".join(sorted(path.name for path in checkpoints.glob("step-*"))) or "none yet"
