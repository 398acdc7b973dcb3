"""The grader that a suite's protocol asks for."""

import contextlib
from dataclasses import replace
from typing import assert_never

from megatron_opd.contracts.suites import Grader, SuiteProtocol
from megatron_opd.recipe.keys import RewardConfig
from megatron_opd.verify.graders.choice import ChoiceGrader
from megatron_opd.verify.graders.code import CodeGrader
from megatron_opd.verify.graders.instructions import LONGEST, InstructionGrader, check_packages
from megatron_opd.verify.graders.maths import MathGrader
from megatron_opd.verify.open import open_judges


def open_grader(
    protocol: SuiteProtocol, config: RewardConfig, closing: contextlib.ExitStack
) -> Grader:
    """The protocol's grader. Its workers start in the background; `closing` ends them.

    `config` has the limits of time and length, and the number of workers. Raises ConfigError, in
    one line, where something that the grader needs is not there.
    """
    match protocol.grader:
        case "math":
            return MathGrader(open_judges(config, "items", closing), protocol.grading)
        case "math_legacy":
            return MathGrader(open_judges(config, "legacy", closing), protocol.grading)
        case "choice":
            return ChoiceGrader()
        case "instructions":
            check_packages()
            limits = replace(config, max_characters=max(config.max_characters, LONGEST))
            return InstructionGrader(open_judges(limits, "following", closing))
        case "code":
            grader = CodeGrader(protocol.grading)
            closing.callback(grader.close)
            return grader
        case _:
            assert_never(protocol.grader)
