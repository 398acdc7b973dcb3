"""WebShop: a product is searched for, looked at and bought, in the user's own checkout."""

import random
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from megatron_opd.environments.webshop_engine import Shop, check_engine, open_shop

Info = dict[str, object]
HELDOUT_GOALS = 500  # the first of them, as published; the others are for training
SEARCHES = ("auto", "lucene", "bm25")
SEARCH_ACTION = "search[<your query>]"
SEPARATOR = " [SEP] "
_slots = count()  # sessions of one shop have names of their own


class WebShop:
    """A shop, a goal, and up to a purchase; the score is WebShop's own reward.

    `path` is a checkout of princeton-nlp/WebShop. The files of products, attributes and human
    instructions are within it, or elsewhere. `search` is lucene, bm25, or auto: Lucene where
    pyserini is installed, with `index` in the place of the checkout's. A goal's number is its task
    id; `seed` draws prices and price limits, and is the same for all. `num_products` 0 takes all.

    Won is a score of 1. The engine matches options leniently, "small" with "x-small"; `strict` also
    demands that the chosen options equal the goal's.
    """

    def __init__(
        self,
        path: str,
        products: str = "data/items_shuffle_1000.json",
        attributes: str = "data/items_ins_v2_1000.json",
        human: str = "data/items_human_ins.json",
        human_goals: bool = False,
        num_products: int = 0,
        seed: int = 233,
        search: str = "auto",
        index: str = "",
        strict: bool = False,
    ) -> None:
        files = [str(Path(path, file)) for file in (products, attributes, human)]
        self._shop: Shop = open_shop(
            path, *files, human_goals, num_products, seed, search, index
        )  # fmt: skip
        self._browser: Any = self._shop.environment(  # of the engine, which has no types
            observation_mode="text", server=self._shop.server, session_prefix=f"{next(_slots)}-"
        )
        self._available: Mapping[str, Any] = {}  # the engine's actions on the present page
        self._strict = strict
        self._task = ""
        self._seed = 0
        self._steps = 0

    @staticmethod
    def check(options: Mapping[str, str | int | float | bool]) -> str | None:
        """What is missing, and the remedy, in one line; or None."""
        path = str(options.get("path", ""))
        if (problem := check_engine(path)) is not None:
            return problem
        if (search := options.get("search", "auto")) not in SEARCHES:
            return f"search: unknown value {search!r}; choose one of {', '.join(SEARCHES)}"
        files = {
            "products": "data/items_shuffle_1000.json",
            "attributes": "data/items_ins_v2_1000.json",
        }
        if options.get("human_goals"):
            files["human"] = "data/items_human_ins.json"
        for name, default in files.items():
            file = Path(path, str(options.get(name, default)))
            if not file.is_file():
                return f"{name}: no such file: {file}; the checkout's setup.sh downloads it"
        return None

    def task_ids(self, split: str) -> list[str]:
        """The numbers of a split's goals."""
        return goals_of(split, len(self._shop.server.goals))

    def reset(self, *, seed: int, options: dict[str, str]) -> tuple[str, Info]:
        """The shop's first page, with the goal's instruction."""
        number = options["task_id"]
        goals = self._shop.server.goals
        if not (number.isdecimal() and int(number) < len(goals)):
            raise ValueError(f"task {number}: there are goals 0 to {len(goals) - 1}")
        self._shop.server.user_sessions.pop(self._browser.session, None)
        self._seed = seed
        self._steps = 0
        page, _ = self._browser.reset(session=int(number))
        self._task = instruction(page)
        return page, self._info()

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        """Searches or clicks. What the page has no button for does nothing, and is valid, as in the
        released code of SDAR."""
        random.seed(f"{self._seed} {self._steps}")  # the engine draws where a query begins with <r>
        self._steps += 1
        page, reward, done, _ = self._browser.step(action)
        score = float(reward)
        won = done and score == 1.0
        if won and self._strict:
            session = self._shop.server.user_sessions[self._browser.session]
            won = are_chosen(session["options"], session["goal"]["goal_options"])
        return page, score, bool(done), False, self._info(score=score, won=won)

    def expert_action(self) -> str:
        """What buys the goal's product with its options, if the search finds it."""
        session = self._shop.server.user_sessions[self._browser.session]
        goal = session["goal"]
        options = goal["goal_options"]
        wanted = [*(options.values() if isinstance(options, Mapping) else options), "buy now"]
        clickables = self._available["clickables"]
        if self._available["has_search_bar"]:
            return f"search[{self._shop.server.product_item_dict[goal['asin']]['Title']}]"
        if goal["asin"].lower() in clickables:
            return f"click[{goal['asin'].lower()}]"
        chosen = set(session["options"].values())
        missing = (value for value in wanted if value not in chosen and value in clickables)
        return f"click[{next(missing, 'next >')}]"

    def _info(self, *, score: float = 0.0, won: bool = False) -> Info:
        self._available = self._browser.get_available_actions()
        return {
            "task": self._task,
            "task_type": "webshop",
            "admissible": admissible(self._available),
            "won": won,
            "score": score,
        }


def goals_of(split: str, count: int) -> list[str]:
    """The numbers of a split's goals among `count`: the first 500 are held out."""
    if split not in ("train", "heldout"):
        raise ValueError(f"no split {split!r}; WebShop has train and heldout")
    if count <= HELDOUT_GOALS and split == "train":
        raise ValueError(
            f"the catalogue has {count} goals, and those from {HELDOUT_GOALS} on are for training; "
            "give more products, or a file of goal numbers as environment.train"
        )
    goals = range(count)
    return [str(g) for g in (goals[HELDOUT_GOALS:] if split == "train" else goals[:HELDOUT_GOALS])]


def instruction(page: str) -> str:
    """The goal's words on the first page: WebShop [SEP] Instruction: [SEP] the words [SEP] ..."""
    return page.split(SEPARATOR)[2]


def admissible(available: Mapping[str, Any]) -> list[str]:
    """The engine's available actions as texts: the search bar, and every button, link and option.

    The engine lists the search button, and ignores a click on it.
    """
    search = [SEARCH_ACTION] if available["has_search_bar"] else []
    return search + [f"click[{name}]" for name in available["clickables"]]


def are_chosen(chosen: Mapping[str, str], wanted: Mapping[str, str] | Sequence[str]) -> bool:
    """Whether the options equal a goal's, to the letter but for case.

    Synthetic goals name every option and its value; human ones list values, of some options.
    """
    values = {name.lower(): value.lower() for name, value in chosen.items()}
    if isinstance(wanted, Mapping):
        return values == {name.lower(): value.lower() for name, value in wanted.items()}
    return {value.lower() for value in wanted} <= set(values.values())
