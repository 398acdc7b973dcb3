"""How processes that serve a model and processes that are served speak: each side is a world of its
own.

The first of the served processes asks all that serve, the first of these answers all that are
served: two groups of gloo's, on the host, where questions and answers lie on both sides. So a
process that waits for the next question keeps no device busy, and NCCL's time limit does not count.
A side that ends, however it does, ends the other's wait at once.
"""

import contextlib
import pickle
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.errors import OpdError, RunError

# A question may be a long step away. What is stuck is found by the time limit of its own side's
# groups.
_PATIENCE = timedelta(days=365)


class PeerGoneError(ConnectionError):
    """The processes of the other side have ended."""


class Channel:
    """This process's end of the channel. All processes construct theirs together.

    Args:
        store: one that all processes reach.
        rank: of this process among all of them.
        served: the ranks of those that ask.
        serving: the ranks of those that answer.
    """

    def __init__(self, store: dist.Store, rank: int, served: range, serving: range) -> None:
        self.serves = rank in serving
        self._questions = _channel(store, "questions", [served[0], *serving], rank)
        self._answers = _channel(store, "answers", [serving[0], *served], rank)

    def ask(self, question: Any, tensors: Iterable[tuple[str, Tensor]] | None = None) -> Any:
        """The answer, on every process that is served: all ask the same together.

        `tensors`, which those that answer read with `tensors()`, follow the question one at a time;
        iterating over them may be a collective of those that ask. Raises what answering it raised,
        as an OpdError; PeerGoneError when there is nobody left to answer.
        """
        if self._questions:
            self._questions.send(question)
        if tensors is not None:
            self._send_tensors(tensors)
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
                    self._reply(as_answer(error))
                    raise
                self._reply(said)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What follows the question, on the host. To be read to its end before the answer."""
        assert self._questions is not None, "tensors() is of processes that serve"
        while (header := self._questions.receive()) is not None:
            name, shape, dtype = header
            tensor = torch.empty(shape, dtype=dtype)
            self._questions.broadcast(_bytes_of(tensor))
            yield name, tensor

    def _send_tensors(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in tensors:
            if self._questions:
                tensor = tensor.detach().cpu().contiguous()
                self._questions.send((name, tuple(tensor.shape), tensor.dtype))
                self._questions.broadcast(_bytes_of(tensor))
        if self._questions:
            self._questions.send(None)

    def _reply(self, said: Any) -> None:
        if self._answers:
            self._answers.send(said)


def as_answer(error: Exception) -> OpdError:
    """What answering a question raised, in one line."""
    return error if isinstance(error, OpdError) else RunError(f"{type(error).__name__}: {error}")


def _bytes_of(tensor: Tensor) -> Tensor:
    """The same memory, of a contiguous tensor: gloo does not know every dtype."""
    return tensor.view(-1).view(torch.uint8)


class _Channel:
    """A group whose first process speaks, in values that can be pickled."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def send(self, value: Any) -> None:
        content = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        self.broadcast(torch.tensor(len(content)))
        self.broadcast(content)

    def receive(self) -> Any:
        size = self.broadcast(torch.tensor(0))
        content = self.broadcast(torch.empty(int(size), dtype=torch.uint8))
        return pickle.loads(content.numpy().data)

    def broadcast(self, tensor: Tensor) -> Tensor:
        try:
            self._group.broadcast(tensor, 0).wait()
        except RuntimeError as error:
            raise PeerGoneError(
                "the processes on the other side of the channel have ended"
            ) from error
        return tensor


def _channel(store: dist.Store, name: str, members: list[int], rank: int) -> _Channel | None:
    """None where this process is no member."""
    if rank not in members:
        return None
    store = dist.PrefixStore(f"channel/{name}", store)
    return _Channel(dist.ProcessGroupGloo(store, members.index(rank), len(members), _PATIENCE))
