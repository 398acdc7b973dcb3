"""The channel between processes that serve a model and processes that are served: two worlds.

The first served process asks all serving ones, and the first serving process answers all served
ones, over two gloo groups on the host, where questions and answers lie anyway. So a process that
waits for the next question keeps no device busy, and NCCL's time limit does not apply. When a side
ends, in any way, the other stops waiting at once.
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

# The next question may be a long step away. A process that is stuck is found by the time limit of
# its own side's groups.
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
        """The answer to a question that all served processes ask together.

        `tensors` follow the question one at a time, and the serving processes read them with
        `tensors()`; iterating over them may be a collective of the served ones. Raises the serving
        side's exception as an OpdError, and PeerGoneError when nobody is left to answer.
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
                    reply = answer(question)
                except Exception as error:
                    self._reply(as_answer(error))
                    raise
                self._reply(reply)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that follow the question, on the host; all are read before the answer."""
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

    def _reply(self, reply: Any) -> None:
        if self._answers:
            self._answers.send(reply)


def as_answer(error: Exception) -> OpdError:
    """The exception of an answer, as an error in one line."""
    return error if isinstance(error, OpdError) else RunError(f"{type(error).__name__}: {error}")


def _bytes_of(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor as bytes, since gloo does not know every dtype."""
    return tensor.view(-1).view(torch.uint8)


class _Channel:
    """A group whose first process sends values that can be pickled."""

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
    """This process's end of a group; None when it is no member."""
    if rank not in members:
        return None
    store = dist.PrefixStore(f"channel/{name}", store)
    return _Channel(dist.ProcessGroupGloo(store, members.index(rank), len(members), _PATIENCE))
