"""A copy of a student's weights that follows them from afar, for a self-teacher."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from megatron_opd.mcore.parallel import Parallel
from megatron_opd.recipe.agents import SelfTeacherConfig
from megatron_opd.trainer.student import Student


class WeightCopy:
    """The student's weights of an earlier step, or their moving average, in `chunks`.

    The average is kept in float32, whatever the precision of the models: in bfloat16 a small
    change would be lost.

    Args:
        chunks: this rank's frozen chunks, of the student's architecture and layout, with its first
            weights.
    """

    def __init__(
        self, chunks: Sequence[Module], student: Student, settings: SelfTeacherConfig
    ) -> None:
        assert settings.weights in ("every", "average"), "other weights need no copy"
        self.chunks = list(chunks)
        self._student = student
        self._settings = settings
        self._averages: list[Tensor] = []
        if settings.weights == "average":
            self._averages = [parameter.detach().float() for parameter in self._parameters()]

    @property
    def parallel(self) -> Parallel:
        return self._student.parallel

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Takes the student's weights after the updates of `step`. Local."""
        present = [p for chunk in self._student.bare_chunks for p in chunk.parameters()]
        buffers = [b for chunk in self._student.bare_chunks for b in chunk.buffers()]
        own_buffers = [buffer for chunk in self.chunks for buffer in chunk.buffers()]
        if self._averages:
            with self.stored():
                for average, parameter in zip(self._averages, present, strict=True):
                    average.lerp_(parameter.float(), 1 - self._settings.decay)
        elif (step + 1) % self._settings.every == 0:
            for own, parameter in zip(self._parameters(), present, strict=True):
                own.copy_(parameter)
        else:
            return
        for own_buffer, buffer in zip(own_buffers, buffers, strict=True):
            own_buffer.copy_(buffer)

    @contextlib.contextmanager
    def stored(self) -> Iterator[None]:
        """Within it `chunks` hold what a checkpoint keeps: the averages in full precision."""
        if not self._averages:
            yield
            return
        dtypes = [parameter.dtype for parameter in self._parameters()]
        for parameter, average in zip(self._parameters(), self._averages, strict=True):
            parameter.data = average
        try:
            yield
        finally:
            for parameter, dtype in zip(self._parameters(), dtypes, strict=True):
                parameter.data = parameter.data.to(dtype)

    def _parameters(self) -> list[Parameter]:
        return [parameter for chunk in self.chunks for parameter in chunk.parameters()]
