"""What a result says of its model and engine, so that two results can be told apart."""

import hashlib
from pathlib import Path

from megatron_opd.recipe.keys import RunConfig

END_BYTES = 1 << 20  # of a file of weights, at its beginning and its end


def identity_of(model_dir: str) -> dict[str, object]:
    """Path and digest of a Hugging Face directory: of all its small files, and of the size, the
    beginning and the end of its weights, so that it takes no minute for a large model."""
    folder = Path(model_dir)
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if not path.is_file() or path.name.startswith("."):
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(END_BYTES))
            if size > END_BYTES:
                file.seek(max(size - END_BYTES, END_BYTES))
                digest.update(file.read())
    return {"path": str(folder.resolve()), "digest": digest.hexdigest()}


def engine_of(config: RunConfig, server: str | None, processes: int) -> dict[str, object]:
    """What wrote the completions."""
    if server:
        return {"name": "server", "address": server, "seed": config.seed}
    import vllm  # slow

    return {
        "name": "vllm",
        "version": vllm.__version__,
        "precision": config.precision,
        "seed": config.seed,
        "processes": processes,
    }
