"""The vocabulary op against what else computes it: time, peak memory, collectives, share of the
memory bandwidth.

    python benchmarks/vocab_parallel.py [--repeat 5]

On a machine without CUDA: T x V of 1024 x {32768, 151936} on one rank and on two over gloo. With
CUDA: T of 4096 to 32768 at V = 151936. Every figure is of forward and backward together, the
minimum and the spread of `--repeat` runs; the two sides of a ratio alternate within one process.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_opd.mcore.host import prepare_platform  # noqa: E402
from megatron_opd.vocab_parallel import linear_logprobs, logprobs  # noqa: E402
from megatron_opd.world.device import backend, choice, device  # noqa: E402
from tests.unit.live_bytes import LiveBytes  # noqa: E402

HIDDEN = 64
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


# ---------------------------------------------------------------------------------- the contestants
def ours(logits_TV: Tensor, ids_TK: Tensor, group: Any) -> Tensor:
    out_TK, entropy_T = logprobs(logits_TV, ids_TK, group, with_entropy=True)
    return out_TK.sum() + entropy_T.sum()


def ours_in_place(logits_TV: Tensor, ids_TK: Tensor, group: Any) -> Tensor:
    out_TK, entropy_T = logprobs(
        logits_TV, ids_TK, group, with_entropy=True, reuse_logits_for_grad=True
    )
    return out_TK.sum() + entropy_T.sum()


def ours_without_entropy(logits_TV: Tensor, ids_TK: Tensor, group: Any) -> Tensor:
    return logprobs(logits_TV, ids_TK, group).sum()  # type: ignore[union-attr]


def ours_in_place_without_entropy(logits_TV: Tensor, ids_TK: Tensor, group: Any) -> Tensor:
    return logprobs(logits_TV, ids_TK, group, reuse_logits_for_grad=True).sum()  # type: ignore[union-attr]


def dense_torch(logits_TV: Tensor, ids_TK: Tensor, group: Any) -> Tensor:
    log_p_TV = logits_TV.float().log_softmax(dim=1)
    return log_p_TV.gather(1, ids_TK).sum() - (log_p_TV.exp() * log_p_TV).sum()


def megatron(logits_TV: Tensor, ids_TK: Tensor, group: Any) -> Tensor:
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    return -vocab_parallel_cross_entropy(logits_TV[:, None], ids_TK, tp_group=group).sum()


def megatron_fused(logits_TV: Tensor, ids_TK: Tensor, group: Any) -> Tensor:
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    return -fused_vocab_parallel_cross_entropy(logits_TV[:, None], ids_TK, group).sum()


Contestant = Callable[[Tensor, Tensor, Any], Tensor]
WITH_ENTROPY: dict[str, Contestant] = {
    "ours": ours,
    "ours, in place": ours_in_place,
    "dense torch": dense_torch,
}
WITHOUT: dict[str, Contestant] = {
    "ours, no entropy": ours_without_entropy,
    # what megatron-core does to float32 logits
    "ours, no entropy, in place": ours_in_place_without_entropy,
    "megatron-core": megatron,
    "megatron-core, fused": megatron_fused,
}


# ---------------------------------------------------------------------------------------- measuring
def measure(
    tokens: int, vocab: int, k: int, dtype: torch.dtype, group: Any, repeat: int
) -> dict[str, Any]:
    """name -> seconds, live bytes per logit, collectives. The logits are made anew for each run,
    outside the clock."""
    width = vocab // group.size()
    contestants = dict(WITH_ENTROPY)
    if k == 1:
        contestants |= WITHOUT
    if group.size() > 1:
        contestants.pop("dense torch")
    torch.manual_seed(0)
    ids_TK = torch.randint(0, vocab, (tokens, k), device=device())
    source = torch.randn(tokens, width, device=device()).to(dtype)
    runs: dict[str, Callable[[], tuple[float, float, int]]] = {}
    for name, contestant in contestants.items():
        runs[name] = lambda contestant=contestant: once_logits(contestant, source, ids_TK, group)  # type: ignore[misc]
    if dtype == torch.bfloat16 and not on_gpu():
        # Half a minute per run where the host has no bfloat16 matrix unit, all of it in the matrix
        # product.
        return _timed_in_turn(runs, tokens * width, repeat)
    hidden_TD = torch.randn(tokens, HIDDEN, device=device()).to(dtype)
    weight_VD = torch.randn(width, HIDDEN, device=device()).to(dtype)
    runs["output layer, then ours"] = lambda: once_linear(
        False, hidden_TD, weight_VD, ids_TK, group
    )
    runs["ours, output layer fused"] = lambda: once_linear(
        True, hidden_TD, weight_VD, ids_TK, group
    )
    return _timed_in_turn(runs, tokens * width, repeat)


def _timed_in_turn(
    runs: dict[str, Callable[[], tuple[float, float, int]]], logits: int, repeat: int
) -> dict[str, Any]:
    """Without those that the device's memory does not hold."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    facts: dict[str, tuple[float, int]] = {}
    for _ in range(repeat + 1):  # the first warms up
        for name, run in runs.items():
            if name not in seconds:
                continue
            try:
                elapsed, peak, collectives = run()
            except torch.OutOfMemoryError:
                print(f"left out, its {logits:,} logits do not fit: {name}", flush=True)
                del seconds[name]
                continue
            seconds[name].append(elapsed)
            facts[name] = (peak / logits, collectives)
    return {
        name: {
            "seconds_min": min(times[1:]),
            "seconds_median": median(times[1:]),
            "seconds_max": max(times[1:]),
            "bytes_per_logit": facts[name][0],
            "collectives": facts[name][1],
        }
        for name, times in seconds.items()
    }


def once_logits(
    contestant: Contestant, source: Tensor, ids_TK: Tensor, group: Any
) -> tuple[float, float, int]:
    def call(count: bool) -> tuple[float, float, int]:
        logits_TV = source.clone().requires_grad_()
        return timed(
            lambda: contestant(logits_TV, ids_TK, group).backward(), count, logits_TV, ids_TK
        )

    return call(False)[0], *call(True)[1:]


def once_linear(
    fused: bool, hidden: Tensor, weight: Tensor, ids_TK: Tensor, group: Any
) -> tuple[float, float, int]:
    def call(count: bool) -> tuple[float, float, int]:
        hidden_TD, weight_VD = hidden.clone().requires_grad_(), weight.clone().requires_grad_()

        def run() -> None:
            if fused:
                out = linear_logprobs(
                    hidden_TD,
                    weight_VD,
                    ids_TK,
                    group,
                    with_entropy=True,
                    slab_tokens=max(1, len(hidden) // 8),
                )
            else:
                out = logprobs(
                    hidden_TD @ weight_VD.T,
                    ids_TK,
                    group,
                    with_entropy=True,
                    reuse_logits_for_grad=True,
                )
            (out[0].sum() + out[1].sum()).backward()

        return timed(run, count, hidden_TD, weight_VD, ids_TK)

    return call(False)[0], *call(True)[1:]


def timed(run: Callable[[], None], count: bool, *held: Tensor) -> tuple[float, float, int]:
    """(seconds, peak of live bytes, collectives): counting slows a run down, so either the first or
    the others."""
    synchronise()
    if not count:
        start = time.perf_counter()
        run()
        synchronise()
        return time.perf_counter() - start, 0.0, 0
    collectives = [0]
    originals = {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}
    for name, original in originals.items():
        setattr(dist, name, _counted(original, collectives))
    try:
        with LiveBytes() as live:
            live.ignore(*held)
            run()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return 0.0, float(live.peak), collectives[0]


def _counted(original: Callable[..., Any], counter: list[int]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        counter[0] += 1
        return original(*args, **kwargs)

    return call


def on_gpu() -> bool:
    return choice().kind == "cuda"


def synchronise() -> None:
    if on_gpu():
        torch.cuda.synchronize()


def copy_bandwidth(repeat: int = 10) -> float:
    """Bytes per second, read and written, of a copy that fits no cache."""
    source = torch.empty(2**28 if on_gpu() else 2**26, device=device()).normal_()
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(repeat):
        synchronise()
        start = time.perf_counter()
        target.copy_(source)
        synchronise()
        best = max(best, 2 * source.nbytes / (time.perf_counter() - start))
    return best


# ------------------------------------------------------------------------------------- the programs
def main() -> None:
    parser = argparse.ArgumentParser(description="The vocabulary op, measured.")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks" / "results" / "vocab_parallel.json"
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", help="default: 1024; with CUDA 4096 8192 16384 32768"
    )
    parser.add_argument(
        "--vocab", type=int, nargs="+", help="default: 32768 151936; with CUDA 151936"
    )
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments)
        return
    results: list[dict[str, Any]] = []
    for ranks in (1,) if on_gpu() else (1, 2):
        part = arguments.json.with_suffix(f".tp{ranks}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc-per-node={ranks}",
            "--standalone",
        ]
        threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // ranks))}
        command = [*torchrun, __file__, *sys.argv[1:], "--worker", str(part)]
        subprocess.run(command, check=True, env=os.environ | threads)
        results += json.loads(part.read_text())
        part.unlink()
    show(results)
    where = (
        torch.cuda.get_device_name() if on_gpu() else f"{len(os.sched_getaffinity(0))} CPU cores"
    )
    arguments.json.write_text(
        json.dumps({"machine": where, "torch": torch.__version__, "results": results}, indent=1)
    )
    print(f"wrote {arguments.json}")


def worker(arguments: argparse.Namespace) -> None:
    prepare_platform()
    dist.init_process_group(backend())
    group = dist.group.WORLD
    assert group is not None
    gpu = on_gpu()
    bandwidth = copy_bandwidth()
    results = []
    for vocab in arguments.vocab or ([151936] if gpu else [32768, 151936]):
        for tokens in arguments.tokens or ([4096, 8192, 16384, 32768] if gpu else [1024]):
            for k in (1, 66):
                for name, dtype in DTYPES.items():
                    case = {
                        "tp": group.size(),
                        "tokens": tokens,
                        "vocab": vocab,
                        "k": k,
                        "dtype": name,
                    }
                    try:
                        rows = measure(tokens, vocab, k, dtype, group, arguments.repeat)
                    except torch.OutOfMemoryError:  # the logits alone, before any implementation
                        print(f"left out, the logits do not fit: {case}", flush=True)
                        continue
                    least = 3 * dtype.itemsize * tokens * vocab / group.size()  # read, read, write
                    for row in rows.values():
                        row["share_of_bandwidth"] = least / row["seconds_min"] / bandwidth
                    results.append({**case, "copy_bytes_per_second": bandwidth, "rows": rows})
                    if dist.get_rank() == 0:
                        print(f"measured {case}", flush=True)
    if dist.get_rank() == 0:
        arguments.worker.write_text(json.dumps(results))
    dist.destroy_process_group()


def show(results: list[dict[str, Any]]) -> None:
    table = Table(title="Forward and backward")
    for column in (
        "TP",
        "T x V",
        "K",
        "dtype",
        "implementation",
        "ms: min (max)",
        "ours / it",
        "bytes per logit",
        "collectives",
        "of copy bandwidth",
    ):
        table.add_column(column, justify="left" if column == "implementation" else "right")
    for case in results:
        for name, row in case["rows"].items():
            base = "ours, no entropy, in place" if name.startswith("megatron") else "ours"
            linear = "output layer" in name
            compared = base in case["rows"] and not linear and not name.startswith("ours")
            ratio = (
                f"{case['rows'][base]['seconds_min'] / row['seconds_min']:.2f}" if compared else ""
            )
            table.add_row(
                str(case["tp"]),
                f"{case['tokens']} x {case['vocab']}",
                str(case["k"]),
                case["dtype"],
                name,
                f"{1e3 * row['seconds_min']:.0f} ({1e3 * row['seconds_max']:.0f})",
                ratio,
                f"{row['bytes_per_logit']:.2f}",
                str(row["collectives"]),
                "" if linear else f"{row['share_of_bandwidth']:.0%}",
            )
        table.add_section()
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
