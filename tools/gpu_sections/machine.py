"""Where the sections run, how long they may, and how they measure time and memory."""

import contextlib
import gc
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.unit.live_bytes import LiveBytes

GIB = 2**30


class Timing(NamedTuple):
    milliseconds: float
    peak: int  # bytes beside what was there before; 0 on the host


@dataclass(frozen=True)
class Machine:
    """One device. `small`: sizes for a host, where the kernels are interpreted and speed means
    nothing."""

    device: torch.device
    small: bool
    deadline: float  # of time.perf_counter()

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.perf_counter()

    def sized(self, small: Any, full: Any) -> Any:
        return small if self.small else full

    def beside(self, text: str) -> str:
        """What a speed is seen against; nothing on the host, where it has no meaning."""
        return text if self.is_cuda else ""

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(device=self.device).manual_seed(seed)

    def normal(
        self, *shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0, std: float = 1.0
    ) -> Tensor:
        """Drawn in blocks of rows, so that nothing of the size exists in float32."""
        generator, out = self.generator(seed), torch.empty(shape, dtype=dtype, device=self.device)
        for rows in out.split(1024):
            rows.copy_(torch.randn(rows.shape, device=self.device, generator=generator).mul_(std))
        return out

    def ids(self, vocab: int, *shape: int, lowest: int = 0, seed: int = 0) -> Tensor:
        return torch.randint(
            lowest, vocab, shape, device=self.device, generator=self.generator(seed)
        )

    def lacks(self, needed: float) -> str:
        """Why something that needs so many bytes cannot run here; empty where it can."""
        if not self.is_cuda:
            return ""
        self.tidy()
        free = torch.cuda.mem_get_info()[0]
        return "" if needed < free else f"needs {needed / GIB:.1f} GiB, {free / GIB:.1f} are free"

    def tidy(self) -> None:
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    def synchronise(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def timed(
        self,
        run: Callable[..., Any],
        prepare: Callable[[], tuple[Any, ...]] = tuple,
        repeat: int = 7,
    ) -> Timing:
        """The median after two runs that warm up; what `prepare` makes is outside of both
        figures."""
        times, peak = [], 0
        for _ in range(2 + (1 if self.small else repeat)):
            given = prepare()
            self.synchronise()
            held = self._watch_allocator()
            start = time.perf_counter()
            out = run(*given)
            self.synchronise()
            times.append(1e3 * (time.perf_counter() - start))
            if self.is_cuda:
                peak = max(peak, torch.cuda.max_memory_allocated() - held)
            del given, out
        return Timing(statistics.median(times[2:]), peak)

    def _watch_allocator(self) -> int:
        if not self.is_cuda:
            return 0
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    @contextlib.contextmanager
    def live_bytes(self) -> Iterator[Callable[[], int]]:
        """Gives what returns the most bytes that were alive at one time since it was entered."""
        if self.is_cuda:
            self._watch_allocator()
            yield torch.cuda.max_memory_allocated
        else:
            with LiveBytes() as live:
                yield lambda: live.peak

    @cached_property
    def copy_rate(self) -> float:
        """Bytes per second, read and written, of a large copy on the device."""
        source = torch.ones(self.sized(2**22, 2**30), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2e3 * source.nbytes / self.timed(lambda: target.copy_(source)).milliseconds

    @cached_property
    def product_rate(self) -> float:
        """Floating-point operations per second of a large bfloat16 product."""
        size = self.sized(256, 8192)
        a, b = self.normal(size, size), self.normal(size, size, seed=1)
        return 2e3 * size**3 / self.timed(lambda: a @ b).milliseconds


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
