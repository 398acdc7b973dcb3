"""In every rank: weights_worker.py TP PP OUT_DIR MODEL_DIR...; what it finds is left in OUT_DIR for
the test.

For every model: logits of fixed tokens (from the last stage), the exported directory, and from
every rank a checksum of each tensor that the refit's stream yields.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megatron_opd.architectures.architecture import Architecture, read_architecture
from megatron_opd.architectures.config import LayoutConfig
from megatron_opd.mcore import parallel as process_groups
from megatron_opd.mcore import passes
from megatron_opd.mcore.batch import MicroBatch
from megatron_opd.mcore.head import Head
from megatron_opd.mcore.model import build_model
from megatron_opd.mcore.packing import Packing
from megatron_opd.mcore.parallel import Parallel
from megatron_opd.weights.export import export_hf, iter_hf_tensors
from megatron_opd.weights.load import load_hf
from megatron_opd.world import processes

NUM_TOKENS = 12


def tokens_BS(vocab_size: int) -> torch.Tensor:
    return torch.randint(vocab_size, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(1))


def logits_BSV(
    chunks: list, arch: Architecture, parallel: Parallel, tokens: torch.Tensor
) -> torch.Tensor | None:
    """Unpadded logits of `tokens` [B, S], on every rank of the last stage."""
    every = torch.arange(tokens.numel())
    packing = Packing.of([tokens.shape[1]] * len(tokens), 1, 0, parallel.device)
    batch = MicroBatch(
        tokens.view(1, -1).to(parallel.device), packing, every.to(parallel.device), every
    )

    def keep(_: MicroBatch, head: Head) -> tuple[torch.Tensor, torch.Tensor]:
        return head.hidden_TD.sum() * 0, head.hidden_TD @ head.weight_VD.T

    outputs = passes.forward_backward(chunks, parallel, [batch], keep, forward_only=True)
    if not outputs:
        return None
    shards = [torch.empty_like(outputs[0]) for _ in range(parallel.tp_size)]
    dist.all_gather(shards, outputs[0].contiguous(), group=parallel.tp_group)
    return (
        torch.cat(shards, dim=-1)[:, : arch.vocab_size]
        .unflatten(0, tokens.shape)
        .contiguous()
        .cpu()
    )


@torch.no_grad()
def main(tp: int, pp: int, ep: int, etp: int, out_dir: Path, model_dirs: list[Path]) -> None:
    processes.start()
    parallel = process_groups.create(LayoutConfig(tp, pp, tp > 1 and ep * etp > 1, ep, etp))
    for model_dir in model_dirs:
        arch = read_architecture(model_dir)
        chunks = build_model(arch, parallel, precision="float32")
        # Megatron trains experts under tensor parallelism with sequence parallelism alone
        chunks[0].eval()
        for parameter in chunks[0].parameters():
            parameter.fill_(float("nan"))  # so that one left unfilled shows
        load_hf(chunks, model_dir, arch, parallel)

        logits = logits_BSV(chunks, arch, parallel, tokens_BS(arch.vocab_size))
        if logits is not None and parallel.is_signal_source and parallel.dp_rank == 0:
            save_file({"logits_BSV": logits}, out_dir / f"{model_dir.name}.safetensors")

        stream = iter_hf_tensors(chunks, arch, parallel)
        checksums = [
            [name, hashlib.sha256(t.cpu().numpy().tobytes()).hexdigest()] for name, t in stream
        ]
        (out_dir / f"{model_dir.name}-{dist.get_rank()}.json").write_text(json.dumps(checksums))

        export_hf(
            chunks, arch, parallel, model_dir, out_dir / model_dir.name, max_shard_bytes=60_000
        )
    dist.barrier()
    processes.stop()


if __name__ == "__main__":
    sizes, paths = map(int, sys.argv[1:5]), map(Path, sys.argv[5:])
    main(*sizes, next(paths), list(paths))
