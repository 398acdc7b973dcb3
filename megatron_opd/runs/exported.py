"""The export `hf/` of a run directory, and the checkpoint that its weights come from.

`origin.json` in it names the step and the checkpoint, so that a run that was killed, prolonged or
set back never takes an older export for its own.
"""

import shutil
from pathlib import Path

from megatron_opd.files.manifest import MANIFEST, describe
from megatron_opd.weights.hf import Origin, read_origin


def due(run_dir: Path, step: int) -> Origin | None:
    """The checkpoint that `hf/` must be made of, after the last step; None if it is there already.

    An export of another checkpoint is kept as `hf-step-NNNNNN`, by its own step, or `hf-before` if
    it names none. The remains of a killed export are removed.
    """
    # The manifest has the checksums of all files, so its own stands for the checkpoint.
    manifest = run_dir / "checkpoints" / f"step-{step:06d}" / MANIFEST
    origin: Origin = {"step": step, "checkpoint_sha256": describe(manifest)["sha256"]}
    out = run_dir / "hf"
    for unfinished in run_dir.glob(".hf.unfinished-*"):
        shutil.rmtree(unfinished)
    earlier = read_origin(out)
    if earlier == origin:
        return None
    if out.exists():
        name = f"hf-step-{earlier['step']:06d}" if earlier else "hf-before"
        names = [name, *(f"{name}-{number}" for number in range(2, 1000))]
        out.rename(next(path for path in map(run_dir.joinpath, names) if not path.exists()))
    return origin
