"""An environment, its dialogue and its skills: what episodes are played with."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from megatron_opd.contracts.environments import Dialogue, Environments
from megatron_opd.contracts.rows import Task
from megatron_opd.contracts.skills import Retriever
from megatron_opd.contracts.stations import Engine, Sampler, Tokenizer
from megatron_opd.environments.open import open_dialogue, open_environments, task_ids
from megatron_opd.recipe.agents import EnvironmentConfig
from megatron_opd.recipe.keys import EvalConfig, RunConfig
from megatron_opd.rollout.episodes import Episodes
from megatron_opd.skills.open import open_retriever
from megatron_opd.tasks.prompter import TemplatePrompter

NO_TOKENS = np.zeros(0, np.int32)


@dataclass(frozen=True)
class Agents:
    """The environments of this process, and what a model and they say to each other."""

    config: RunConfig
    environment: EnvironmentConfig
    environments: Environments
    dialogue: Dialogue
    prompter: TemplatePrompter
    retriever: Retriever | None
    tokenizer: Tokenizer

    def tasks(self, of: Literal["train", "heldout"]) -> list[Task]:
        """The tasks of a split. Raises ConfigError, RunError."""
        ids = task_ids(self.environment, of, self.environments)
        return [Task(index, task_id, "", "", NO_TOKENS) for index, task_id in enumerate(ids)]

    def sampler(self, engine: Engine, skills: Literal["recipe", "student", "none"]) -> Sampler:
        """Plays episodes. Skills are read as the recipe says, by the student, or by nobody."""
        settings = self.config.skills
        if skills == "none":
            settings = None
        elif settings and skills == "student":
            settings = replace(settings, reader="student")
        return Episodes(
            engine,
            self.environments,
            self.dialogue,
            self.prompter,
            self.tokenizer,
            self.environment,
            self.retriever if settings else None,
            settings,
        )

    def evaluating(self, engine: Engine, settings: EvalConfig) -> dict[str, Sampler]:
        """The samplers of an evaluation by the prefix of their metrics: without skills, with them,
        or both."""
        samplers = {}
        if settings.skills in ("without", "both"):
            samplers[""] = self.sampler(engine, "none")
        if settings.skills in ("with", "both"):
            prefix = "with_skills/" if settings.skills == "both" else ""
            samplers[prefix] = self.sampler(engine, "student")
        return samplers


def open_agents(config: RunConfig, tokenizer: Tokenizer, closing: ExitStack) -> Agents | None:
    """The agents of a recipe; None where its tasks are of data. `closing` ends the processes."""
    environment = config.environment
    if environment is None:
        return None
    bare = environment.history.observations == "text"
    place = config.skills.place if config.skills else "system"
    prompter = TemplatePrompter(config.data.template, tokenizer, place, bare=bare)
    retriever = open_retriever(config.skills, config.seed) if config.skills else None
    return Agents(
        config,
        environment,
        open_environments(environment, closing),
        open_dialogue(environment),
        prompter,
        retriever,
        tokenizer,
    )
