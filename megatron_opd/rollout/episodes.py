"""Episodes of many turns: a model acts, its environments answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from megatron_opd.contracts.draws import Stream, request_seed
from megatron_opd.contracts.environments import Dialogue, Environments, Exchange, Observation
from megatron_opd.contracts.rows import Episode, Row, Task
from megatron_opd.contracts.sampling import Completion, Draw, Prompter, Request
from megatron_opd.contracts.skills import Retriever
from megatron_opd.contracts.stations import Engine, Tokenizer
from megatron_opd.errors import OpdError, RunError
from megatron_opd.recipe.agents import EnvironmentConfig, SkillsConfig
from megatron_opd.rollout.history import Growing, Window, action_tokens, cut_at_action
from megatron_opd.rollout.open_episode import OpenEpisode, Turn
from megatron_opd.rollout.requests import new_episodes
from megatron_opd.world.processes import any_rank

LONGEST_WAIT_SECONDS = 1.0  # for environments, before this looks at them again
ENVIRONMENT_SEED_BITS = 31  # that every generator takes


class Episodes:
    """Plays the episodes of tasks. The turns of a cohort of episodes are sampled together.

    With several cohorts the engine continues one while the environments answer another; which
    episodes are sampled together does not depend on how long an environment takes. With `skills`
    an episode gets a privileged text: as a part of its prompts, or beside them for a teacher.
    """

    def __init__(
        self,
        engine: Engine,
        environments: Environments,
        dialogue: Dialogue,
        prompter: Prompter,
        tokenizer: Tokenizer,
        settings: EnvironmentConfig,
        retriever: Retriever | None = None,
        skills: SkillsConfig | None = None,
    ) -> None:
        self._engine = engine
        self._environments = environments
        self._dialogue = dialogue
        self._tokenizer = tokenizer
        self._settings = settings
        self._retriever = retriever
        self._skills = skills
        self._asked: set[int] = set()  # slots whose environments owe an answer
        kind = Window if settings.history.kind == "window" else Growing
        self._history = kind(dialogue, prompter, tokenizer, settings.invalid_penalty)

    def sample(self, tasks: Sequence[Task], draw: Draw) -> list[Row]:
        """The rows of `draw.samples` episodes of every task: see `Sampler.sample`.

        An episode whose environment failed has `ended` "failed", and its turns up to there. The
        episodes of a task begin alike.
        """
        played = _on_all_ranks(lambda: self._begin(tasks, draw))
        cohorts = _cohorts(played, self._settings.cohorts)
        while any_rank(any(one.ended is None for one in played)):
            _on_all_ranks(lambda: self._sample_turns(cohorts, draw))
        return [row for one in played for row in self._rows(one, draw)]

    def _begin(self, tasks: Sequence[Task], draw: Draw) -> list[OpenEpisode]:
        """Resets an environment for every episode."""
        self._let_answer()
        played = []
        for slot, episode in enumerate(new_episodes(tasks, draw.samples)):
            task = episode.task
            seed = request_seed(draw.seed, draw.step, task.index, 0, Stream.ENVIRONMENT)
            self._environments.reset(slot, task.problem, seed % 2**ENVIRONMENT_SEED_BITS)
            self._asked.add(slot)
            played.append(OpenEpisode(episode, slot))
        return played

    def _sample_turns(self, cohorts: Sequence[list[OpenEpisode]], draw: Draw) -> None:
        """The next turn of the first cohort whose environments have all answered.

        No turn is sampled where no episode of this rank is left.
        """
        asked = [self._ask(one, draw) for one in self._due(cohorts, draw)]
        asking = [one for one in asked if one is not None]
        requests = [one.request for one in asking]
        completions = self._engine.complete(requests, draw.sampling)
        for one, completion in zip(asking, completions, strict=True):
            self._act(one, completion)

    def _due(self, cohorts: Sequence[list[OpenEpisode]], draw: Draw) -> list[OpenEpisode]:
        """The open episodes to sample now; waits for environments until there are some."""
        by_slot = {one.slot: one for cohort in cohorts for one in cohort}
        while True:
            still_open = [[one for one in cohort if one.ended is None] for cohort in cohorts]
            still_open = [cohort for cohort in still_open if cohort]
            due = self._answered(still_open)
            # without cohorts, what has been answered meanwhile is sampled too
            if not still_open or (due and self._settings.cohorts):
                return due
            heard = self._ready(0.0 if due else LONGEST_WAIT_SECONDS)
            if due and not heard:
                return due
            for slot, observation in heard:
                self._hear(by_slot[slot], observation, draw)

    def _ready(self, timeout: float) -> list[tuple[int, Observation]]:
        heard = self._environments.ready(timeout)
        self._asked -= {slot for slot, _ in heard}
        return heard

    def _let_answer(self) -> None:
        """Waits for what was asked in episodes that an engine's failure has ended."""
        while self._asked:
            self._ready(LONGEST_WAIT_SECONDS)

    def _answered(self, still_open: Sequence[list[OpenEpisode]]) -> list[OpenEpisode]:
        """The first cohort of which no episode waits; without cohorts, all that do not wait."""
        if not self._settings.cohorts:
            there = [one for cohort in still_open for one in cohort if not one.waits]
            return sorted(there, key=lambda one: len(one.turns))  # those behind act first
        whole = (cohort for cohort in still_open if not any(one.waits for one in cohort))
        return next(whole, [])

    def _hear(self, one: OpenEpisode, observation: Observation, draw: Draw) -> None:
        first = not one.turns
        one.hear(observation, self._settings, self._max_tokens(draw))
        if first and not observation.failed:
            self._introduce(one, draw)

    def _max_tokens(self, draw: Draw) -> int:
        """The number of tokens that an episode may sample."""
        most = self._settings.max_turns * draw.max_tokens
        return min(self._settings.max_episode_tokens or most, most)

    def _introduce(self, one: OpenEpisode, draw: Draw) -> None:
        """Keeps what the first observation says of the task, and retrieves the episode's skill."""
        assert one.observation is not None
        seen = one.observation
        task = replace(one.episode.task, text=seen.task)
        one.episode = replace(one.episode, task=task, task_type=seen.task_type)
        if self._retriever:
            key = (draw.step, task.index)
            one.skill = self._retriever.retrieve(seen.task_type, seen.task, key)

    def _ask(self, one: OpenEpisode, draw: Draw) -> "_Asked | None":
        """The request of an episode's next turn; None ends one that has no room for it."""
        between_ids = self._history.between(one)
        plain_ids = self._history.prompt(one, between_ids, None)
        prompt_ids = plain_ids
        privileged_ids = None
        if one.skill and self._skills and not (one.turns and self._settings.grows):
            with_skill_ids = self._history.prompt(one, between_ids, one.skill)
            _check_size(one, with_skill_ids, plain_ids, self._skills)
            if self._skills.reader == "student":
                prompt_ids = with_skill_ids
            else:
                privileged_ids = with_skill_ids
        room = self._engine.max_sequence_length - len(prompt_ids)
        if room < 1:
            self._end_without_room(one, prompt_ids)
            return None
        task = one.episode.task
        left = min(draw.max_tokens, room, self._max_tokens(draw) - one.num_sampled)
        number = len(one.turns)
        seed = request_seed(draw.seed, draw.step, task.index, one.episode.sample, turn=number)
        return _Asked(one, Request(task, prompt_ids, left, seed), privileged_ids, between_ids)

    def _text(self, completion: Completion) -> str:
        return self._tokenizer.decode(completion.token_ids, skip_special_tokens=True)

    def _end_without_room(self, one: OpenEpisode, prompt_ids: np.ndarray) -> None:
        if not one.turns:
            raise RunError(
                f"environment task {one.episode.task.problem}: its first prompt has "
                f"{len(prompt_ids)} tokens and leaves no room for an answer; raise "
                f"max_sequence_length above {self._engine.max_sequence_length}"
            )
        one.ended = "length"

    def _act(self, asked: "_Asked", completion: Completion) -> None:
        """Sends the action in a completion to its episode's environment."""
        one = asked.episode
        assert one.observation is not None
        text = self._text(completion)
        if self._settings.grows:
            completion = cut_at_action(completion, text, self._dialogue, self._tokenizer)
            text = self._text(completion)
        action = self._dialogue.action(text)
        turn = Turn(
            asked.request.prompt_ids,
            asked.privileged_ids,
            completion,
            text,
            asked.between_ids,
            action_tokens(completion, text, action.text, self._tokenizer),
        )
        one.turns.append(turn)
        one.exchanges.append(Exchange(one.observation, action.text, action.valid))
        one.observation = None
        self._environments.step(one.slot, action.text)
        self._asked.add(one.slot)

    def _rows(self, one: OpenEpisode, draw: Draw) -> list[Row]:
        episode = one.finished(self._settings)
        return self._history.rows(one, episode, draw.version) or [_without_turns(episode)]


@dataclass(frozen=True)
class _Asked:
    """The request of an episode's next turn, and what its row will need."""

    episode: OpenEpisode
    request: Request
    privileged_ids: np.ndarray | None
    between_ids: np.ndarray


def _without_turns(episode: Episode) -> Row:
    """A row without tokens, so that an episode that failed at its reset is counted."""
    nothing = np.zeros(0, np.int32)
    logprobs = np.zeros(0, np.float32)
    sources = np.zeros(0, np.int8)
    return Row(episode, nothing, nothing, sources, logprobs, nothing, "", "stop")


def _check_size(
    one: OpenEpisode, with_skill_ids: np.ndarray, plain_ids: np.ndarray, skills: SkillsConfig
) -> None:
    """Raises RunError for a skill that adds more tokens than it may."""
    added = len(with_skill_ids) - len(plain_ids)
    if one.skill and added > skills.max_tokens:
        raise RunError(
            f"skills.bank: skill {one.skill.name} adds {added} tokens to a prompt, more than "
            f"skills.max_tokens={skills.max_tokens}; raise it, or shorten the skill"
        )


def _cohorts(played: Sequence[OpenEpisode], count: int) -> list[list[OpenEpisode]]:
    """The episodes in `count` blocks of equal size, which keep their order; 0: in one."""
    count = max(count, 1)
    borders = [len(played) * number // count for number in range(count + 1)]
    return [list(played[a:b]) for a, b in pairwise(borders)]


def _on_all_ranks[T](work: Callable[[], T]) -> T:
    """The result of `work`; the error of one rank is raised on all, as a RunError. Collective."""
    failure = None
    try:
        result = work()
    except OpdError as error:
        failure = RunError(str(error))
    if any_rank(failure is not None):
        raise failure or RunError("the environments or the engine of another rank failed")
    return result
