"""`megatron-opd convert` against copying the same files: time in both directions, and resident
memory.

    python benchmarks/convert.py [--repeat 5] [--gigabytes 2]

A generated Qwen3 directory in bfloat16, its files in the page cache. A copy is `cp -r` and an fsync
of every file and directory it made. Conversion and copy take turns, in processes of their own; the
time of a conversion is that of the call, and that of the whole command with its imports is given
beside it; processor time tells what other work on the machine does to the wall clock. Resident
memory is the peak (VmHWM) of the process of a conversion; the goal is twice the largest tensor and
1 GB.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

GOAL = 1.5  # times the copy
CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 65536,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 6144,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}

CONVERT = """
import json, sys, time
begin = time.perf_counter()
from megatron_opd.conversion import convert
start, cpu = time.perf_counter(), time.process_time()
convert.convert(sys.argv[1], sys.argv[2])
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
(peak,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
figures = {"seconds": seconds, "cpu_seconds": cpu, "with_imports": time.perf_counter() - begin}
print(json.dumps(figures | {"peak_bytes": int(peak.split()[1]) * 1024}))
"""


def write_source(directory: Path, gigabytes: float) -> int:
    """Returns the bytes of the largest tensor."""
    import torch

    from megatron_opd.architectures.architecture import read_architecture
    from megatron_opd.weights.hf import write_hf
    from megatron_opd.weights.table import hf_shapes, weight_table

    description = directory.with_name("description")
    description.mkdir()

    def shapes_of(layers: int) -> dict[str, tuple[int, ...]]:
        (description / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
        return hf_shapes(weight_table(read_architecture(description)))

    def size(layers: int) -> int:
        return 2 * sum(torch.Size(shape).numel() for shape in shapes_of(layers).values())

    layers = max(1, round((gigabytes * 1e9 - size(0)) / (size(1) - size(0))))
    shapes = shapes_of(layers)
    tensors = ((name, torch.randn(shape, dtype=torch.bfloat16)) for name, shape in shapes.items())
    write_hf(directory, description, tensors, shapes, torch.bfloat16, 10**9)
    return 2 * max(torch.Size(shape).numel() for shape in shapes.values())


def converted(source: Path, out: Path) -> dict[str, float]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, "-c", CONVERT, str(source), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def copied(source: Path, out: Path) -> dict[str, float]:
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(["cp", "-r", str(source), str(out)], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    for path in [*out.rglob("*"), out]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.perf_counter() - start, "cpu_seconds": cpu}


def build(root: Path, repeat: int, gigabytes: float) -> dict[str, Any]:
    hf, megatron = root / "hf", root / "megatron"
    largest = write_source(hf, gigabytes)
    converted(hf, megatron)
    results: dict[str, Any] = {
        "largest_tensor_bytes": largest,
        "cores": len(os.sched_getaffinity(0)),
        "directions": {},
    }
    for name, source in (("Hugging Face to Megatron", hf), ("Megatron to Hugging Face", megatron)):
        rows: dict[str, list[dict[str, float]]] = {"convert": [], "copy": []}
        for _ in range(repeat):
            for side, work in (("copy", copied), ("convert", converted)):
                out = root / "out"
                rows[side].append(work(source, out))
                shutil.rmtree(out)
                os.sync()
        size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
        ratios = [
            a["seconds"] / b["seconds"] for a, b in zip(rows["convert"], rows["copy"], strict=True)
        ]
        results["directions"][name] = {"bytes": size, **rows, "ratios": ratios}
    return results


def spread(values: list[float], digits: int = 2) -> str:
    median, least, most = (
        f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values))
    )
    return f"{median} ({least} to {most})"


def show(results: dict[str, Any]) -> None:
    limit = 2 * results["largest_tensor_bytes"] + 10**9
    table = Table(title=f"convert and cp + fsync, {results['cores']} cores: median (least to most)")
    headings = [
        "cp + fsync, s",
        "CPU s",
        "convert, s",
        "CPU s",
        "with imports, s",
        f"ratio (goal {GOAL})",
        "peak memory",
    ]
    for column in ("", "GB", *headings):
        table.add_column(column, justify="right" if column else "left")
    for name, row in results["directions"].items():
        sides = {
            side: {key: [each[key] for each in row[side]] for key in row[side][0]}
            for side in ("copy", "convert")
        }
        copy, conversion = sides["copy"], sides["convert"]
        peak = max(each["peak_bytes"] for each in row["convert"])
        table.add_row(
            name,
            f"{row['bytes'] / 1e9:.2f}",
            spread(copy["seconds"]),
            spread(copy["cpu_seconds"], 1),
            spread(conversion["seconds"]),
            spread(conversion["cpu_seconds"], 1),
            spread(conversion["with_imports"], 1),
            spread(row["ratios"]),
            f"{peak / 1e9:.2f} of {limit / 1e9:.2f} GB",
        )
    Console(width=210).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Conversion against a copy of the same files.")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument(
        "--directory", type=Path, help="where to write; default: the system's temporary directory"
    )
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks" / "results" / "convert.json"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        results = build(Path(directory), arguments.repeat, arguments.gigabytes)
    show(results)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(results, indent=1))
    print(f"wrote {arguments.json}")


if __name__ == "__main__":
    main()
