"""Memory and speed of devices: every constant of the planner that is not derived, with its source.

Published figures are peaks. The estimates of time assume the fractions `COMPUTE`, `BANDWIDTH` and
`LINK` of them. docs/hardware.md has measurements of one H200: an update of a 1.5B student came to
0.38 of the peak, a copy on the device to 0.87 of the bandwidth, and a copy from the host to 0.85 of
the link.
"""

import os
from dataclasses import dataclass, replace

from megatron_opd.errors import ConfigError
from megatron_opd.files.typed import unknown

GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """One device (on the host, one process) and its links, in bytes, operations and seconds.

    Links count one direction.
    """

    name: str
    is_cuda: bool
    memory: float  # all bytes of the device
    reserve: float  # bytes of the memory that the run cannot have
    flops: float  # peak of a dense product, per second, in the recipe's precision
    memory_bandwidth: float
    node_link: float  # to another device of the node
    network_link: float  # to a device of another node
    host_link: float  # to the host's memory, where a sleeping engine's weights wait
    engine_tokens: int  # vLLM's default max_num_batched_tokens
    engine_sequences: int  # vLLM's default max_num_seqs

    @property
    def limit(self) -> float:
        """Bytes that a run can have."""
        return self.memory - self.reserve


# Assumed fractions of the peaks. Megatron-LM (arXiv 2104.04473, table 1) reports 44 to 52 % of an
# A100's peak with fused kernels, which our layers do not have; decoding and collectives rarely
# reach more than 70 to 80 % of a link.
COMPUTE = 0.35
BANDWIDTH = 0.7
LINK = 0.7
# Bytes per second of gloo's TCP, at most. Measured once between two processes of a shared AMD EPYC,
# over its loopback.
CHANNEL = 2.6e9

# torch's out-of-memory messages give 79.15, 79.25 and 79.33 GiB for cards sold as "80 GB".
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
    """The device of this name; a process of `cpu` has an equal share of this machine's memory.

    Raises ConfigError for an unknown name.
    """
    if name not in _GPUS:
        raise ConfigError(f"--gpu: {unknown('device', name, _GPUS)}")
    device = _GPUS[name]
    if device.is_cuda:
        return device
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return replace(device, memory=machine / processes_per_node)
