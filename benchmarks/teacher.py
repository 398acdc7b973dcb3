"""What the teacher's signals cost on top of a plain forward pass of the same tokens.

    python benchmarks/teacher.py [--repeat 5] [--layers 16]

A Qwen3 teacher of 16 layers, 512 wide, vocabulary 16384 (an eighth of the multiplications lie in
the output layer), 16 sequences of 192 tokens, one process. The plain pass computes every logit of
the completion tokens and keeps nothing. Scoring gives argmax, logprob and entropy, and with top-k
the k best besides. The sides take turns; ratios are of the fastest runs.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.table import Table
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.turns import in_turn, report  # noqa: E402
from megatron_opd.architectures.architecture import read_architecture  # noqa: E402
from megatron_opd.architectures.config import LayoutConfig  # noqa: E402
from megatron_opd.contracts.rows import Episode, Row, Task  # noqa: E402
from megatron_opd.mcore import parallel as groups  # noqa: E402
from megatron_opd.mcore import passes  # noqa: E402
from megatron_opd.mcore.batch import MicroBatch, micro_batches  # noqa: E402
from megatron_opd.mcore.head import Head  # noqa: E402
from megatron_opd.mcore.model import build_model  # noqa: E402
from megatron_opd.teacher.score import MegatronTeacher  # noqa: E402
from megatron_opd.weights.load import load_hf  # noqa: E402
from megatron_opd.world import processes  # noqa: E402

VOCAB, HIDDEN, SEQUENCES, PROMPT, COMPLETION, MICRO = 16384, 512, 16, 64, 128, 768


def build(directory: Path, layers: int, precision: str) -> MegatronTeacher:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "qwen3",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=False,
        max_position_embeddings=512,
    )
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(
        directory
    )
    arch, parallel = read_architecture(directory), groups.create(LayoutConfig())
    chunks = build_model(arch, parallel, precision=precision)
    load_hf(chunks, directory, arch, parallel)
    return MegatronTeacher(
        chunks, arch, parallel, student_vocab_size=VOCAB, micro_batch_tokens=MICRO, temperature=1.0
    )


def rows() -> list[Row]:
    rng = np.random.default_rng(0)
    prompt = [rng.integers(0, VOCAB, PROMPT).astype(np.int32) for _ in range(SEQUENCES)]
    completion = [rng.integers(0, VOCAB, COMPLETION).astype(np.int32) for _ in range(SEQUENCES)]
    zeros = np.zeros(COMPLETION, np.float32)
    return [
        Row.of_student(
            Episode(Task(i, "", "", "", prompt[i]), sample=0), completion[i], zeros, version=0
        )
        for i in range(SEQUENCES)
    ]


def plain(teacher: MegatronTeacher, samples: list[Row]) -> None:
    def logits(_: MicroBatch, head: Head) -> tuple[Tensor, None]:
        out_TV = head.hidden_TD @ head.weight_VD.T
        return out_TV.new_zeros(()), None

    with torch.no_grad():
        batches = micro_batches(samples, teacher.parallel, MICRO)
        passes.forward_backward(
            teacher.chunks, teacher.parallel, batches, logits, forward_only=True
        )


def measure(teacher: MegatronTeacher, repeat: int) -> dict[str, list[float]]:
    """side -> seconds of each run."""
    samples = rows()
    sides: dict[str, Callable[[], Any]] = {
        "plain forward": lambda: plain(teacher, samples),
        "signals": lambda: teacher.score(samples),
        "signals, top 64": lambda: teacher.score(samples, 64),
    }
    return in_turn(sides, repeat)


def main() -> None:
    parser = argparse.ArgumentParser(description="Scoring against a plain forward pass.")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks" / "results" / "teacher.json"
    )
    arguments = parser.parse_args()
    processes.start()
    results = {}
    for precision in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory() as directory:
            results[precision] = measure(
                build(Path(directory), arguments.layers, precision), arguments.repeat
            )
    processes.stop()
    tokens = f"{SEQUENCES} x {PROMPT + COMPLETION} tokens"
    table = Table(title=f"{tokens}, vocabulary {VOCAB}, {arguments.layers} layers")
    for column in ("", "precision", "s: min (max)", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    for precision, seconds in results.items():
        floor = min(seconds["plain forward"])
        for name, times in seconds.items():
            table.add_row(
                name, precision, f"{min(times):.2f} ({max(times):.2f})", f"{min(times) / floor:.3f}"
            )
    report(table, results, arguments.json)


if __name__ == "__main__":
    main()
