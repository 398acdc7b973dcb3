"""Frozen weights that wait in host memory."""

import pytest
import torch

from megatron_opd.mcore.offload import HostWeights


def test_weights_are_there_inside_and_gone_outside() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).requires_grad_(False)
    x = torch.randn(5, 3)
    before, version = model(x), [parameter.clone() for parameter in model.parameters()]
    weights = HostWeights([model], torch.device("cpu"))
    for _ in range(2):
        assert [parameter.numel() for parameter in model.parameters()] == [0] * 4
        with weights.on_device():
            assert torch.equal(model(x), before)
    with pytest.raises(RuntimeError), weights.on_device():
        raise RuntimeError("out of memory")
    assert [parameter.numel() for parameter in model.parameters()] == [0] * 4
    with weights.on_device():
        assert all(map(torch.equal, model.parameters(), version))


def test_a_weight_that_two_modules_share_stays_shared() -> None:
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    second.weight = first.weight
    weights = HostWeights(
        [first.requires_grad_(False), second.requires_grad_(False)], torch.device("cpu")
    )
    with weights.on_device():
        assert first.weight.data_ptr() == second.weight.data_ptr() and first.weight.numel() == 9
