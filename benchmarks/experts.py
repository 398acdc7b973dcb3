"""Experts of a rank at once and one after the other: time of a forward and a backward pass.

    python benchmarks/experts.py [--repeat 7]

One layer's experts of hidden size 256 and intermediate size 128, 8 and 64 of them, on 2048 tokens
that a random router has given out, in one process. The two sides have the same weights and take
turns.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.backends import LocalSpecProvider
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.turns import in_turn, report  # noqa: E402
from megatron_opd.architectures.architecture import Architecture, Experts  # noqa: E402
from megatron_opd.architectures.config import LayoutConfig  # noqa: E402
from megatron_opd.mcore import parallel as groups  # noqa: E402
from megatron_opd.mcore.experts import GroupedExperts  # noqa: E402
from megatron_opd.mcore.model import transformer_config  # noqa: E402
from megatron_opd.world import processes  # noqa: E402

HIDDEN, WIDTH, TOKENS, COUNTS = 256, 128, 2048, (8, 64)
SIDES = ("one by one", "grouped")


def architecture(count: int) -> Architecture:
    return Architecture(
        model_type="qwen3_moe",
        vocab_size=64,
        hidden_size=HIDDEN,
        num_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=WIDTH,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        tie_word_embeddings=False,
        qkv_bias=False,
        qk_norm=True,
        experts=Experts(count, 8, WIDTH, True),
    )


def measure(
    count: int, precision: str, parallel: groups.Parallel, repeat: int
) -> dict[str, list[float]]:
    """Side -> seconds."""
    torch.manual_seed(0)
    config = transformer_config(architecture(count), parallel, precision=precision)
    with parallel.active():
        one_by_one: Any = LocalSpecProvider().grouped_mlp_modules(True)(
            count, config, pg_collection=parallel.groups
        )
        grouped = GroupedExperts(count, config, parallel.groups)
    for name, linear in grouped.named_children():
        torch.nn.init.normal_(linear.weight, std=0.05)
        for expert, weight in zip(one_by_one.local_experts, linear.weight.detach(), strict=True):
            getattr(expert, name).weight.data.copy_(weight)
    x_TD = torch.randn(
        TOKENS, HIDDEN, dtype=config.params_dtype, device=parallel.device, requires_grad=True
    )
    grad_TD, probs_T = (
        torch.randn_like(x_TD),
        torch.rand(TOKENS, device=parallel.device, requires_grad=True),
    )
    tokens_per_expert = torch.randint(count, (TOKENS,)).bincount(minlength=count)

    def step(experts: torch.nn.Module) -> None:
        experts.zero_grad()
        experts(x_TD, tokens_per_expert, probs_T)[0].backward(grad_TD)
        if parallel.device.type == "cuda":
            torch.cuda.synchronize()

    both = [each.to(parallel.device) for each in (one_by_one, grouped)]
    return in_turn(
        {side: partial(step, each) for side, each in zip(SIDES, both, strict=True)}, repeat
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Grouped experts against experts one after the other."
    )
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks" / "results" / "experts.json"
    )
    arguments = parser.parse_args()
    processes.start()
    parallel = groups.create(LayoutConfig())
    table = Table(title=f"{TOKENS} tokens, forward and backward, {torch.get_num_threads()} threads")
    for column in ("experts", "", *(f"{side}, ms: min (max)" for side in SIDES), "ratio"):
        table.add_column(column, justify="right" if column else "left")
    results = []
    for count in COUNTS:
        for precision in ("float32", "bfloat16"):
            seconds = measure(count, precision, parallel, arguments.repeat)
            ratio = min(seconds["grouped"]) / min(seconds["one by one"])
            results.append(
                {"experts": count, "precision": precision, "seconds": seconds, "ratio": ratio}
            )
            times = [
                f"{1e3 * min(seconds[side]):.1f} ({1e3 * max(seconds[side]):.1f})" for side in SIDES
            ]
            table.add_row(str(count), precision, *times, f"{ratio:.2f}")
    processes.stop()
    report(
        table,
        {"device": str(parallel.device), "threads": torch.get_num_threads(), "rows": results},
        arguments.json,
    )


if __name__ == "__main__":
    main()
