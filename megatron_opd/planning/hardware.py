"""What a device can hold and how fast it is. Every constant of the planner that is not derived is
here, with source.

Published figures are peaks; `COMPUTE`, `BANDWIDTH` and `LINK` say how much of them the estimates of
time assume. These three are assumptions. What one H200 showed is in docs/hardware.md: an update of
a 1.5B student came to 0.38 of the peak, a copy on the device to 0.87 of the bandwidth, and a copy
from the host to 0.85 of the link.
"""

import os
from dataclasses import dataclass, replace

from megatron_opd.errors import ConfigError
from megatron_opd.files.typed import unknown

GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """One device (on the host, one process) and its links. Bytes, operations and seconds; links in
    one direction."""

    name: str
    is_cuda: bool
    memory: float  # bytes, all of it
    reserve: float  # of these, what no part of the run can have
    flops: float  # peak of a dense product, per second, in the recipe's precision
    memory_bandwidth: float
    node_link: float  # to another device of the node
    network_link: float  # to a device of another node
    host_link: float  # to the host's memory, where a sleeping engine's weights wait
    engine_tokens: int  # vLLM's default max_num_batched_tokens
    engine_sequences: int  # vLLM's default max_num_seqs

    @property
    def limit(self) -> float:
        return self.memory - self.reserve


# Shares of the peaks. Assumptions: Megatron-LM (arXiv 2104.04473, table 1) reports 44 to 52 % of an
# A100's peak with fused kernels, which our layers do not have; decoding and collectives rarely
# reach more than 70 to 80 % of a link.
COMPUTE = 0.35
BANDWIDTH = 0.7
LINK = 0.7
# Bytes per second of gloo's TCP, at most. Measured once between two processes of a shared AMD EPYC,
# over its loopback.
CHANNEL = 2.6e9

# What torch reports of a card sold as "80 GB": 79.15, 79.25 and 79.33 GiB are seen in its
# out-of-memory messages.
_OF_80_GB = 79.1 * GIB
# CUDA context, NCCL's buffers, cuBLAS workspaces, fragmentation of torch's allocator. An
# assumption.
_RESERVE = 3.0 * GIB

_GPUS = {
    # NVIDIA A100 80GB SXM data sheet: 312 TFLOPS bf16 dense, 2,039 GB/s, NVLink 600 GB/s both ways,
    # PCIe 4 64 GB/s both ways. DGX A100: one 200 Gb/s adapter per GPU. vLLM 0.32 arg_utils: 8192
    # and 256 for an A100.
    "a100": Hardware(
        "a100", True, _OF_80_GB, _RESERVE, 312e12, 2039e9, 300e9, 25e9, 32e9, 8192, 256
    ),
    # NVIDIA H100 SXM data sheet: 989.4 TFLOPS bf16 dense, 3.35 TB/s, NVLink 900 GB/s and PCIe 5 128
    # GB/s both ways. DGX H100: one 400 Gb/s adapter per GPU. vLLM: 16384 and 1024 for 70 GiB and
    # more.
    "h100": Hardware(
        "h100", True, _OF_80_GB, _RESERVE, 989.4e12, 3350e9, 450e9, 50e9, 64e9, 16384, 1024
    ),
    # The H100 with NVLink at 400 GB/s both ways.
    "h800": Hardware(
        "h800", True, _OF_80_GB, _RESERVE, 989.4e12, 3350e9, 200e9, 50e9, 64e9, 16384, 1024
    ),
    # One process on the planning machine. Memory: see `hardware`. Measured once on one core of a
    # shared AMD EPYC: float32 product of 1024 x 1024 matrices 30 GFLOPS, copy 6.1 GB/s. Links:
    # assumptions. vLLM: 4096 and 256.
    "cpu": Hardware("cpu", False, 0, 0, 30e9, 6.1e9, 2e9, 1e9, 5e9, 4096, 256),
}


def hardware(name: str, processes_per_node: int) -> Hardware:
    """A process of `cpu` has an equal part of this machine's memory. Raises ConfigError."""
    if name not in _GPUS:
        raise ConfigError(f"--gpu: {unknown('device', name, _GPUS)}")
    found = _GPUS[name]
    if found.is_cuda:
        return found
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return replace(found, memory=machine / processes_per_node)
