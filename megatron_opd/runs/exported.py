"""`hf/` of a run directory, and of which checkpoint its weights are.

`origin.json` in it names the step and the checkpoint, so that a run that was killed, prolonged or
set back never takes an older export for its own.
"""

import shutil
from pathlib import Path

from megatron_opd.files.manifest import MANIFEST, describe
from megatron_opd.weights.hf import Origin, read_origin


def due(run_dir: Path, step: int) -> Origin | None:
    """What `hf/` is to be of, after the last step; None where it is so already.

    One of another checkpoint is kept as `hf-step-NNNNNN`, after its own step, or `hf-before` where
    it does not say. What a killed export has left is removed.
    """
    # the manifest has the checksums of all files
    manifest = run_dir / "checkpoints" / f"step-{step:06d}" / MANIFEST
    origin: Origin = {"step": step, "checkpoint_sha256": describe(manifest)["sha256"]}
    out = run_dir / "hf"
    for rest in run_dir.glob(".hf.unfinished-*"):
        shutil.rmtree(rest)
    there = read_origin(out)
    if there == origin:
        return None
    if out.exists():
        name = f"hf-step-{there['step']:06d}" if there else "hf-before"
        names = [name, *(f"{name}-{number}" for number in range(2, 1000))]
        out.rename(next(path for path in map(run_dir.joinpath, names) if not path.exists()))
    return origin
