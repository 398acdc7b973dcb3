"""TGPO and its family: a teacher's guidance beside rewards."""

from megatron_opd.methods.advantages import ShapingAdvantage
from megatron_opd.methods.catalogue.entry import entry
from megatron_opd.methods.catalogue.shorthand import (
    GRPO,
    NO_RATIO,
    SEQUENCES,
    distil,
    reference_kl,
    reward,
    teacher,
)
from megatron_opd.methods.gates import WrongGate
from megatron_opd.methods.ratios import ClippedRatio, TeacherRatio
from megatron_opd.methods.schedules import LinearDecay, Switch, Weight
from megatron_opd.methods.terms import CrossEntropyTerm, PolicyGradientTerm

COEFFICIENT_OPEN = "the coefficient is nowhere in the paper: 0.1"
ANNEALING_OPEN = "two sources give two annealings, 5e-3 to 1e-3 and 0.2 to 2e-3: the first"


def guidance(weight: Weight) -> CrossEntropyTerm:
    """The negative log-likelihood of the teacher's argmax token, averaged per sequence."""
    return CrossEntropyTerm(
        "cross_entropy", targets="teacher_argmax", weight=weight, aggregate=SEQUENCES
    )


def shaped(shaping: ShapingAdvantage) -> PolicyGradientTerm:
    """GRPO++ with a second advantage."""
    return PolicyGradientTerm("policy_gradient", advantages={**reward(), "shaping": shaping})


ENTRIES = (
    entry(
        name="tgpo",
        summary="GRPO++ plus a constant weight times the negative log-likelihood of the teacher's "
        "argmax token",
        source="arXiv 2605.13230, Eq. 6 (its sign corrected)",
        terms={"policy": GRPO, "guidance": guidance(2e-3)},
        left_open="Eq. 3 averages per sequence, Eq. 4 over tokens: the guidance is per sequence, "
        "as printed",
    ),
    entry(
        name="tgpo_annealing",
        summary="TGPO whose guidance weight falls linearly to 0 (at step 200 with the paper's "
        "numbers)",
        source="arXiv 2605.13230, Eq. 6 and section 4",
        terms={"policy": GRPO, "guidance": guidance(LinearDecay(start=2e-3, decay=1e-5))},
    ),
    entry(
        name="tgpo_r",
        summary="GRPO++ whose advantage gains the student's own logprob of the teacher's argmax",
        source="arXiv 2605.13230, Eq. 5",
        terms={"policy": shaped(ShapingAdvantage("shaping", "argmax_logprob", weight=0.1))},
        left_open=COEFFICIENT_OPEN,
    ),
    entry(
        name="tgpo_r_indicator",
        summary="GRPO++ whose advantage gains 0.1 where it took the teacher's argmax",
        source="arXiv 2605.13230, Eq. 5 as its prose reads",
        terms={"policy": shaped(ShapingAdvantage("shaping", "argmax_indicator", weight=0.1))},
        left_open=COEFFICIENT_OPEN,
    ),
    entry(
        name="tgpo_r_teacher",
        summary="GRPO++ whose advantage gains the teacher's logprob of the token",
        source="arXiv 2605.13230, Eq. 5 as its prose reads",
        terms={"policy": shaped(ShapingAdvantage("shaping", "teacher_logprob", weight=0.1))},
        left_open=COEFFICIENT_OPEN,
    ),
    entry(
        name="rkl",
        summary="reverse KL: the advantage is the teacher's log-ratio to the sampler, the ratio is "
        "to the sampler too",
        source="On-Policy Distillation, Thinking Machines 2025",
        terms={
            "distil": distil(
                advantages=teacher(anchor="rollout"),
                ratio=ClippedRatio("rollout", clip_low=None, clip_high=None),
            )
        },
        left_open="their loss is a sum; token-mean here, so that the learning rate does not depend "
        "on the batch",
    ),
    # KDRL differentiates k2, half the squared log-ratio D: sample by sample its gradient is that
    # of -sg[D] log p, so no ratio.
    entry(
        name="kdrl",
        summary="GRPO++ plus 2e-3 times k2, half the squared log-ratio, differentiated",
        source="arXiv 2506.02208",
        terms={"policy": GRPO, "distil": distil(2e-3, ratio=NO_RATIO)},
        left_open=ANNEALING_OPEN,
    ),
    entry(
        name="kdrl_annealing",
        summary="KDRL whose weight falls from 5e-3 to 1e-3",
        source="arXiv 2506.02208",
        terms={
            "policy": GRPO,
            "distil": distil(LinearDecay(start=5e-3, decay=5e-5, floor=1e-3), ratio=NO_RATIO),
        },
        left_open=ANNEALING_OPEN,
    ),
    entry(
        name="kdrl_response_mask",
        summary="KDRL whose teacher term is on wrong responses alone",
        source="arXiv 2506.02208",
        terms={
            "policy": GRPO,
            "distil": distil(2e-3, ratio=NO_RATIO, gates={"wrong": WrongGate("wrong")}),
        },
        left_open=ANNEALING_OPEN,
    ),
    entry(
        name="kdrl_group_mask",
        summary="KDRL whose teacher term is on groups without a right response",
        source="arXiv 2506.02208",
        terms={
            "policy": GRPO,
            "distil": distil(
                2e-3, ratio=NO_RATIO, gates={"wrong": WrongGate("wrong", scope="group")}
            ),
        },
        left_open=ANNEALING_OPEN,
    ),
    entry(
        name="opd_then_rl",
        summary="reverse KL for 60 steps, then GRPO++",
        source="arXiv 2609.04108",
        terms={
            "distil": distil(Switch("switch", before=1.0, at=60, after=0.0)),
            "policy": PolicyGradientTerm(
                "policy_gradient", weight=Switch("switch", before=0.0, at=60, after=1.0)
            ),
        },
    ),
    entry(
        name="trrd",
        summary="GRPO whose ratio is to a mixture of old policy and teacher: RLAD",
        source="arXiv 2602.22495v2, Eq. 3",
        terms={
            "policy": PolicyGradientTerm(
                "policy_gradient", ratio=TeacherRatio("teacher_mixture"), aggregate=SEQUENCES
            ),
            "reference": reference_kl(1e-3),
        },
        left_open="the paper's prose swaps the ends: alpha = 1 is GRPO, as in Eq. 3; the weight of "
        "its KL: 1e-3",
    ),
)
