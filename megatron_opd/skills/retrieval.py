"""The retrievals: the words of a task, all skills, wrong ones, or what proved good."""

from collections.abc import Sequence

from megatron_opd.contracts.draws import Stream, generator
from megatron_opd.contracts.skills import Pull, Skill
from megatron_opd.skills.bandit import Bandit
from megatron_opd.skills.bank import Bank
from megatron_opd.skills.matching import Match, by_words, names_of


class _Stateless:
    """A retrieval that learns nothing."""

    def learn(self, pulls: Sequence[Pull]) -> None:
        pass

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state: dict[str, object]) -> None:
        pass


class Matching(_Stateless):
    """The categories that a task belongs to; without any, the general skills alone."""

    def __init__(self, bank: Bank, match: Match) -> None:
        self._bank = bank
        self._match = match

    def retrieve(self, task_type: str, task: str, group_key: tuple[int, int]) -> Skill:
        categories = self._match(self._bank, task_type, task)
        return Skill(names_of(categories), self._bank.text_of(categories))


class Full(_Stateless):
    """All skills for every task."""

    def __init__(self, bank: Bank) -> None:
        self._skill = Skill("full", bank.text_of(bank.categories))

    def retrieve(self, task_type: str, task: str, group_key: tuple[int, int]) -> Skill:
        return self._skill


class WrongOne(_Stateless):
    """A category that a task does not belong to, drawn once per group: a control."""

    def __init__(self, bank: Bank, seed: int) -> None:
        self._bank = bank
        self._seed = seed

    def retrieve(self, task_type: str, task: str, group_key: tuple[int, int]) -> Skill:
        right = by_words(self._bank, task_type, task)
        others = [category for category in self._bank.categories if category not in right]
        others = others or list(self._bank.categories)
        drawn = others[_draw(self._seed, group_key) % len(others)]
        return Skill(drawn.name, self._bank.text_of([drawn]))


class BestOne:
    """The category that went with most success in tasks of a kind: a bandit."""

    def __init__(self, bank: Bank, seed: int, exploration: float) -> None:
        self._bank = bank
        self._seed = seed
        self._categories = {category.name: category for category in bank.categories}
        self._bandit = Bandit(list(self._categories), exploration)

    def retrieve(self, task_type: str, task: str, group_key: tuple[int, int]) -> Skill:
        name = self._bandit.choose(task_type, _draw(self._seed, group_key))
        return Skill(name, self._bank.text_of([self._categories[name]]))

    def learn(self, pulls: Sequence[Pull]) -> None:
        self._bandit.learn(pulls)

    def state_dict(self) -> dict[str, object]:
        return self._bandit.state_dict()

    def load_state_dict(self, state: dict[str, object]) -> None:
        self._bandit.load_state_dict(state)


def _draw(seed: int, group_key: tuple[int, int]) -> int:
    step, task = group_key
    return int(generator(seed, step, task, 0, Stream.SKILL).integers(2**31))
