"""Run in ranks by test_rollout_ranks.py: an engine in every rank, each generating its share of the
prompts.

Prints one line of JSON from rank 0.
"""

import json
import os
import sys
import time
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from megatron_opd.architectures.config import ModelConfig
from megatron_opd.contracts.rows import Row
from megatron_opd.contracts.sampling import Draw
from megatron_opd.recipe.keys import RolloutConfig
from megatron_opd.refit.push import push
from megatron_opd.rollout.single_turn import SingleTurn
from megatron_opd.rollout.vllm.engine import VllmEngine
from megatron_opd.tasks.tokenizer import load_tokenizer
from tests.e2e import tiny_hf


def gathered(rows: list[Row]) -> list[Row]:
    everyone: list[list[Row]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, rows)
    return [row for share in everyone for row in share]


def largest_difference(split: list[Row], together: list[Row]) -> float:
    assert [(r.task.index, r.sample) for r in split] == [(r.task.index, r.sample) for r in together]
    assert [r.token_ids.tolist() for r in split] == [r.token_ids.tolist() for r in together]
    return max(
        float(np.abs(a.logprobs - b.logprobs).max()) for a, b in zip(split, together, strict=True)
    )


def main(directory: str) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    trainer_group = dist.new_group(list(range(world)))
    kept = {name: os.environ.get(name) for name in ("LOCAL_WORLD_SIZE", "LD_PRELOAD")}
    start = time.perf_counter()
    engine = VllmEngine(
        ModelConfig(directory),
        RolloutConfig(kv_cache_gib=0.0625),
        precision="float32",
        max_sequence_length=300,
        seed=0,
    )
    seconds = time.perf_counter() - start
    assert {name: os.environ.get(name) for name in kept} == kept

    tasks = tiny_hf.tasks(*range(4, 4 + 2 * world), 140, 150)
    share = [list(part) for part in np.array_split(np.arange(len(tasks)), world)][rank]
    sampler = SingleTurn(engine, load_tokenizer(directory))
    differences = []
    model = tiny_hf.build("qwen3", seed=0)
    for version in range(2):
        if version:
            model = tiny_hf.build("qwen3", seed=1)
            push(tiny_hf.tensors(model), engine, version)
        draw = Draw(
            seed=9, step=version, version=version, samples=2, max_tokens=16, temperature=1.0
        )
        generate = partial(sampler.sample, draw=draw)
        split = generate([tasks[i] for i in share])
        differences.append(largest_difference(gathered(split), generate(tasks)))
        differences += [
            float(np.abs(r.logprobs - tiny_hf.logprobs(model, r, 1.0, 1.0)).max()) for r in split
        ]

    engine.restart()  # an engine that has failed, on every rank
    push(tiny_hf.tensors(model), engine, 1)
    differences.append(largest_difference(generate([tasks[i] for i in share]), split))
    engine.close()
    total = torch.tensor(float(rank))
    dist.all_reduce(total, group=trainer_group)
    dist.all_reduce(total)
    # the trainer's groups outlive the engine
    assert total.item() == world * world * (world - 1) / 2
    if rank == 0:
        print(json.dumps({"difference": max(differences), "start_seconds": seconds}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
