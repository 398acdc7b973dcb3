"""ALFWorld: household tasks in text, played by TextWorld from ALFWorld's own files.

The packages alfworld and textworld come with `make agents-env`; the data are the user's, or those
of tools/make_alfworld_games.py.
"""

import json
import os
import random
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Info = dict[str, object]
GAMES = "json_2.1.1"  # the folder of the splits, in the data
GAME, TRAJECTORY = "game.tw-pddl", "traj_data.json"
SPLITS = ("train", "valid_seen", "valid_unseen")
HELDOUT = "valid_seen"  # what SDAR and GiGPO validate on
TASK_TYPES = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)
NOT_SUPPORTED = ("movable", "Sliced")  # of ALFRED, in names of folders; as alfworld leaves them out
EXPERT_STEPS = 200  # after which the hand-coded expert gives up
_SOLVABLE = re.compile(rb'"solvable":\s*true')
_TASK = "Your task is to: "


class AlfWorld:
    """A game of ALFWorld. A task id is the path of its folder below the data, such as
    json_2.1.1/train/pick_and_place_simple-Mug-None-Desk-308/trial_T2019.

    `data_dir` is the directory that ALFWORLD_DATA names where it is left out. Whether one says "put
    mug 1 in/on desk 1" or "move mug 1 to desk 1" is part of a game's file. A command that is not
    understood is answered by "Nothing happens." and is valid, as in the released code of SDAR.
    """

    def __init__(self, data_dir: str = "") -> None:
        if problem := self.check({"data_dir": data_dir}):
            raise ValueError(problem)
        self._data = data_directory(data_dir)
        os.environ["ALFWORLD_DATA"] = str(self._data)  # alfworld makes a directory where it is not
        if find_spec("textworld") is None:
            raise ModuleNotFoundError(
                "textworld and alfworld are not installed here; run `make agents-env`, and set "
                "environment.python=.venv-agents/bin/python"
            )
        import textworld
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
        from alfworld.info import __version__
        from textworld.envs import PddlEnv

        self._version = __version__
        # `facts` would be computed in every step, for the expert alone.
        self._inner: Any = PddlEnv(textworld.EnvInfos(won=True, admissible_commands=True))
        self._game: Any = AlfredDemangler(self._inner)
        self._expert: Any = None

    @staticmethod
    def check(options: Mapping[str, str | int | float | bool]) -> str | None:
        """What is wrong with the options."""
        named = str(options.get("data_dir", ""))
        if not named and not os.environ.get("ALFWORLD_DATA"):
            return (
                "data_dir: missing; give the directory with ALFWorld's data, or set ALFWORLD_DATA "
                "(alfworld-download fetches them; tools/make_alfworld_games.py makes games)"
            )
        games = data_directory(named) / GAMES
        if not games.is_dir():
            return f"data_dir: there is no {games}; it must hold {', '.join(SPLITS)}"
        return None

    def task_ids(self, split: str) -> list[str]:
        """The games of a split that alfworld plays, sorted; "heldout" is valid_seen."""
        name = HELDOUT if split == "heldout" else split
        folders = sorted(file.parent for file in (self._data / GAMES / name).rglob(GAME))
        return [
            str(folder.relative_to(self._data)) for folder in folders if self._is_playable(folder)
        ]

    def reset(self, *, seed: int, options: dict[str, str]) -> tuple[str, Info]:
        self._task_id = options["task_id"]
        file = self._data / self._task_id / GAME
        if not file.is_file():
            raise FileNotFoundError(f"there is no game {file}")
        self._seed, self._taken = seed, 0
        self._game.load(str(file))
        self._state = self._game.reset()
        self._expert = None
        self._command: str | None = None
        text = self._state.feedback
        task = text.partition(_TASK)[2].strip().removesuffix(".")
        folder = Path(self._task_id).parent.name
        return text, self._info() | {"task": task, "task_type": folder.partition("-")[0]}

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        self._state, _, done = self._game.step(action)
        self._command = action
        self._taken += 1
        won = bool(self._state["won"])
        return self._state.feedback, float(won), bool(done), False, self._info()

    def expert_action(self) -> str:
        """The action of alfworld's own expert, which must be asked from the first step on."""
        if self._expert is None:
            from alfworld.agents.expert import HandCodedTWAgent

            self._expert = HandCodedTWAgent(max_steps=EXPERT_STEPS)
            self._expert.reset(str(self._data / self._task_id / GAME))
            self._expert.observe(self._state.feedback)
            return "look"
        random.seed(f"{self._seed} {self._taken}")  # it guesses where it is stuck
        state = self._state
        state["facts"] = [self._inner._get_human_readable_fact(fact) for fact in state["_facts"]]
        action = self._expert.act(state, 0, state["won"], self._command)
        return action if action in state["admissible_commands"] else "look"

    def _info(self) -> Info:
        commands = [c for c in self._state["admissible_commands"] if c != "help"]
        won = bool(self._state["won"])
        return {"admissible": commands, "won": won, "alfworld": self._version}

    def _is_playable(self, folder: Path) -> bool:
        """Decides as alfworld does; for all games of its data in a second."""
        below = str(folder.relative_to(self._data / GAMES))
        if any(word in below for word in NOT_SUPPORTED) or not (folder / TRAJECTORY).is_file():
            return False
        if json.loads((folder / TRAJECTORY).read_bytes())["task_type"] not in TASK_TYPES:
            return False
        return bool(_SOLVABLE.search((folder / GAME).read_bytes()))


def data_directory(named: str) -> Path:
    return Path(os.path.expandvars(named or os.environ.get("ALFWORLD_DATA", ""))).expanduser()
