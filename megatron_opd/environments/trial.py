"""Scripted episodes, for `megatron-opd env check`: what an environment says, and how quickly."""

import contextlib
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_opd.contracts.environments import Action, Dialogue, Exchange, Observation
from megatron_opd.environments.check import check_environment
from megatron_opd.environments.open import (
    KINDS,
    class_of,
    open_dialogue,
    open_environments,
    task_ids,
)
from megatron_opd.environments.pool import EnvironmentPool
from megatron_opd.environments.worker import GYMNASIUM_ID
from megatron_opd.errors import ConfigError, RunError
from megatron_opd.files.typed import InvalidKey, build, unknown
from megatron_opd.recipe.agents import EnvironmentConfig
from megatron_opd.recipe.load import load_config, parse_override, recipe_files, set_key

WORD = "look"  # tried where an environment neither plays itself nor lists its actions
SLOTS_PER_WORKER = 4
MEBIBYTE = 2**20


@dataclass
class Trial:
    """An episode that was played, or is."""

    task_id: str
    seen: list[Observation]
    actions: list[str] = field(default_factory=list)
    won: bool = False

    @property
    def reward(self) -> float:
        return sum(observation.reward for observation in self.seen)


def environment_of(name: str, overrides: Sequence[str]) -> EnvironmentConfig:
    """The environment of a recipe, or of a kind with keys of `environment`. Raises ConfigError."""
    if name not in KINDS and ":" not in name and not GYMNASIUM_ID.fullmatch(name):
        recipes = recipe_files()
        if name not in recipes and not Path(name).exists():
            problem = unknown("environment or recipe", name, [*KINDS, *recipes])
            raise ConfigError(f"{name}: {problem}")
        config = load_config(name, overrides).environment
        if config is None:
            raise ConfigError(f"{name}: has no environment; name a recipe that has, or a kind")
        return config
    tree: dict[str, object] = {"kind": name}
    try:
        for text in overrides:
            key, value = parse_override(text)
            set_key(tree, key.removeprefix("environment.").split("."), value)
        environment: EnvironmentConfig = build(EnvironmentConfig, tree, "environment")
    except InvalidKey as error:
        raise ConfigError(f"{error.path}: {error.problem}") from None
    return environment


def try_environment(config: EnvironmentConfig, seconds: float) -> list[str]:
    """Plays episodes for a while, and one to its end. Returns what there is to say, line by line.

    Raises ConfigError and RunError.
    """
    check_environment(config)
    with contextlib.ExitStack() as closing:
        pool = open_environments(config, closing)
        ids = {which: _ids(config, which, pool) for which in ("train", "heldout")}
        tasks = ids["train"] or ids["heldout"]
        if not tasks:
            raise ConfigError("environment.train: no tasks; give a split, a number or a file")
        played, failures, by = _play(config, pool, tasks, seconds)
        if played:
            _check_expressible(open_dialogue(config), played[0].seen[0])
        lines = [
            f"environment: {class_of(config.kind)}, {config.workers} process(es)",
            f"tasks: {len(ids['train'])} in train, {len(ids['heldout'])} in heldout",
            *_rates(pool),
            *_results(played, by),
        ]
        if failures:
            lines.append(f"failed: {len(failures)} episodes, the first one: {failures[0]}")
        if not played:
            raise RunError(f"environment {config.kind}: no episode ended: {failures[0]}")
        return [*lines, *_transcript(config, played[0])]


def _ids(config: EnvironmentConfig, which: str, pool: EnvironmentPool) -> list[str]:
    """The tasks; none of a held-out split that the environment does not have."""
    try:
        return task_ids(config, which, pool)
    except (ConfigError, RunError):
        if which == "train":
            raise
        return []


def _play(
    config: EnvironmentConfig, pool: EnvironmentPool, tasks: Sequence[str], seconds: float
) -> tuple[list[Trial], list[str], str]:
    """The episodes that ended, why others failed, and what chose the actions."""
    draw = random.Random(0)
    numbers = iter(range(len(tasks) * 10**6))
    trials: dict[int, Trial] = {}
    played: list[Trial] = []
    failures: list[str] = []
    by = set()
    deadline = float("inf")  # until the first answer: starting takes its time

    def begin(slot: int) -> None:
        number = next(numbers)
        trials[slot] = Trial(tasks[number % len(tasks)], [])
        pool.reset(slot, trials[slot].task_id, number)

    for slot in range(SLOTS_PER_WORKER * config.workers):
        begin(slot)
    while trials:
        for slot, observation in pool.ready(config.reset_seconds + config.step_seconds):
            deadline = min(deadline, time.monotonic() + seconds)
            trial = trials[slot]
            trial.seen.append(observation)
            if observation.ended or len(trial.actions) == config.max_turns:
                del trials[slot]
                if observation.failed:
                    failures.append(observation.failed)
                else:
                    trial.won = observation.won
                    played.append(trial)
                if time.monotonic() < deadline:
                    begin(slot)
                continue
            if time.monotonic() > deadline and played:
                del trials[slot]
                continue
            action, who = _chosen(pool, slot, observation, draw)
            by.add(who)
            trial.actions.append(action)
            pool.step(slot, action)
    return played, failures, " and ".join(sorted(by))


def _check_expressible(dialogue: Dialogue, observation: Observation) -> None:
    """Every listed action can be taken by a text. Raises ConfigError."""
    written = getattr(dialogue, "written", None)
    for action in observation.admissible or ():
        if written and (read := dialogue.action(written(action))) != Action(action):
            raise ConfigError(
                f"environment.dialogue: {type(dialogue).__name__} cannot express the action "
                f"{action!r}, which it reads as {read.text!r}; write a dialogue of your own"
            )


def _chosen(
    pool: EnvironmentPool, slot: int, observation: Observation, draw: random.Random
) -> tuple[str, str]:
    if expert := pool.expert_action(slot):
        return expert, "its own script"
    if observation.admissible:
        return draw.choice(observation.admissible), "random actions of those it lists"
    return WORD, f"the action {WORD!r}, since it has no script and lists no actions"


def _rates(pool: EnvironmentPool) -> list[str]:
    rates = pool.rates()
    memory = max(pool.memory_bytes(), default=0) / MEBIBYTE
    (resets, reset_seconds), (steps, step_seconds) = rates["reset"], rates["step"]
    lines = [f"resets: {resets}, {1000 * reset_seconds / max(resets, 1):.3g} ms each"]
    if steps:
        lines.append(
            f"steps: {steps}, {1000 * step_seconds / steps:.3g} ms each, "
            f"{steps / max(step_seconds, 1e-9):,.4g} per second and process"
        )
    return [*lines, f"memory: {memory:.0f} MiB a process"]


def _results(played: Sequence[Trial], by: str) -> list[str]:
    lines = [f"episodes: {len(played)}, by {by or 'nobody'}"]
    of_type: dict[str, list[Trial]] = defaultdict(list)
    for trial in played:
        of_type[trial.seen[0].task_type or "(no task_type)"].append(trial)
    width = max(map(len, of_type), default=0)
    for name, trials in sorted(of_type.items()):
        count = len(trials)
        lines.append(
            f"  {name:{width}}  {count:4} episodes  won {sum(t.won for t in trials) / count:4.0%}"
            f"  reward {sum(t.reward for t in trials) / count:.3g}"
            f"  score {sum(t.seen[-1].score for t in trials) / count:.3g}"
            f"  turns {sum(len(t.actions) for t in trials) / count:.1f}"
        )
    if not any(trial.won for trial in played) and any(trial.reward for trial in played):
        lines.append(
            "none was won, yet some earned rewards: an environment that never says `won` needs "
            "environment.reward=return, or score"
        )
    return lines


def _transcript(config: EnvironmentConfig, trial: Trial) -> list[str]:
    """An episode, and the prompt that a model would have got in its second turn."""
    lines = [f"first episode, task {trial.task_id}: {'won' if trial.won else 'not won'}"]
    for turn, observation in enumerate(trial.seen):
        reward = f"  [reward {observation.reward:g}]" if turn else ""
        lines += [f"  {line}" for line in (observation.text + reward).splitlines()]
        if turn < len(trial.actions):
            lines.append(f"  > {trial.actions[turn]}")
    turn = min(len(trial.actions), 2)
    exchanges = zip(trial.seen, trial.actions, strict=False)
    past = [Exchange(seen, action, True) for seen, action in exchanges][: turn - 1]
    prompt = open_dialogue(config).prompt(past, trial.seen[len(past)])
    lines.append(f"the prompt of turn {turn}:")
    return lines + [f"  {line}" for line in prompt.splitlines()]
