"""In one process, as torchrun starts it: family_worker.py OUT_DIR MODEL_DIR...; MODEL_DIR-other has
other weights.

For every model: what an engine without weights samples after one refit and after another, and what
the trainer says of it; a refit after which a tied output layer is not packed anew; and the second
weights, exported.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from megatron_opd.architectures.architecture import Architecture, read_architecture
from megatron_opd.architectures.config import LayoutConfig, ModelConfig
from megatron_opd.contracts.sampling import Draw
from megatron_opd.errors import RunError
from megatron_opd.mcore import parallel as process_groups
from megatron_opd.mcore.model import build_model
from megatron_opd.mcore.parallel import Parallel
from megatron_opd.recipe.keys import RolloutConfig
from megatron_opd.refit.push import push
from megatron_opd.rollout.single_turn import SingleTurn
from megatron_opd.rollout.vllm.engine import VllmEngine
from megatron_opd.tasks.tokenizer import load_tokenizer
from megatron_opd.teacher.score import MegatronTeacher
from megatron_opd.weights.export import export_hf, iter_hf_tensors
from megatron_opd.weights.load import load_hf
from megatron_opd.world import processes
from tests.e2e import tiny_hf


def main(out_dir: Path, model_dirs: list[Path]) -> None:
    processes.start()
    parallel = process_groups.create(LayoutConfig())
    for model_dir in model_dirs:
        measured = measure(model_dir, read_architecture(model_dir), parallel, out_dir)
        (out_dir / f"{model_dir.name}.json").write_text(json.dumps(measured))
    processes.stop()


def measure(
    model_dir: Path, arch: Architecture, parallel: Parallel, out_dir: Path
) -> dict[str, Any]:
    model, config = ModelConfig(str(model_dir)), RolloutConfig(kv_cache_gib=0.0625)
    chunks = build_model(arch, parallel, precision="float32")
    trainer = MegatronTeacher(
        chunks,
        arch,
        parallel,
        student_vocab_size=arch.vocab_size,
        micro_batch_tokens=512,
        temperature=1.0,
    )
    engine = VllmEngine(
        model, config, precision="float32", max_sequence_length=64, seed=0, empty=True
    )
    sampler = SingleTurn(engine, load_tokenizer(model_dir))
    draw = Draw(seed=5, step=0, version=0, samples=8, max_tokens=12, temperature=1.0)
    measured: dict[str, Any] = {"from_trainer": [], "from_transformers": [], "tokens": []}
    try:
        for version, weights in enumerate((model_dir, other(model_dir))):
            load_hf(chunks, weights, arch, parallel)
            push(iter_hf_tensors(chunks, arch, parallel), engine, version)
            rows = sampler.sample(tiny_hf.tasks(3, 40), replace(draw, version=version))
            logprobs_T = np.concatenate([row.logprobs for row in rows])
            hf_model = transformers.AutoModelForCausalLM.from_pretrained(weights)
            hf_logprobs_T = np.concatenate(
                [tiny_hf.logprobs(hf_model, row, 1.0, 1.0) for row in rows]
            )
            measured["from_trainer"].append(
                float(np.abs(logprobs_T - trainer.score(rows).logprobs_T).max())
            )
            measured["from_transformers"].append(float(np.abs(logprobs_T - hf_logprobs_T).max()))
            measured["tokens"].append([row.token_ids.tolist() for row in rows])
        measured["stale"] = refit_without_packing(engine, model_dir, arch, parallel, chunks)
    finally:
        engine.close()
    load_hf(chunks, other(model_dir), arch, parallel)
    export_hf(chunks, arch, parallel, model_dir, out_dir / model_dir.name)
    return measured


def refit_without_packing(
    engine: VllmEngine, model_dir: Path, arch: Architecture, parallel: Parallel, chunks: list[Any]
) -> str | None:
    """What is said when the first weights come again, and the modules that vLLM's loaders do not
    reach stay behind."""
    load_hf(chunks, model_dir, arch, parallel)
    engine._weights.pack_tied = lambda: None  # type: ignore[method-assign]
    try:
        push(iter_hf_tensors(chunks, arch, parallel), engine, 2)
    except RunError as error:
        return str(error)
    return None


def other(model_dir: Path) -> Path:
    return model_dir.with_name(f"{model_dir.name}-other")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(each) for each in sys.argv[2:]])
