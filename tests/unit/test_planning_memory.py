"""The planner's formulas against what real layers keep, and its peak of a training step against a
measured one."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from megatron_opd.architectures.architecture import Architecture, Experts, parse_architecture
from megatron_opd.architectures.config import LayoutConfig
from megatron_opd.architectures.known import TABLE
from megatron_opd.contracts.rows import Row
from megatron_opd.contracts.signals import Signals
from megatron_opd.mcore import parallel as groups
from megatron_opd.mcore.model import DTYPES, build_model
from megatron_opd.mcore.packing import Packing
from megatron_opd.mcore.parallel import Parallel
from megatron_opd.methods.catalogue import CATALOGUE
from megatron_opd.objective.batch import Batch
from megatron_opd.objective.columns import build_columns
from megatron_opd.objective.loss import Objective
from megatron_opd.planning import activations
from megatron_opd.planning.activations import FullMicroBatch
from megatron_opd.planning.case import Case
from megatron_opd.planning.hardware import hardware
from megatron_opd.planning.memory import RankKind, rank_kinds
from megatron_opd.planning.states import stages, world_of_one
from megatron_opd.planning.step_time import work
from megatron_opd.recipe.keys import RolloutConfig, RunConfig
from megatron_opd.trainer.step import update
from megatron_opd.trainer.student import prepare
from tests.rows import row, task
from tests.tiny_config import tiny_config
from tests.unit.live_bytes import LiveBytes

QWEN3 = Architecture(
    "qwen3",
    vocab_size=512,
    hidden_size=64,
    num_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=16,
    intermediate_size=192,
    max_position_embeddings=4096,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    tie_word_embeddings=False,
    qkv_bias=False,
    qk_norm=True,
)
QWEN2 = replace(QWEN3, model_type="qwen2", qkv_bias=True, qk_norm=False)
EXPERTS = replace(
    QWEN3, experts=Experts(count=8, per_token=4, intermediate_size=48, normalise_top=True)
)

NOT_NORMALISED = replace(
    QWEN3, experts=Experts(count=8, per_token=4, intermediate_size=48, normalise_top=False)
)
SEQUENCES, LENGTH = 4, 128


@contextmanager
def model(
    arch: Architecture,
    layout: LayoutConfig | None = None,
    precision: str = "float32",
    recompute: str = "none",
) -> Iterator[tuple[list[Any], Parallel]]:
    """A model with random weights; the other ranks of `layout` are not there, and collectives
    return at once."""
    layout = layout or LayoutConfig()
    size = layout.model_parallel_size
    with world_of_one(size - 1, size):
        parallel = groups.create(layout)
        chunks = build_model(arch, parallel, precision=precision, recompute=recompute)
        for parameter in chunks[0].parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        yield chunks, parallel


def micro_batch(
    arch: Architecture,
    layout: LayoutConfig | None = None,
    precision: str = "float32",
    predicted: int = LENGTH,
) -> FullMicroBatch:
    element = DTYPES[precision].itemsize
    return FullMicroBatch(
        arch, layout or LayoutConfig(), element, False, SEQUENCES * LENGTH, SEQUENCES * predicted
    )


def hidden_states(chunk: Any, parallel: Parallel) -> None:
    ids = torch.arange(SEQUENCES * LENGTH)[None]  # all others, so that experts have equal shares
    ranks = parallel.cp_size
    packing = Packing.of([LENGTH * ranks] * SEQUENCES, ranks, parallel.cp_rank, ids.device)
    with parallel.active():
        chunk(
            ids,
            ids,
            None,
            packed_seq_params=packing,
            output_processor=lambda hidden_states, **_: hidden_states,
        )


# -------------------------------------------------------------------------------------- activations
def saved_bytes(chunk: Any, parallel: Parallel) -> int:
    """Of the storages that a forward pass keeps for its backward pass, parameters apart."""
    parameters = {each.untyped_storage().data_ptr() for each in chunk.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # holding them keeps addresses from being used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden_states(chunk, parallel)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "layout", [LayoutConfig(), LayoutConfig(2), LayoutConfig(2, sequence_parallel=True)], ids=str
)
@pytest.mark.parametrize(
    "arch",
    [QWEN2, QWEN3, replace(QWEN3, num_key_value_heads=8), EXPERTS, NOT_NORMALISED],
    ids=["qwen2", "qwen3", "mha", "experts", "not normalised"],
)
def test_layers_keep_what_the_formula_says(
    arch: Architecture, layout: LayoutConfig, precision: str
) -> None:
    if arch.experts and layout == LayoutConfig(2):
        pytest.skip("experts are not trained with tensor parallelism alone")
    kept = []
    for num_layers in (1, 3):
        with model(replace(arch, num_layers=num_layers), layout, precision) as ((chunk,), parallel):
            kept.append(saved_bytes(chunk, parallel))
    assert kept[1] - kept[0] == 2 * activations.layer_saved(micro_batch(arch, layout, precision))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("arch", [QWEN2, QWEN3, EXPERTS], ids=["qwen2", "qwen3", "experts"])
def test_layers_of_a_part_of_each_sequence_keep_about_as_much(
    arch: Architecture, ranks: int
) -> None:
    """The last rank, whose two chunks meet as many keys as any rank's; the host fills up runs and
    keeps a mask."""
    kept, layout = [], LayoutConfig(context_parallel_size=ranks)
    for num_layers in (1, 3):
        with model(replace(arch, num_layers=num_layers), layout) as ((chunk,), parallel):
            kept.append(saved_bytes(chunk, parallel))
    assert kept[1] - kept[0] == pytest.approx(
        2 * activations.layer_saved(micro_batch(arch, layout)), rel=0.1
    )


@pytest.mark.parametrize(
    "layout", [LayoutConfig(), LayoutConfig(2, sequence_parallel=True)], ids=str
)
@pytest.mark.parametrize("granularity", ["selective", "full"])
@pytest.mark.parametrize("arch", [QWEN3, EXPERTS], ids=["qwen3", "experts"])
def test_what_is_computed_again_is_not_kept(
    arch: Architecture, granularity: str, layout: LayoutConfig
) -> None:
    kept = []
    for num_layers in (1, 3):
        with model(replace(arch, num_layers=num_layers), layout, recompute=granularity) as (
            (chunk,),
            parallel,
        ):
            kept.append(saved_bytes(chunk, parallel))
    batch = micro_batch(arch, layout)
    assert kept[1] - kept[0] == 2 * (
        activations.layer_saved(batch) - activations.recomputed(batch, granularity)
    )


@pytest.mark.parametrize(
    "arch",
    [QWEN2, replace(QWEN3, intermediate_size=64), EXPERTS],
    ids=["mlp", "attention", "experts"],
)
def test_a_forward_pass_needs_what_the_formula_says(arch: Architecture) -> None:
    with model(arch) as ((chunk,), parallel), torch.no_grad(), LiveBytes() as live:
        live.ignore(*chunk.parameters())
        hidden_states(chunk, parallel)
        hidden_states(chunk, parallel)  # the layers hold something of the pass before
    batch = micro_batch(arch)
    planned = activations.forward(batch) + arch.num_layers * activations.routing(batch)
    assert planned == pytest.approx(live.peak, rel=0.05)


# ---------------------------------------------------------------------------------- a training step
def recipe(
    *,
    fused: bool,
    predicted: int,
    layout: LayoutConfig | None = None,
    precision: Any = "float32",
    sequences: int = SEQUENCES,
) -> RunConfig:
    return tiny_config(
        1e-3,
        layout,
        max_sequence_length=LENGTH,
        method=CATALOGUE["grpo"].method,
        precision=precision,
        rollout=RolloutConfig(num_prompts=4, samples_per_prompt=2, max_completion_tokens=predicted),
        micro_batch_tokens=sequences * LENGTH,
        fused_output_layer=fused,
    )


def measured_peak(arch: Architecture, config: RunConfig) -> int:
    recompute = config.train.recompute_granularity
    with model(arch, config.student.layout, config.precision, recompute) as (chunks, parallel):
        return peak_of_update(chunks, parallel, arch, config)


def full_rows(vocab_size: int, completion: int) -> list[Row]:
    """Eight of LENGTH tokens, two of each prompt."""
    draw = partial(np.random.default_rng(0).integers, 0, vocab_size, dtype=np.int32)
    return [
        row(
            of=task(i // 2, prompt_ids=draw(LENGTH - completion)),
            token_ids=draw(completion),
            sample=i % 2,
            group=i // 2,
            reward=float(i % 2),
            logprobs=-6,
        )
        for i in range(8)
    ]


def peak_of_update(
    chunks: list[Any], parallel: Parallel, arch: Architecture, config: RunConfig
) -> int:
    """Live bytes of a whole update of `train.step`, with everything the trainer holds."""
    completion = config.rollout.max_completion_tokens
    rows = full_rows(arch.vocab_size, completion)
    batch = Batch(rows, Signals(None), seed=0, step=0, max_completion_tokens=completion)
    columns = build_columns(config.method, batch)
    student = prepare(chunks, arch, parallel, config)
    objective = Objective(config.method, arch.vocab_size, 1.0)
    settings: dict[str, Any] = {"step": 0, "micro_batch_tokens": config.train.micro_batch_tokens}
    update(student, rows, columns, objective, **settings)  # the moments exist from here on
    optimizers = [each.optimizer for each in student.optimizer.chained_optimizers]  # type: ignore[attr-defined]
    state = [
        each for inner in optimizers for group in inner.param_groups for each in group["params"]
    ]
    state += [each for inner in optimizers for of in inner.state.values() for each in of.values()]
    buffers = [*student.chunks[0].buffers, *student.chunks[0].expert_parallel_buffers]
    gradients = [buffer.grad_data for buffer in buffers]
    tensors = [*chunks[0].parameters(), *gradients, *state]
    held = {each.untyped_storage().data_ptr(): each for each in tensors}.values()
    with LiveBytes() as live:
        live.ignore(*held)
        update(student, rows, columns, objective, **settings)
    return live.peak + sum(each.untyped_storage().nbytes() for each in held)


@pytest.mark.parametrize(
    ("arch", "fused", "predicted"),
    [
        (QWEN3, False, 100),
        (QWEN2, True, 100),
        (replace(QWEN2, vocab_size=4096, tie_word_embeddings=True), False, 64),
        (replace(QWEN3, vocab_size=4096), True, 64),
        # the peak is in the layers
        (replace(QWEN3, vocab_size=64, intermediate_size=512, num_layers=4), False, 8),
        (EXPERTS, True, 100),
        (replace(EXPERTS, vocab_size=64, hidden_size=128), False, 8),
    ],
    ids=["logits", "fused", "tied", "fused large", "layers", "experts", "experts wide"],
)
def test_the_peak_of_a_training_step_is_within_a_tenth(
    arch: Architecture, fused: bool, predicted: int
) -> None:
    assert_peak(arch, recipe(fused=fused, predicted=predicted))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "layout", [LayoutConfig(2), LayoutConfig(2, sequence_parallel=True)], ids=["tp", "sp"]
)
@pytest.mark.parametrize("arch", [QWEN3, EXPERTS], ids=["dense", "experts"])
def test_so_is_that_of_a_shard(arch: Architecture, layout: LayoutConfig, precision: str) -> None:
    """One of two tensor-parallel ranks; what it would receive from the other has the size, not the
    values."""
    if arch.experts and not layout.sequence_parallel:
        pytest.skip("experts are not trained with tensor parallelism alone")
    assert_peak(arch, recipe(fused=True, predicted=100, layout=layout, precision=precision))


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_so_is_that_of_experts_computed_again(recompute: str) -> None:
    config = recipe(fused=True, predicted=8)
    assert_peak(
        EXPERTS, replace(config, train=replace(config.train, recompute_granularity=recompute))
    )


def assert_peak(arch: Architecture, config: RunConfig) -> None:
    gpus = config.student.layout.tensor_model_parallel_size
    (kind,) = rank_kinds(Case(config, {"student": arch}, hardware("cpu", gpus), gpus, gpus))
    assert_within_a_tenth(kind, measured_peak(arch, config))


def assert_within_a_tenth(kind: RankKind, measured: int) -> None:
    items = kind.phases["train"]
    planned = kind.total("train") - items["engine"] - items["KV cache"]
    states = items["parameters"] + items["gradients"] + items["optimizer"]
    assert planned == pytest.approx(measured, rel=0.1)
    # Of which what comes on top of the states is right too.
    assert planned - states == pytest.approx(measured - states, rel=0.1)


# --------------------------------------------------------------------------------------- parameters
def table() -> dict[str, Architecture]:
    return {
        name: parse_architecture(sizes, TABLE)
        for name, sizes in json.loads(TABLE.read_text()).items()
    }


# Parameters in all, in billions, as the models' cards say.
PUBLISHED = {
    "Qwen2.5-Math-7B": 7.61,
    "Qwen2.5-Math-1.5B": 1.54,
    "Qwen3-8B": 8.2,
    "Qwen3-30B-A3B": 30.5,
    "Qwen2.5-0.5B-Instruct": 0.49,
    "Qwen2.5-1.5B-Instruct": 1.54,
    "Qwen2.5-14B-Instruct": 14.8,  # its card says 14.7
    "Qwen2.5-32B-Instruct": 32.8,  # its card says 32.5
    "Qwen3-0.6B": 0.6,
    "Qwen3-4B": 4.0,
    "Qwen3-14B": 14.8,
    "Qwen3-32B": 32.8,
    "Llama-3.2-1B-Instruct": 1.24,
    "Llama-3.2-3B-Instruct": 3.21,
    "Llama-3.1-8B-Instruct": 8.03,
    "Mistral-7B-Instruct-v0.3": 7.25,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name: str) -> None:
    digits = len(str(PUBLISHED[name]).partition(".")[2])
    (whole,) = stages(table()[name], LayoutConfig(), "bfloat16")
    assert abs(whole.num_bytes / 2 / 1e9 - PUBLISHED[name]) <= 10**-digits


def test_a_token_meets_as_many_parameters_as_published() -> None:
    arch = table()["Qwen3-30B-A3B"]
    counted = work(arch)
    embedding = arch.vocab_size * arch.hidden_size
    in_all = counted.layers + counted.experts + counted.head + embedding
    assert in_all / 1e9 == pytest.approx(3.3, abs=0.06)  # the card's figure; it is 3.35


@pytest.mark.parametrize(
    ("arch", "layout"),
    [
        (table()["Qwen3-30B-A3B"], LayoutConfig(4, 2, expert_model_parallel_size=8)),
        (replace(QWEN2, num_layers=8, tie_word_embeddings=True), LayoutConfig(2, 4)),
    ],
    ids=["experts", "tied"],
)
def test_a_stage_of_equal_layers_is_the_stage(arch: Architecture, layout: LayoutConfig) -> None:
    """The planner builds one layer; here all are built."""
    per_stage = max(layout.tensor_model_parallel_size, layout.expert_model_parallel_size)
    for index, stage in enumerate(stages(arch, layout, "bfloat16")):
        world = per_stage * layout.pipeline_model_parallel_size
        with world_of_one(index * per_stage, world), torch.device("meta"):
            parallel = replace(groups.create(layout), device=torch.device("meta"))
            (chunk,) = build_model(arch, parallel, precision="bfloat16")
        marks = ("allreduce", "shared_embedding")
        facts = [
            [
                (each.shape, each.dtype, *(getattr(each, mark, None) for mark in marks))
                for each in parameters
            ]
            for parameters in (stage.parameters, chunk.parameters())
        ]
        assert facts[0] == facts[1]
