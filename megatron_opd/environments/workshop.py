"""A toy world with hidden rules: where a thing is kept, and which tool does a job.

"chill mug" takes two steps: open the place where the mug is kept, then use the tool that chills.
Nothing that is seen tells the rules, which the option `seed` draws: they are learned from rewards,
or read in a skill (workshop_skills.py).
"""

import random
from dataclasses import dataclass

from megatron_opd.contracts.environments import Info

ITEMS = ("mug", "apple", "knife", "towel", "lamp", "plate", "book", "candle")
PLACES = ("drawer", "shelf", "cabinet", "basket", "chest", "rack", "box", "closet")
JOBS = ("chill", "heat", "clean", "cut", "dry", "paint", "weigh", "press")
TOOLS = ("fridge", "oven", "sink", "saw", "fan", "brush", "scale", "iron")
WITHOUT, WITH = "hall", "bench"  # where one stands without the thing, and with it
# of an action, the first word of what is seen then
NOTHING, GOT, FAILED, WORKED = "nothing", "gotit", "failed", "worked"
HELD_OUT_SHARE = 4  # every fourth pair of a job and a thing, so that each of both is in both splits


@dataclass(frozen=True)
class Rules:
    """The hidden tables."""

    place_of: dict[str, str]  # item -> place
    tool_for: dict[str, str]  # job -> tool

    @classmethod
    def drawn(cls, seed: int, size: int = len(ITEMS)) -> "Rules":
        """One-to-one, over the first `size` words of every kind."""
        draw = random.Random(f"workshop {seed}")
        places = draw.sample(PLACES[:size], size)
        tools = draw.sample(TOOLS[:size], size)
        return cls(
            dict(zip(ITEMS[:size], places, strict=True)),
            dict(zip(JOBS[:size], tools, strict=True)),
        )


class Workshop:
    """Options: `size` of every table, `budget` of steps (2: no mistake is allowed), `seed` of the
    tables."""

    def __init__(self, size: int = len(ITEMS), budget: int = 3, seed: int = 0) -> None:
        if problem := self.check({"size": size, "budget": budget}):
            raise ValueError(problem)
        self.budget = budget
        self.size = size
        self.rules = Rules.drawn(seed, size)

    @staticmethod
    def check(options: dict[str, str | int | float | bool]) -> str | None:
        """What is wrong with the options."""
        size, budget = options.get("size", len(ITEMS)), options.get("budget", 3)
        if not isinstance(size, int) or not 2 <= size <= len(ITEMS):
            return f"size: {size!r} must be an integer from 2 to {len(ITEMS)}"
        if not isinstance(budget, int) or budget < 2:
            return f"budget: {budget!r} must be an integer of 2 or more"
        return None

    def task_ids(self, split: str) -> list[str]:
        """Pairs of a job and a thing, of "train" or "heldout"; no other split has any."""
        pairs = [
            (f"{job} {item}", (j + i) % HELD_OUT_SHARE == HELD_OUT_SHARE - 1)
            for j, job in enumerate(JOBS[: self.size])
            for i, item in enumerate(ITEMS[: self.size])
        ]
        wanted = {"train": False, "heldout": True}.get(split)
        return [name for name, held_out in pairs if held_out == wanted]

    def reset(self, *, seed: int, options: dict[str, str]) -> tuple[str, Info]:
        self.task = options["task_id"]
        job, _, item = self.task.partition(" ")
        if job not in self.rules.tool_for or item not in self.rules.place_of:
            raise ValueError(f"there is no task {self.task!r}")
        self.steps_that_win = [
            f"open {self.rules.place_of[item]}",
            f"use {self.rules.tool_for[job]}",
        ]
        self.done = 0  # of those two
        self.taken = 0
        return WITHOUT, self._info() | {"task": self.task, "task_type": job}

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        valid = action in self._understood()
        right = self.done < 2 and action == self.steps_that_win[self.done]
        outcome = (GOT, WORKED)[self.done] if right else self._without_effect(action)
        self.done += right
        self.taken += 1
        won = self.done == 2
        truncated = not won and self.taken == self.budget
        text = f"{outcome} {WITH if self.done else WITHOUT}"
        return text, float(won), won, truncated, self._info() | {"valid": valid}

    def expert_action(self) -> str:
        """The action of one who knows the rules."""
        return self.steps_that_win[self.done]

    def _without_effect(self, action: str) -> str:
        tried = self.done == 1 and action.startswith("use ") and action in self._understood()
        return FAILED if tried else NOTHING

    def _understood(self) -> list[str]:
        places = [f"open {place}" for place in PLACES[: self.size]]
        return places + [f"use {tool}" for tool in TOOLS[: self.size]]

    def _info(self) -> Info:
        return {"admissible": self._understood(), "won": self.done == 2, "score": self.done / 2}
