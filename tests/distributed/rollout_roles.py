"""Run in four ranks by test_dedicated_rollouts.py: a student on two, engines on the other two.

The student is a transformers model, so that its own logprobs are at hand. Prints one line of JSON
from rank 0.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from megatron_opd.architectures.config import ModelConfig
from megatron_opd.contracts.sampling import Draw, Request, Sampling
from megatron_opd.errors import OpdError
from megatron_opd.recipe.data import DataConfig
from megatron_opd.recipe.keys import (
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
    TeacherConfig,
    TrainConfig,
)
from megatron_opd.refit.push import push
from megatron_opd.rollout.remote import RemoteEngine
from megatron_opd.rollout.single_turn import SingleTurn
from megatron_opd.rollout.vllm.engine import VllmEngine
from megatron_opd.tasks.tokenizer import load_tokenizer
from megatron_opd.world import processes
from megatron_opd.world.channel import Channel
from tests.distributed import test_layout_invariance as replayed
from tests.e2e import tiny_hf

STUDENT, ENGINES = 2, 2
FAILS_AT, LOST = 2, "model.layers.1.mlp.up_proj.weight"


def config_of(directory: str) -> RunConfig:
    return RunConfig(
        name="apart",
        num_steps=1,
        max_sequence_length=300,
        method=replayed.method_of("tgpo"),
        precision="float32",
        student=ModelConfig(directory),
        teacher=TeacherConfig(directory),
        data=DataConfig(""),
        train=TrainConfig(OptimizerConfig(lr=1e-2)),
        rollout=RolloutConfig(kv_cache_gib=0.0625, processes=ENGINES),
    )


def refusal(call: Any) -> str:
    try:
        call()
    except OpdError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def student(config: RunConfig) -> None:
    channel = processes.channel("rollout")
    assert channel is not None
    found: dict[str, Any] = {
        "too long": refusal(lambda: RemoteEngine(channel, replace(config, max_sequence_length=999)))
    }
    engine, model = RemoteEngine(channel, config), tiny_hf.build("qwen3", seed=0)
    tasks = tiny_hf.tasks(4, 9, 30, 140, 6)
    draw = Draw(seed=9, step=0, version=1, samples=2, max_tokens=16, temperature=1.0)
    sampler = SingleTurn(engine, load_tokenizer(config.student.path))
    generate = partial(sampler.sample, processes.share(tasks), draw)
    found["without weights"] = refusal(generate)
    start = time.perf_counter()
    report = push(tiny_hf.tensors(model), engine, 1)
    found |= {
        "refit seconds": time.perf_counter() - start,
        "tensors": report.tensors,
        "bytes": report.bytes,
    }
    first = generate()
    found["difference"] = max(
        float(np.abs(r.logprobs - tiny_hf.logprobs(model, r, 1.0, 1.0)).max()) for r in first
    )
    found["order"] = [(r.task.index, r.sample) for r in first] == [
        (task.index, sample) for task in processes.share(tasks) for sample in range(2)
    ]
    found["fails"] = refusal(generate)  # call FAILS_AT of the last engine
    engine.restart()
    found["restarted"] = refusal(generate)
    push(tiny_hf.tensors(model), engine, 1)
    again = generate()
    found["the same"] = all(
        np.array_equal(a.token_ids, b.token_ids)
        and np.array_equal(a.logprobs, b.logprobs)
        and a.text == b.text
        for a, b in zip(first, again, strict=True)
    )
    missing = (
        (name, tensor) for name, tensor in tiny_hf.tensors(model) if name != "model.norm.weight"
    )
    found["missing"] = refusal(lambda: push(missing, engine, 2))
    other = tiny_hf.build("qwen3", seed=1)
    found["lost"] = refusal(lambda: push(tiny_hf.tensors(other), engine, 2))
    found["unverified"] = refusal(
        lambda: sampler.sample(processes.share(tasks), replace(draw, version=2))
    )
    everyone = processes.gather_shares([found])
    if torch.distributed.get_rank() == 0:
        print(json.dumps(everyone), flush=True)


def spoil_the_last_engine() -> None:
    """It fails once while it samples; the third refit that goes through it loses a tensor on the
    way."""
    complete, tensors, samples, refits = (
        VllmEngine.complete,
        Channel.tensors,
        iter(range(99)),
        iter(range(99)),
    )

    def failing(self: VllmEngine, requests: list[Request], sampling: Sampling) -> Any:
        if self.policy_version == sampling.version and next(samples) + 1 == FAILS_AT:
            self._llm.llm_engine.step = partial(divmod, 1, 0)
        return complete(self, requests, sampling)

    def losing(self: Channel) -> Iterator[tuple[str, torch.Tensor]]:
        refit = next(refits)
        for name, tensor in tensors(self):
            yield name, (tensor * 1.01 if (refit, name) == (3, LOST) else tensor)

    VllmEngine.complete, Channel.tensors = failing, losing  # type: ignore[method-assign]


def main(directory: str) -> None:
    from megatron_opd.runs.roles import run_in_role

    if int(os.environ["RANK"]) == STUDENT + ENGINES - 1:
        spoil_the_last_engine()
    config = config_of(directory)
    run_in_role(config, partial(student, config))


if __name__ == "__main__":
    main(sys.argv[1])
