"""Engines in processes of their own: the student's side, and the loop of those processes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import Protocol, assert_never

import torch

from megatron_opd.contracts.sampling import Completion, Request, Sampling
from megatron_opd.contracts.stations import Engine, Probes
from megatron_opd.errors import OpdError
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.world.channel import Channel, as_answer
from megatron_opd.world.processes import gather_shares, share


class ServedEngine(Engine, Protocol):
    """An engine of this process: it can also work in one of its own, for others."""

    device: torch.device

    def close(self) -> None: ...


@dataclass(frozen=True)
class _Open:
    config: RunConfig


@dataclass(frozen=True)
class _Complete:
    groups: list[list[Request]]  # by task, since the requests of a task begin with the same tokens
    version: int | None  # of the weights, which are verified on the student's side
    sampling: Sampling


@dataclass(frozen=True)
class _Reload:
    """The tensors follow."""


@dataclass(frozen=True)
class _Project:
    name: str
    probes: Probes


@dataclass(frozen=True)
class _Restart:
    pass


_Question = _Open | _Complete | _Reload | _Project | _Restart
# A process's share of the completions or of the tensors; [] for other questions.
_Answer = list[list[Completion]] | list[torch.Tensor]


class RemoteEngine:
    """The engines of `config`, opened and asked across the channel, at first without weights.

    All calls are collective over the student's world. Raises the exceptions of opening them.
    """

    def __init__(self, channel: Channel, config: RunConfig) -> None:
        self._channel = channel
        self.dtype: torch.dtype = getattr(torch, config.precision)
        self.max_sequence_length = config.max_sequence_length
        self.policy_version: int | None = None
        channel.ask(_Open(config))

    def restart(self) -> None:
        """Restarts all engines: see `Engine.restart`."""
        self.policy_version = None
        self._channel.ask(_Restart())

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """The completions of this process's requests: see `Engine.complete`.

        The requests of all processes are shared anew among the engines. If one of these fails, the
        call raises on all processes.
        """
        groups = [list(group) for _, group in groupby(requests, key=_of_task)]
        question = _Complete(gather_shares(groups), self.policy_version, sampling)
        answers = self._channel.ask(question)
        return [completion for group in share(answers) for completion in group]

    def reload(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Sends the first process's tensors into all engines: see `Engine.reload`."""
        self.policy_version = None
        self._channel.ask(_Reload(), named_tensors)

    def sleep(self) -> None:
        """Does nothing, since the engines have devices of their own."""

    def project(self, name: str, probes: Probes) -> list[torch.Tensor]:
        """The products of `Engine.project`, of all engines' copies."""
        signs_I = probes.signs_I
        products = self._channel.ask(_Project(name, replace(probes, signs_I=signs_I.cpu())))
        return [product_KO.to(signs_I.device) for product_KO in products]


def _of_task(request: Request) -> tuple[int, int]:
    return request.task.index, request.task.first_sample


def serve(channel: Channel, open_engine: Callable[[RunConfig], ServedEngine]) -> None:
    """The loop of the engines' processes: answers `RemoteEngine` until the student's end."""
    engines: list[ServedEngine] = []  # none before the first question, then one
    try:
        channel.serve(
            lambda question: _together(lambda: _answer(question, channel, engines, open_engine))
        )
    finally:
        for engine in engines:
            engine.close()


def _answer(
    question: _Question,
    channel: Channel,
    engines: list[ServedEngine],
    open_engine: Callable[[RunConfig], ServedEngine],
) -> _Answer:
    """This process's share of the answer."""
    if isinstance(question, _Open):
        engines.append(open_engine(question.config))
        return []
    [engine] = engines
    match question:
        case _Complete(groups, version, sampling):
            engine.policy_version = version
            return _complete(engine, share(groups), sampling)
        case _Project(name, probes):
            sent = replace(probes, signs_I=probes.signs_I.to(engine.device))
            return [product_KO.cpu() for product_KO in engine.project(name, sent)]
        case _Reload():
            _reload(engine, channel)
        case _Restart():
            engine.restart()
        case _:
            assert_never(question)
    return []


def _complete(
    engine: ServedEngine, groups: list[list[Request]], sampling: Sampling
) -> list[list[Completion]]:
    requests = [request for group in groups for request in group]
    completions = iter(engine.complete(requests, sampling))
    return [list(islice(completions, len(group))) for group in groups]


def _reload(engine: ServedEngine, channel: Channel) -> None:
    tensors = channel.tensors()
    try:
        engine.reload((name, tensor.to(engine.device)) for name, tensor in tensors)
    finally:
        for _ in tensors:  # all of them are sent, even if this engine fails
            pass


def _together(work: Callable[[], _Answer]) -> list[object] | OpdError:
    """The results of all processes of this role, in the order of the shared items.

    The first process's error instead, if one raised.
    """
    try:
        own: list[object] = [*work()]
    except Exception as error:
        own = [as_answer(error)]
    results = gather_shares(own)
    return next((result for result in results if isinstance(result, OpdError)), results)
