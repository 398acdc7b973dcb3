"""What a refit costs: the student's weights out of Megatron, into vLLM in memory, every tensor
verified.

    python benchmarks/refit.py [--repeat 5]

A Qwen3 model of 12 layers, 768 wide, vocabulary 32768 (140 million parameters) in one process. The
floor is a copy of the weights plus vLLM's own `reload_weights` of tensors that lie ready. The sides
take turns; ratios are of the fastest runs.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.turns import in_turn, report  # noqa: E402
from megatron_opd.architectures.architecture import read_architecture  # noqa: E402
from megatron_opd.architectures.config import LayoutConfig, ModelConfig  # noqa: E402
from megatron_opd.mcore import parallel as groups  # noqa: E402
from megatron_opd.mcore.model import build_model  # noqa: E402
from megatron_opd.recipe.keys import RolloutConfig  # noqa: E402
from megatron_opd.refit.push import push  # noqa: E402
from megatron_opd.rollout.vllm.engine import VllmEngine  # noqa: E402
from megatron_opd.weights.export import iter_hf_tensors  # noqa: E402
from megatron_opd.weights.load import load_hf  # noqa: E402
from megatron_opd.world import processes  # noqa: E402
from tests.e2e import tiny_hf  # noqa: E402


def write_model(directory: Path) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "qwen3", vocab_size=32768, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
        num_attention_heads=12, num_key_value_heads=4, head_dim=64, tie_word_embeddings=False,
        max_position_embeddings=512, eos_token_id=1,
    )  # fmt: skip
    tiny_hf.write(
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32), directory
    )


def measure(directory: Path, precision: Any, repeat: int) -> dict[str, Any]:
    """side -> seconds of each run, and the bytes of the weights."""
    arch, parallel = read_architecture(directory), groups.create(LayoutConfig())
    chunks = build_model(arch, parallel, precision=precision)
    load_hf(chunks, directory, arch, parallel)
    engine = VllmEngine(
        ModelConfig(str(directory)),
        RolloutConfig(kv_cache_gib=0.0625),
        precision=precision,
        max_sequence_length=64,
        seed=0,
    )
    ready = {name: tensor.clone() for name, tensor in iter_hf_tensors(chunks, arch, parallel)}
    version = iter(range(1, 10**6))
    sides: dict[str, Callable[[], Any]] = {
        "copy": lambda: [tensor.clone() for tensor in ready.values()],
        "vLLM's reload": lambda: engine.reload(iter(ready.items())),
        "refit": lambda: push(iter_hf_tensors(chunks, arch, parallel), engine, next(version)),
    }
    seconds = in_turn(sides, repeat)
    engine.close()
    return {"bytes": sum(tensor.nbytes for tensor in ready.values()), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description="A refit against a copy and vLLM's own reload.")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "refit.json")
    arguments = parser.parse_args()
    processes.start()
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        write_model(Path(directory) / "model")
        for precision in ("float32", "bfloat16"):
            results[precision] = measure(Path(directory) / "model", precision, arguments.repeat)
    processes.stop()
    table = Table(title="One refit, one process")
    for column in ("", "precision", "MB", "s: min (max)", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    for precision, result in results.items():
        fastest = {name: min(times) for name, times in result["seconds"].items()}
        floor = fastest["copy"] + fastest["vLLM's reload"]
        for name, times in result["seconds"].items():
            ratio = f"{fastest[name] / floor:.2f}"
            table.add_row(
                name,
                precision,
                f"{result['bytes'] / 1e6:.0f}",
                f"{min(times):.3f} ({max(times):.3f})",
                ratio,
            )
    report(table, results, arguments.json)


if __name__ == "__main__":
    main()
