"""The graders that the protocols of suites ask for."""

import contextlib
import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import assert_never

from megatron_opd.contracts.suites import Grader, SuiteProtocol
from megatron_opd.errors import ConfigError
from megatron_opd.recipe.rewards import RewardConfig
from megatron_opd.verify.graders.choice import ChoiceGrader
from megatron_opd.verify.graders.code import CodeGrader, refusal_of
from megatron_opd.verify.graders.instructions import LONGEST, InstructionGrader, check_packages
from megatron_opd.verify.graders.maths import Judges, MathGrader
from megatron_opd.verify.open import open_judges


def open_graders(
    protocols: Mapping[str, SuiteProtocol], config: RewardConfig, closing: contextlib.ExitStack
) -> dict[str, Grader]:
    """The graders of suites by name. Those of a kind share their workers, which take seconds to
    start, in the background; `closing` ends them.

    `config` has the limits of time and length of one answer, and the number of workers. Its budget
    of a step is not used: a verdict would depend on what is graded beside it. Raises ConfigError,
    in one line, where something that a grader needs is not there.
    """

    @functools.cache
    def judges(name: str, longest: int) -> Judges:
        of_suites = replace(config, max_characters=longest, budget_seconds=math.inf)
        return open_judges(of_suites, name, closing)

    def grader(protocol: SuiteProtocol) -> Grader:
        longest = config.max_characters
        match protocol.grader:
            case "math":
                return MathGrader(judges("items", longest), protocol.grading)
            case "math_legacy":
                return MathGrader(judges("legacy", longest), protocol.grading)
            case "choice":
                return ChoiceGrader()
            case "instructions":
                check_packages()
                return InstructionGrader(judges("following", max(longest, LONGEST)))
            case "code":
                of_programs = CodeGrader(protocol.grading)
                closing.callback(of_programs.close)
                return of_programs
            case _:
                assert_never(protocol.grader)

    return {name: grader(protocol) for name, protocol in protocols.items()}


def check_grader(protocol: SuiteProtocol) -> None:
    """Raises ConfigError, in one line, where `open_graders` would. Starts nothing that stays."""
    if protocol.grader == "instructions":
        check_packages()
    if protocol.grader == "code" and (refusal := refusal_of(protocol.grading)):
        raise ConfigError(refusal)
