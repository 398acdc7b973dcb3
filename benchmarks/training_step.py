"""What a whole step costs, phase by phase: sampling, the teacher, the update, the refit, with
random weights.

    python benchmarks/training_step.py                      # Qwen2.5-1.5B's sizes, on one GPU of
                                                            # 100 GB or more
    python benchmarks/training_step.py --small              # a few layers, on a CPU
    python benchmarks/training_step.py --method tgpo gkd --steps 4

Student and teacher are the same model, which samples to the token limit. Every method is a run of
its own. The first step, in which kernels are compiled, is left out of the figures.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.turns import report  # noqa: E402
from megatron_opd.world.device import choice  # noqa: E402
from tests.unit.byte_tokenizer import write_byte_tokenizer  # noqa: E402

PHASES = ("generate", "teacher", "train", "refit", "step")
SIZES = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}
SMALL_SIZES = SIZES | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}


def write_model(directory: Path, sizes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("qwen2", eos_token_id=0, **sizes)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
        directory
    )
    write_byte_tokenizer(directory)


def recipe(model: Path, data: Path, run: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    prompts, samples, tokens = (4, 2, 32) if arguments.small else (32, 8, 512)
    rollout = {
        "num_prompts": prompts,
        "samples_per_prompt": samples,
        "max_completion_tokens": tokens,
    }
    return {
        "name": "training_step",
        "num_steps": arguments.steps,
        "max_sequence_length": 2 * tokens,
        "precision": "bfloat16",
        "method": "tgpo",
        "student": {"path": str(model)},
        "teacher": {"path": str(model)},
        "data": {"train": str(data), "template": {"kind": "raw"}},
        "rollout": rollout | {"kv_cache_gib": 0.1, "gpu_memory_utilization": 0.4},
        "train": {"micro_batch_tokens": 16 * tokens, "optimizer": {"lr": 1e-6}},
        "checkpoint": {"every": 0},
        "run_dir": str(run),
    }


def measure(method: str, folder: Path, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """The timings of every step but the first."""
    data, run = folder / "problems.jsonl", folder / method
    rows = [
        {"problem": f"{i}+{i}=", "answer": f"{2 * i}", "response": f"{2 * i}"} for i in range(64)
    ]
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    path = folder / f"{method}.yaml"
    path.write_text(json.dumps(recipe(folder / "model", data, run, arguments)))
    command = [sys.executable, "-m", "megatron_opd", "train", str(path), f"method={method}"]
    subprocess.run(command, check=True, cwd=ROOT)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = [step for step in steps if "timing/step_seconds" in step]
    return [
        {phase: step.get(f"timing/{phase}_seconds", 0.0) for phase in PHASES} for step in timed[1:]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--method", nargs="+", default=["tgpo"], help="of the catalogue (%(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=4, help="of each run, at least 2 (%(default)s)"
    )
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/training_step.json")
    arguments = parser.parse_args()
    table = Table(
        "method", *(f"{phase}, s" for phase in PHASES), title="medians of the steps after the first"
    )
    results = {}
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name) / "model", SMALL_SIZES if arguments.small else SIZES)
        for method in arguments.method:
            steps = measure(method, Path(name), arguments)
            results[method] = steps
            table.add_row(
                method,
                *(f"{statistics.median(step[phase] for step in steps):.2f}" for phase in PHASES),
            )
    where = torch.cuda.get_device_name() if choice().kind == "cuda" else "CPU"
    report(table, {"device": where, "torch": torch.__version__, "seconds": results}, arguments.out)


if __name__ == "__main__":
    main()
