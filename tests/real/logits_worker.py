"""In every rank: logits_worker.py TP PP OUT_DIR MODEL_DIR; OUT_DIR/tokens.safetensors has the
tokens [B, S].

For both precisions: the logits, from the last stage, in OUT_DIR/TP-PP-PRECISION.safetensors.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_opd.architectures.architecture import read_architecture
from megatron_opd.architectures.config import LayoutConfig
from megatron_opd.mcore import parallel as process_groups
from megatron_opd.mcore.model import build_model
from megatron_opd.weights.load import load_hf
from megatron_opd.world import processes
from tests.distributed.weights_worker import logits_BSV

PRECISIONS = ("float32", "bfloat16")


@torch.no_grad()
def main(tp: int, pp: int, out_dir: Path, model_dir: Path) -> None:
    processes.start()
    parallel = process_groups.create(LayoutConfig(tp, pp))
    arch = read_architecture(model_dir)
    tokens_BS = load_file(out_dir / "tokens.safetensors")["tokens_BS"]
    for precision in PRECISIONS:
        chunks = build_model(arch, parallel, precision=precision)
        load_hf(chunks, model_dir, arch, parallel)
        logits = logits_BSV(chunks, arch, parallel, tokens_BS)
        if logits is not None and parallel.is_signal_source:
            save_file({"logits_BSV": logits}, out_dir / f"{tp}-{pp}-{precision}.safetensors")
    processes.stop()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
