"""One TGPO update with the logits op and with the fused output layer: loss, memory, time.

    python benchmarks/fused_output_layer.py [--repeat 5]

A two-layer Megatron student and a teacher with a vocabulary of 32768, 16 sequences of 64 sampled
tokens, float32, one process. The memory is the peak of live tensor bytes within the update, the
parameters and their gradients apart. The two sides take turns.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.turns import report  # noqa: E402
from megatron_opd.architectures.architecture import read_architecture  # noqa: E402
from megatron_opd.architectures.config import LayoutConfig, ModelConfig  # noqa: E402
from megatron_opd.contracts.rows import Episode, Row, Task  # noqa: E402
from megatron_opd.contracts.signals import Signals  # noqa: E402
from megatron_opd.mcore import parallel as groups  # noqa: E402
from megatron_opd.mcore.model import build_model  # noqa: E402
from megatron_opd.methods.catalogue import CATALOGUE  # noqa: E402
from megatron_opd.objective.batch import Batch  # noqa: E402
from megatron_opd.objective.columns import build_columns  # noqa: E402
from megatron_opd.objective.loss import Objective  # noqa: E402
from megatron_opd.recipe.data import DataConfig  # noqa: E402
from megatron_opd.recipe.keys import OptimizerConfig, RunConfig, TrainConfig  # noqa: E402
from megatron_opd.teacher.score import MegatronTeacher  # noqa: E402
from megatron_opd.trainer.step import update  # noqa: E402
from megatron_opd.trainer.student import Student, prepare  # noqa: E402
from megatron_opd.weights.load import load_hf  # noqa: E402
from megatron_opd.world import processes  # noqa: E402
from tests.unit.live_bytes import LiveBytes  # noqa: E402

VOCAB, SEQUENCES, PROMPT, COMPLETION = 32768, 16, 8, 64
TOKENS = SEQUENCES * (PROMPT + COMPLETION)
SIDES = {"logits": False, "fused output layer": True}


def write_model(directory: Path, seed: int) -> None:
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(
        "qwen3",
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(
        directory
    )


def rows() -> list[Row]:
    rng = np.random.default_rng(0)

    def ids(n: int) -> np.ndarray:
        return rng.integers(0, VOCAB, n).astype(np.int32)

    return [
        Row.of_student(
            Episode(
                Task(i // 4, "", "", "", ids(PROMPT)),
                sample=i % 4,
                group=i // 4,
                reward=float(i % 2),
            ),
            ids(COMPLETION),
            np.full(COMPLETION, -10, np.float32),
            version=0,
        )
        for i in range(SEQUENCES)
    ]


def build(directory: Path, repeat: int) -> dict[str, Any]:
    """side -> {loss, peak_bytes, seconds}."""
    for seed, name in enumerate(("student", "teacher")):
        write_model(directory / name, seed)
    arch, parallel = read_architecture(directory / "student"), groups.create(LayoutConfig())

    def load(name: str) -> list[Any]:
        chunks = build_model(arch, parallel, precision="float32")
        load_hf(chunks, directory / name, arch, parallel)
        return chunks

    samples = rows()
    teacher = MegatronTeacher(
        load("teacher"),
        arch,
        parallel,
        student_vocab_size=VOCAB,
        micro_batch_tokens=TOKENS,
        temperature=1.0,
    )
    signals = teacher.score(samples)
    method = CATALOGUE["tgpo"].method
    config = RunConfig(
        name="",
        num_steps=1000,
        max_sequence_length=PROMPT + COMPLETION,
        method=method,
        precision="float32",
        student=ModelConfig(""),
        data=DataConfig(""),
        train=TrainConfig(OptimizerConfig(lr=1e-30)),
    )
    student = prepare(load("student"), arch, parallel, config)
    batch = Batch(samples, Signals(signals), seed=0, step=0, max_completion_tokens=COMPLETION)
    columns = build_columns(method, batch)
    objective = Objective(method, VOCAB, 1.0)

    def once(side: Student) -> float:
        return update(side, samples, columns, objective, step=0, micro_batch_tokens=TOKENS)[0][
            "train/loss"
        ]

    sides = {name: replace(student, fused_output_layer=fused) for name, fused in SIDES.items()}
    results: dict[str, Any] = {name: {"seconds": []} for name in sides}
    for name, side in sides.items():  # also the warm-up
        with LiveBytes() as live:
            for parameter in student.chunks[0].parameters():
                live.ignore(parameter, parameter.main_grad)
            results[name]["loss"] = once(side)
        results[name]["peak_bytes"] = live.peak
    for _ in range(repeat):
        for name, side in sides.items():
            start = time.perf_counter()
            once(side)
            results[name]["seconds"].append(time.perf_counter() - start)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="The fused output layer, measured in an update.")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks" / "results" / "fused_output_layer.json"
    )
    arguments = parser.parse_args()
    processes.start()
    with tempfile.TemporaryDirectory() as directory:
        results = build(Path(directory), arguments.repeat)
    processes.stop()
    table = Table(title=f"One update, {SEQUENCES * COMPLETION} sampled tokens, vocabulary {VOCAB}")
    for column in ("", "loss", "peak MiB", "ms: min (max)"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in results.items():
        times = f"{1e3 * min(row['seconds']):.0f} ({1e3 * max(row['seconds']):.0f})"
        table.add_row(name, f"{row['loss']:.8f}", f"{row['peak_bytes'] / 2**20:.1f}", times)
    report(table, results, arguments.json)


if __name__ == "__main__":
    main()
