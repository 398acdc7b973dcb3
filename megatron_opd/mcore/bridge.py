"""How processes that serve a model and processes that are served speak: each side is a world of its own.

The first of the served processes asks all that serve, the first of these answers all that are served: two groups of
gloo's, on the host, where questions and answers lie on both sides. So a process that waits for the next question keeps
no device busy, and NCCL's time limit does not count. A side that ends, however it does, ends the other's wait at once.
"""

import contextlib
import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.errors import OpdError, RunError

# A question may be a long step away. What is stuck is found by the time limit of its own side's groups.
_PATIENCE = timedelta(days=365)


class PeerGoneError(ConnectionError):
    """The processes of the other side have ended."""


class Bridge:
    """This process's end of the bridge. All processes construct theirs together.

    Args:
        store: one that all processes reach.
        rank: of this process among all of them.
        served: the first so many are served.
        serving: so many after them serve.
    """

    def __init__(self, store: dist.Store, rank: int, served: int, serving: int) -> None:
        self.serves = rank >= served
        everyone = list(range(served + serving))
        self._questions = _channel(store, "questions", [0, *everyone[served:]], rank)
        self._answers = _channel(store, "answers", [served, *everyone[:served]], rank)

    def ask(self, question: Any) -> Any:
        """The answer, on every process that is served: all ask the same together.

        Raises what answering it raised, as an OpdError; PeerGoneError when there is nobody left to answer.
        """
        if self._questions:
            self._questions.send(question)
        assert self._answers is not None, "ask() is of processes that are served"
        answer = self._answers.receive()
        if isinstance(answer, OpdError):
            raise answer
        return answer

    def serve(self, answer: Callable[[Any], Any]) -> None:
        """Answers one question after the other, until the processes that ask have ended."""
        assert self._questions is not None, "serve() is of processes that serve"
        with contextlib.suppress(PeerGoneError):
            while True:
                question = self._questions.receive()
                try:
                    said = answer(question)
                except Exception as error:
                    self._reply(error if isinstance(error, OpdError) else RunError(f"{type(error).__name__}: {error}"))
                    raise
                self._reply(said)

    def _reply(self, said: Any) -> None:
        if self._answers:
            self._answers.send(said)


class _Channel:
    """A group whose first process speaks, in values that can be pickled."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def send(self, value: Any) -> None:
        content = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        self._broadcast(torch.tensor(len(content)))
        self._broadcast(content)

    def receive(self) -> Any:
        size = self._broadcast(torch.tensor(0))
        content = self._broadcast(torch.empty(int(size), dtype=torch.uint8))
        return pickle.loads(content.numpy().data)

    def _broadcast(self, tensor: Tensor) -> Tensor:
        try:
            self._group.broadcast(tensor, 0).wait()
        except RuntimeError as error:
            raise PeerGoneError("the processes on the other side of the bridge have ended") from error
        return tensor


def _channel(store: dist.Store, name: str, members: list[int], rank: int) -> _Channel | None:
    """None where this process is no member."""
    if rank not in members:
        return None
    store = dist.PrefixStore(f"bridge/{name}", store)
    return _Channel(dist.ProcessGroupGloo(store, members.index(rank), len(members), _PATIENCE))
