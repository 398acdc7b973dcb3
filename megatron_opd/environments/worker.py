"""An environment's worker: `python -m megatron_opd.environments.worker KIND OPTIONS`.

KIND is "module:Class" or a gymnasium id, OPTIONS the keywords it is made with, as JSON. The process
makes a first environment, writes {"ready": true} or {"failed": "why"}, and then answers one JSON
line on stdin with one on stdout, in order:

    {"op": "reset", "slot": 0, "task_id": "7", "seed": 3}  {"op": "step", "slot": 0, "action": "go"}
    {"op": "expert", "slot": 0}                            {"op": "task_ids", "split": "train"}
    {"op": "close"}

It may run in another interpreter, so it imports the standard library and a few modules of ours that
import nothing else, and keeps to the syntax of Python 3.10.
"""

import dataclasses
import json
import math
import os
import queue
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from megatron_opd.contracts.environments import Observation
from megatron_opd.files.own_code import NoOwnCode, load_own

GYMNASIUM_ID = re.compile(r"(?:[\w.]+:)?[\w./-]+-v\d+")
Message = dict[str, Any]


class BadAnswer(Exception):
    """The environment returned something that is not of its contract."""


def factory(kind: str, options: dict[str, Any]) -> Callable[[], Any]:
    """What makes an environment. Raises ImportError or NoOwnCode."""
    if GYMNASIUM_ID.fullmatch(kind):
        sys.path.append(os.getcwd())  # of the module in "module:Name-v0"
        import gymnasium

        return lambda: gymnasium.make(kind, disable_env_checker=True, **options)
    own_class = load_own(kind)
    if not callable(own_class):
        raise NoOwnCode(f"{kind} is of type {_type(own_class)}, must be a class")
    return lambda: own_class(**options)


class Player:
    """The environments of one process: one for every episode that is being played."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make
        self.idle = [make()]
        self.of_slot: dict[int, Any] = {}
        self.task: dict[int, tuple[str, str]] = {}  # what the slot's task is, and its type

    def answer(self, request: Message) -> Message:
        """The reply to a request. What the environment raises is in `failed`."""
        started = time.perf_counter()
        try:
            reply = self._do(request)
        except (Exception, SystemExit) as error:
            self.of_slot.pop(request.get("slot", -1), None)  # it may be in any state
            reply = {"failed": _one_line(error)}
        return reply | {"seconds": time.perf_counter() - started}

    def close(self) -> None:
        for environment in [*self.idle, *self.of_slot.values()]:
            if callable(close := getattr(environment, "close", None)):
                close()

    def _do(self, request: Message) -> Message:
        operation = request["op"]
        if operation == "task_ids":
            return {"task_ids": self._task_ids(request["split"])}
        slot = request["slot"]
        if operation == "expert":
            expert = getattr(_own(self.of_slot[slot]), "expert_action", None)
            return {"action": expert() if callable(expert) else None}
        observation = self._reset(request) if operation == "reset" else self._step(request)
        if observation.ended:
            self.idle.append(self.of_slot.pop(slot))
        return {"observation": dataclasses.asdict(observation)}

    def _reset(self, request: Message) -> Observation:
        slot = request["slot"]
        self.task.pop(slot, None)
        if slot not in self.of_slot:
            self.of_slot[slot] = self.idle.pop() if self.idle else self.make()
        options = {"task_id": request["task_id"]}
        answer = self.of_slot[slot].reset(seed=request["seed"], options=options)
        text, info = _tuple(answer, "reset", "observation, info")
        return self._observed(slot, text, info)

    def _step(self, request: Message) -> Observation:
        slot = request["slot"]
        answer = self.of_slot[slot].step(request["action"])
        parts = "observation, reward, terminated, truncated, info"
        text, reward, terminated, truncated, info = _tuple(answer, "step", parts)
        ended = _flag("terminated", terminated), _flag("truncated", truncated)
        return self._observed(slot, text, info, _number("reward", reward), ended)

    def _observed(
        self,
        slot: int,
        text: object,
        info: object,
        reward: float = 0.0,
        ended: tuple[bool, bool] = (False, False),
    ) -> Observation:
        if not isinstance(info, dict):
            raise BadAnswer(f"info is of type {_type(info)}, must be a dict")
        task, task_type = self.task.get(slot, ("", ""))
        self.task[slot] = (
            _text("info task", info.get("task", task)),
            _text("info task_type", info.get("task_type", task_type)),
        )
        won = _flag("info won", info.get("won", False))
        return Observation(
            text=_text("observation", text),
            reward=reward,
            terminated=ended[0],
            truncated=ended[1],
            task=self.task[slot][0],
            task_type=self.task[slot][1],
            admissible=_texts("info admissible", info.get("admissible")),
            won=won,
            score=_number("info score", info.get("score", float(won)), within=(0.0, 1.0)),
            valid=_flag("info valid", info.get("valid", True)),
        )

    def _task_ids(self, split: str) -> list[str]:
        if not self.idle:
            self.idle.append(self.make())
        own = _own(self.idle[0])
        if not callable(getattr(own, "task_ids", None)):
            raise BadAnswer(
                f"{type(own).__name__} names no tasks: it has no method task_ids(split)"
            )
        return list(_texts("task_ids", own.task_ids(split)) or ())


def _own(environment: Any) -> Any:
    """The author's object, without gymnasium's wrappers."""
    return getattr(environment, "unwrapped", environment)


def _tuple(answer: object, method: str, parts: str) -> tuple[Any, ...]:
    length = len(parts.split(", "))
    if not isinstance(answer, tuple) or len(answer) != length:
        shape = f"of {len(answer)}" if isinstance(answer, tuple) else ""
        raise BadAnswer(f"{method} returned a {_type(answer)} {shape}, must be ({parts})")
    return answer


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise BadAnswer(f"{name} is of type {_type(value)}, must be text")
    # A lone surrogate cannot be tokenised.
    return str(value).encode(errors="replace").decode()


def _texts(name: str, value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple)):
        raise BadAnswer(f"{name} is of type {_type(value)}, must be a list of texts")
    return tuple(_text(name, text) for text in value)


def _number(name: str, value: object, within: tuple[float, float] | None = None) -> float:
    value = _plain(value)
    if not isinstance(value, (int, float)):
        raise BadAnswer(f"{name} is of type {_type(value)}, must be a number")
    if not math.isfinite(value):
        raise BadAnswer(f"{name} is {value}, must be finite")
    if within and not within[0] <= value <= within[1]:
        raise BadAnswer(f"{name} is {value}, must be from {within[0]:g} to {within[1]:g}")
    return float(value)


def _flag(name: str, value: object) -> bool:
    value = _plain(value)
    if not isinstance(value, bool):
        raise BadAnswer(f"{name} is of type {_type(value)}, must be true or false")
    return value


def _plain(value: object) -> object:
    """A NumPy scalar as Python's."""
    item = getattr(value, "item", None)
    return item() if callable(item) and getattr(value, "size", 0) == 1 else value


def _type(value: object) -> str:
    return type(value).__name__


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:500]
    return (
        text
        if isinstance(error, (BadAnswer, NoOwnCode))
        else f"{_type(error)}: {text}".rstrip(": ")
    )


def _read(requests: "queue.SimpleQueue[bytes]", descriptor: int) -> None:
    """Hands requests on. When the training process has gone, this one and its children go."""
    with os.fdopen(descriptor, "rb") as stream:
        for line in stream:
            requests.put(line)
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def main() -> None:
    kind, options = sys.argv[1], json.loads(sys.argv[2])
    os.environ.pop("PYTHONSAFEPATH", None)  # meant for this process alone
    # Slurm sends these to all processes, and the trainer still finishes its step.
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # What an environment prints or reads must not reach the protocol.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)  # line by line
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(requests, os.dup(0)), daemon=True).start()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def write(reply: Message) -> None:
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()

    try:
        player = Player(factory(kind, options))
    except (Exception, SystemExit) as error:
        write({"failed": _one_line(error)})
        return
    write({"ready": True})
    while (request := json.loads(requests.get()))["op"] != "close":
        write(player.answer(request))
    player.close()
    write({})


if __name__ == "__main__":
    main()
