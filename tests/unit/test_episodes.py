"""Episodes: what is sampled, what the environments hear, and the rows that it all becomes."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_opd.contracts.draws import Stream, request_seed
from megatron_opd.contracts.environments import Action, Exchange, Observation
from megatron_opd.contracts.rows import Row, Source
from megatron_opd.contracts.sampling import Completion, Draw, Request, Sampling
from megatron_opd.contracts.skills import Skill
from megatron_opd.errors import RunError
from megatron_opd.recipe.agents import EnvironmentConfig, HistoryConfig, SkillsConfig
from megatron_opd.rollout.episodes import ENVIRONMENT_SEED_BITS, Episodes
from tests.rows import task

DRAW = Draw(seed=7, step=3, version=3, samples=2, max_tokens=6, temperature=1.0)
SETTINGS = EnvironmentConfig("test", max_turns=4, invalid_penalty=0.25, reward_scale=10.0)
END = 0  # the token that ends an answer; the others are characters


def ids(text: str) -> list[int]:
    return [ord(character) for character in text]


class Characters:
    """A tokenizer of one token per character."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        return "".join(chr(i) for i in token_ids if i != END)


class Prompter:
    def prompt(self, words: str, skill: Skill | None = None) -> np.ndarray:
        return np.array(ids((skill.text if skill else "") + words), np.int32)

    def continuation(self, words: str, *, ended: bool) -> np.ndarray:
        return np.array(ids(words) if ended else [END, *ids(words)], np.int32)


class Dialogue:
    """Prompts that list what was done, and actions that begin with "a"."""

    def prompt(self, past: Sequence[Exchange], observation: Observation) -> str:
        done = "".join(f"({exchange.action})" for exchange in past)
        return f"{observation.task}{done}{observation.text}?"

    def reply(self, observation: Observation) -> str:
        return f"[{observation.text}]"

    def action(self, text: str) -> Action:
        return Action(text, valid=text.startswith("a"))

    def end_of_action(self, text: str) -> int | None:
        return text.index(";") + 1 if ";" in text else None


class Countdown:
    """The protocol `Environments`: a task's number of actions wins; answers arrive when asked for,
    the last slot's first, `at_once` of them."""

    def __init__(self, at_once: int = 100, broken: Sequence[str] = ()) -> None:
        self.left: dict[int, int] = {}
        self.first: dict[int, Observation] = {}
        self.heard: dict[int, list[str]] = {}
        self.seeds: dict[int, int] = {}
        self.answers: deque[tuple[int, Observation]] = deque()
        self.at_once = at_once
        self.broken = broken

    def reset(self, slot: int, task_id: str, seed: int) -> None:
        assert slot not in [waiting for waiting, _ in self.answers], "a call is open"
        self.left[slot] = int(task_id)
        self.heard[slot] = []
        self.seeds[slot] = seed
        failed = "hung" if "reset" in self.broken and slot == 1 else ""
        said = Observation(f"o{task_id}", task=f"t{task_id}", task_type="count", failed=failed)
        self.first[slot] = said
        self.answers.appendleft((slot, said))

    def step(self, slot: int, action: str) -> None:
        self.heard[slot].append(action)
        self.left[slot] -= 1
        won = self.left[slot] == 0
        failed = "died" if "step" in self.broken and slot == 1 else ""
        said = replace(
            self.first[slot], text=f"l{self.left[slot]}", reward=0.5, terminated=won, won=won,
            failed=failed,
        )  # fmt: skip
        self.answers.appendleft((slot, said))

    def ready(self, timeout: float) -> list[tuple[int, Observation]]:
        return [self.answers.popleft() for _ in range(min(self.at_once, len(self.answers)))]

    def task_ids(self, split: str) -> list[str]:
        return []

    def close(self) -> None:
        pass


class FailsOnce:
    """An engine that fails at one of its calls, and goes on when it is asked again."""

    def __init__(self, at: int) -> None:
        self.inner = Writer()
        self.max_sequence_length = self.inner.max_sequence_length
        self.left = at

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        self.left -= 1
        if self.left == 0:
            raise RunError("no block left")
        return self.inner.complete(requests, sampling)


class Writer:
    """An engine that writes `a` and a digit of its seed, or what it is told; it keeps its calls."""

    def __init__(self, text: str | None = None, room: int = 100) -> None:
        self.max_sequence_length = room
        self.calls: list[list[Request]] = []
        self.text = text

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        assert sampling == DRAW.sampling
        self.calls.append(list(requests))
        return [self.answer(request) for request in requests]

    def answer(self, request: Request) -> Completion:
        text = self.text or f"a{request.seed % 10}"
        token_ids = [*ids(text), END][: request.max_tokens]
        reason = "stop" if token_ids[-1] == END else "length"
        logprobs = [-float(place + 1) for place in range(len(token_ids))]
        return Completion(token_ids, logprobs, reason)


def play(
    settings: EnvironmentConfig = SETTINGS,
    *,
    lengths: Sequence[int] = (1, 3),
    world: Countdown | None = None,
    engine: Writer | None = None,
    skills: SkillsConfig | None = None,
) -> tuple[list[Row], Countdown, Writer]:
    world = world or Countdown()
    engine = engine or Writer()
    retriever: Any = SimpleNamespace(retrieve=lambda *asked: Skill("how", f"<{asked[0]}>"))
    sampler = Episodes(
        engine,  # type: ignore[arg-type]
        world,
        Dialogue(),
        Prompter(),
        Characters(),
        settings,
        retriever if skills else None,
        skills,
    )
    tasks = [task(5 + place, problem=str(n)) for place, n in enumerate(lengths)]
    return sampler.sample(tasks, DRAW), world, engine


def said(row: Row) -> str:
    return Characters().decode(row.token_ids.tolist())


def test_every_turn_is_a_row_behind_the_turns_before() -> None:
    rows, world, _ = play()
    assert [(row.group, row.sample, row.turn) for row in rows] == [
        (0, 0, 0), (0, 1, 0), *((1, sample, turn) for sample in (0, 1) for turn in range(3)),
    ]  # fmt: skip
    last = rows[-1]
    done = world.heard[3]
    assert Characters().decode(last.prompt_ids.tolist()) == f"t3({done[0]})({done[1]})l1?"
    assert last.text == done[2] and said(last) == done[2] and last.finish_reason == "stop"
    assert last.logprobs.tolist() == [-1.0, -2.0, -3.0] and set(last.versions) == {3}
    assert (last.episode.turns, last.episode.ended, last.reward) == (3, "stop", 10.0)
    assert (
        last.verdict.reason == "won" and last.verdict.correct and last.episode.task_type == "count"
    )
    assert [row.exchanges[0].reward for row in rows] == [0.5] * 8
    assert last.exchanges[0].observation.text == "l1" and last.task.text == "t3"


def test_a_growing_episode_is_one_row_with_the_environments_words_inside() -> None:
    growing = replace(SETTINGS, history=HistoryConfig("growing"))
    rows, world, engine = play(growing)
    assert len(rows) == 4
    row = rows[2]
    first, second, third = world.heard[2]
    assert said(row) == f"{first}[l2]{second}[l1]{third}"
    heard = [i for i, source in enumerate(row.sources) if source == Source.ENVIRONMENT]
    assert Characters().decode(row.token_ids[heard].tolist()) == "[l2][l1]"
    assert set(row.versions[heard]) == {-1} and set(row.logprobs[heard]) == {0.0}
    assert row.turn_T.max() == 2 and row.end_T.sum() == 3
    assert row.action_T is not None
    assert Characters().decode(row.token_ids[row.action_T].tolist()) == first + second + third
    # token in, token out: each request continues exactly what was sampled and said
    whole = [*row.prompt_ids, *row.token_ids]
    asked = [r for call in engine.calls for r in call if r.task.index == 6]
    longest = max((r for r in asked if len(r.prompt_ids) > 10), key=lambda r: len(r.prompt_ids))
    assert longest.prompt_ids.tolist() in (
        whole[: len(longest.prompt_ids)],
        longest.prompt_ids.tolist(),
    )
    assert whole[: len(longest.prompt_ids)][-4:] == ids("[l1]")


def test_draws_depend_on_the_task_the_sample_and_the_turn() -> None:
    rows, world, engine = play()
    seeds = {request.seed for call in engine.calls for request in call}
    expected = {request_seed(7, 3, row.task.index, row.sample, turn=row.turn) for row in rows}
    assert seeds == expected and len(seeds) == len(rows)
    group = request_seed(7, 3, 6, 0, Stream.ENVIRONMENT) % 2**ENVIRONMENT_SEED_BITS
    assert world.seeds[2] == world.seeds[3] == group != world.seeds[0]


@pytest.mark.parametrize("history", ["window", "growing"])
@pytest.mark.parametrize(("cohorts", "at_once"), [(1, 1), (2, 1), (3, 2), (8, 100)])
def test_cohorts_and_the_order_of_answers_change_no_row(
    history: Any, cohorts: int, at_once: int
) -> None:
    settings = replace(SETTINGS, history=HistoryConfig(history))
    expected, _, _ = play(settings, lengths=(1, 3, 2, 9))
    world = Countdown(at_once)
    rows, _, engine = play(replace(settings, cohorts=cohorts), lengths=(1, 3, 2, 9), world=world)
    assert [str(row) for row in rows] == [str(row) for row in expected]
    sizes = [len(call) for call in engine.calls]
    assert max(sizes) == -(-8 // cohorts)  # a turn of a whole cohort is one call


class OneByOne(Countdown):
    """Answers one slot at a time, and only to who waits."""

    def ready(self, timeout: float) -> list[tuple[int, Observation]]:
        return super().ready(timeout) if timeout else []


@pytest.mark.parametrize("history", ["window", "growing"])
@pytest.mark.parametrize(("world", "largest"), [(Countdown, 8), (OneByOne, 1)])
def test_without_cohorts_nobody_waits_for_another(history: Any, world: Any, largest: int) -> None:
    settings = replace(SETTINGS, history=HistoryConfig(history))
    expected, _, _ = play(settings, lengths=(1, 3, 2, 9))
    settings = replace(settings, cohorts=0)
    rows, _, engine = play(settings, lengths=(1, 3, 2, 9), world=world(at_once=1))
    assert [str(row) for row in rows] == [str(row) for row in expected]
    assert max(len(call) for call in engine.calls) == largest


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_episodes_begin_again_after_an_engine_has_failed(at: int) -> None:
    """The environments of the other cohort may still owe an answer of the attempt before."""
    settings = replace(SETTINGS, cohorts=2)
    expected, _, _ = play(settings, lengths=(1, 3, 2, 9))
    sampler = Episodes(
        FailsOnce(at),  # type: ignore[arg-type]
        Countdown(at_once=1),
        Dialogue(),
        Prompter(),
        Characters(),
        settings,
    )
    tasks = [task(5 + place, problem=str(n)) for place, n in enumerate((1, 3, 2, 9))]
    with pytest.raises(RunError, match="no block left"):
        sampler.sample(tasks, DRAW)
    assert [str(row) for row in sampler.sample(tasks, DRAW)] == [str(row) for row in expected]


def test_turns_budgets_and_room_end_an_episode() -> None:
    rows, _, _ = play(lengths=(9,))
    assert {row.episode.ended for row in rows} == {"turns"} and rows[-1].turn == 3
    assert not rows[0].verdict.correct and rows[0].verdict.reason == "lost" and rows[0].reward == 0
    rows, _, _ = play(replace(SETTINGS, max_episode_tokens=5), lengths=(9,))
    assert [row.num_tokens for row in rows[:2]] == [3, 2]  # the last turn is cut at the budget
    assert {row.episode.ended for row in rows} == {"budget"} and rows[1].finish_reason == "length"
    engine = Writer(room=len("t9(a1)l8?") + 1)
    rows, _, _ = play(lengths=(9,), engine=engine)
    assert {row.episode.ended for row in rows} == {"length"} and rows[-1].num_tokens == 1
    with pytest.raises(RunError, match=r"task 9: its first prompt has 5 tokens .* max_sequence"):
        play(lengths=(9,), engine=Writer(room=5))


def test_an_invalid_action_costs_its_row_and_is_played() -> None:
    rows, world, _ = play(engine=Writer("bad"), lengths=(2,))
    assert world.heard[0] == ["bad", "bad"]
    assert [row.reward for row in rows] == [9.75] * 4 and {r.episode.reward for r in rows} == {10.0}
    growing = replace(SETTINGS, history=HistoryConfig("growing"))
    rows, _, _ = play(growing, engine=Writer("bad"), lengths=(2,))
    assert [row.penalty for row in rows] == [0.5, 0.5]


@pytest.mark.parametrize(("reward", "worth"), [("won", 10.0), ("score", 10.0), ("return", 15.0)])
def test_an_episode_earns_what_the_recipe_says(reward: Any, worth: float) -> None:
    rows, _, _ = play(replace(SETTINGS, reward=reward), lengths=(3,))
    assert {row.reward for row in rows} == {worth}


@pytest.mark.parametrize("history", ["window", "growing"])
@pytest.mark.parametrize(("broken", "tokens"), [("reset", 0), ("step", 3)])
def test_an_episode_whose_environment_breaks_is_marked_and_the_others_go_on(
    history: Any, broken: str, tokens: int
) -> None:
    settings = replace(SETTINGS, history=HistoryConfig(history))
    rows, _, _ = play(settings, lengths=(3,), world=Countdown(broken=[broken]))
    failed = [row for row in rows if row.episode.ended == "failed"]
    assert [(row.sample, row.num_tokens) for row in failed] == [(1, tokens)]
    assert failed[0].verdict.reason in ("hung", "died") and failed[0].verdict.correct is None
    assert {row.episode.turns for row in rows if row.sample == 0} == {3}


def test_a_growing_answer_ends_where_the_environment_takes_over() -> None:
    growing = replace(SETTINGS, history=HistoryConfig("growing"))
    rows, world, _ = play(growing, engine=Writer("a;bcd"), lengths=(2,))
    assert world.heard[0] == ["a;", "a;"]
    assert said(rows[0]) == "a;[l1]a;" and rows[0].finish_reason == "stop"
    rows, world, _ = play(engine=Writer("a;bcd"), lengths=(2,))
    assert world.heard[0] == ["a;bcd", "a;bcd"]  # a turn of its own is kept whole


@pytest.mark.parametrize("history", ["window", "growing"])
def test_a_skill_is_the_teachers_beside_the_prompt_or_the_students_within(history: Any) -> None:
    settings = replace(SETTINGS, history=HistoryConfig(history))
    plain, _, _ = play(settings)
    rows, _, _ = play(settings, skills=SkillsConfig("bank", max_tokens=7))
    for row, without in zip(rows, plain, strict=True):
        assert row.episode.skill == "how" and without.privileged_ids is None
        assert row.privileged_ids is not None
        assert row.privileged_ids.tolist() == [*ids("<count>"), *without.prompt_ids]
        assert str(replace(row, privileged_ids=None, episode=without.episode)) == str(without)
    rows, _, _ = play(settings, skills=SkillsConfig("bank", reader="student", max_tokens=7))
    for row, without in zip(rows, plain, strict=True):
        assert row.privileged_ids is None
        assert row.prompt_ids[:7].tolist() == ids("<count>")
        assert len(row.prompt_ids) == len(without.prompt_ids) + 7
    with pytest.raises(RunError, match=r"skill how adds 7 tokens .* skills.max_tokens=6; raise it"):
        play(settings, skills=SkillsConfig("bank", max_tokens=6))
