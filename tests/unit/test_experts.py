"""Grouped experts compute what Megatron's experts compute one after the other, and store it under
the same names."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer.moe.experts import SequentialMLP

from megatron_opd.architectures.architecture import Architecture, Experts
from megatron_opd.architectures.config import LayoutConfig
from megatron_opd.mcore import parallel as groups
from megatron_opd.mcore.experts import GroupedExperts
from megatron_opd.mcore.model import transformer_config
from megatron_opd.world import processes

E, D, F = 5, 16, 24
COUNTS = {"uneven": [3, 0, 7, 1, 2], "one has all": [0, 0, 9, 0, 0], "none": [0] * E}
ARCH = Architecture(
    model_type="qwen3_moe",
    vocab_size=11,
    hidden_size=D,
    num_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    intermediate_size=12,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    tie_word_embeddings=False,
    qkv_bias=False,
    qk_norm=True,
    experts=Experts(E, 2, F, True),
)


@pytest.fixture(scope="module")
def parallel() -> Iterator[groups.Parallel]:
    processes.start()
    yield groups.create(LayoutConfig())
    processes.stop()


def build(parallel: groups.Parallel, precision: str) -> tuple[GroupedExperts, SequentialMLP]:
    """Of the same weights."""
    config = transformer_config(ARCH, parallel, precision=precision)
    with parallel.active():
        grouped = GroupedExperts(E, config, parallel.groups)
        one_by_one: Any = LocalSpecProvider().grouped_mlp_modules(True)(
            E, config, pg_collection=parallel.groups
        )
    torch.manual_seed(0)
    with torch.no_grad():
        for ours, theirs in zip(pairs(grouped), one_by_one.parameters(), strict=True):
            theirs.copy_(torch.randn_like(theirs) / 4)
            ours.copy_(theirs)
    return grouped, one_by_one


def pairs(grouped: GroupedExperts, grad: bool = False) -> list[torch.Tensor]:
    """Views of each expert's two weights, or of their gradients."""
    stacked = [
        linear.weight.grad if grad else linear.weight.detach() for linear in grouped.children()
    ]
    return [value for expert in zip(*stacked, strict=True) for value in expert]


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-6), ("bfloat16", 2**-8)])
def test_values_and_gradients_are_those_of_one_expert_after_the_other(
    parallel: groups.Parallel, precision: str, tolerance: float, counts: list[int]
) -> None:
    experts = build(parallel, precision)
    x_TD = torch.randn(sum(counts), D, dtype=next(experts[0].parameters()).dtype)
    probs_T, grad_TD = torch.rand(sum(counts)), torch.randn_like(x_TD)
    results = []
    for each in experts:
        x, probs = x_TD.clone().requires_grad_(), probs_T.clone().requires_grad_()
        out, bias = each(x, torch.tensor(counts), probs)
        assert bias is None and out.dtype == x.dtype
        out.backward(grad_TD)
        results.append([out, x.grad, probs.grad])
    ours, theirs = results
    ours += pairs(experts[0], grad=True)
    theirs += [parameter.grad for parameter in experts[1].parameters()]
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            got, torch.zeros_like(got) if want is None else want, atol=tolerance, rtol=tolerance
        )
    assert not sum(counts) or all(value.abs().max() > 0.1 for value in ours[:3])


def test_a_gradient_may_be_expanded(parallel: groups.Parallel) -> None:
    experts = build(parallel, "float32")
    for each in experts:
        each(torch.ones(3, D), torch.tensor([1, 0, 2, 0, 0]), torch.ones(3))[0].sum().backward()
    assert torch.equal(pairs(experts[0], grad=True)[0], next(experts[1].parameters()).grad)
    for each in experts:
        each(torch.ones(0, D), torch.zeros(E, dtype=torch.long), torch.ones(0))[0].sum().backward()


def test_checkpoints_are_those_of_one_expert_after_the_other(
    parallel: groups.Parallel, tmp_path: Path
) -> None:
    """Names, places, and that each loads what the other has saved."""
    grouped, one_by_one = build(parallel, "float32")
    stored = [described(parallel, each) for each in (grouped, one_by_one)]
    assert stored[0] == stored[1]
    assert len(stored[0]) == E * (3 + 2)  # gate, up and down; two empty states
    for source, target in ((grouped, one_by_one), (one_by_one, grouped)):
        directory = tmp_path / type(source).__name__
        directory.mkdir()
        with parallel.active(), torch.no_grad():
            dist_checkpointing.save(sharded(parallel, source), str(directory))
            before = [parameter.clone() for parameter in target.parameters()]
            for parameter in target.parameters():
                parameter.zero_()
            target.load_state_dict(
                dist_checkpointing.load(sharded(parallel, target), str(directory))
            )
        assert all(map(torch.equal, target.parameters(), before))


def sharded(
    parallel: groups.Parallel, experts: Any, layer: int = 0, layers: int = 1
) -> dict[str, Any]:
    return experts.sharded_state_dict(
        "", ((0, layer, layers),), {"dp_cp_group": parallel.groups.dp_cp}
    )


def described(parallel: groups.Parallel, experts: Any) -> set[tuple]:
    with parallel.active():
        state = sharded(parallel, experts, layer=1, layers=3)
        apply_factories(state)
    return {
        (
            type(each),
            each.key,
            each.global_shape,
            each.global_offset,
            each.replica_id,
            getattr(each, "dtype", None),
        )
        for each in nested_values(state)
    }
