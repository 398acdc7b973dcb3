"""SDAR and its baselines: agents that learn from rewards, and from themselves with a text in front
of them that they did not read as they acted (`skills`, `self_teacher`)."""

from dataclasses import replace

from megatron_opd.methods.advantages import ConstantAdvantage, LogRatioFactor
from megatron_opd.methods.catalogue.entry import entry
from megatron_opd.methods.catalogue.shorthand import distil, reference_kl, reward
from megatron_opd.methods.gates import SigmoidGate
from megatron_opd.methods.ratios import ClippedRatio, TeacherEstimate
from megatron_opd.methods.schedules import LinearDecay, Weight
from megatron_opd.methods.terms import DivergenceTerm, EntropyTerm, PolicyGradientTerm, Term

SOURCE = "SDAR, arXiv 2605.15155"
GAP = SigmoidGate("sigmoid", beta=5.0, anchor="current")
DUAL_CLIPPED = ClippedRatio("old", dual_clip=3.0)
# What every method of its table has beside its rewards.
REGULARISED: dict[str, Term] = {
    "reference": reference_kl(0.01, k3_limit=10.0),
    "entropy": EntropyTerm("entropy", weight=1e-3),
}
GRPO: dict[str, Term] = {
    "policy": PolicyGradientTerm("policy_gradient", ratio=DUAL_CLIPPED),
    **REGULARISED,
}


def pulled_up(gate: SigmoidGate) -> Term:
    """SDAR's own term: the log-likelihood of the sampled token, behind a gate."""
    return distil(
        0.01,
        advantages={"each": ConstantAdvantage("constant")},
        ratio=TeacherEstimate("teacher_gap"),
        gates={"gate": gate},
    )


def away_from_teacher(weight: Weight) -> Term:
    """Skill-SD's own term: the reverse KL by k3 times the ratio, differentiated through both."""
    return distil(
        weight,
        advantages={"each": ConstantAdvantage("constant")},
        ratio=TeacherEstimate("teacher_k3"),
    )


GROUPS_OPEN = (
    "group statistics are over episodes, in the released code over rows (over=rows); its means "
    "are of micro-batches, and its reference KL is cut off at 10"
)

ENTRIES = (
    entry(
        name="grpo_agents",
        summary="GRPO with dual clip 3, a reference KL of 0.01 and an entropy bonus of 1e-3; with "
        "skills.reader=student, Skill-GRPO",
        source=f"{SOURCE}, baseline",
        terms=GRPO,
        left_open=GROUPS_OPEN,
    ),
    entry(
        name="sdar",
        summary="GRPO, and the likelihood of every sampled token, more where the self-teacher, "
        "which has read a skill, endorses it",
        source=f"{SOURCE}, as released",
        terms={**GRPO, "sdar": pulled_up(GAP)},
        left_open=f"the code's sign, which is the opposite of a distance's; {GROUPS_OPEN}",
    ),
    entry(
        name="sdar_entropy",
        summary="SDAR whose gate opens with the student's entropy",
        source=f"{SOURCE}, ablation",
        terms={**GRPO, "sdar": pulled_up(replace(GAP, signal="student_entropy"))},
        left_open="not released; no teacher is in its expected gradient",
    ),
    entry(
        name="sdar_soft_or",
        summary="SDAR whose gate opens with the student's entropy or the teacher's endorsement",
        source=f"{SOURCE}, ablation",
        terms={**GRPO, "sdar": pulled_up(replace(GAP, signal="soft_or"))},
        left_open="not released; how both are brought to one range is not said: 1 - e^-H, and a "
        "sigmoid",
    ),
    entry(
        name="sdar_fkl",
        summary="GRPO, and the forward KL over the whole vocabulary behind SDAR's gate",
        source=f"{SOURCE}, ablation",
        terms={
            **GRPO,
            "sdar": DivergenceTerm("divergence", "forward_kl", weight=0.01, gates={"gate": GAP}),
        },
        left_open="not released",
    ),
    entry(
        name="sdar_jsd",
        summary="GRPO, and the JSD with beta 0.5 over the whole vocabulary behind SDAR's gate",
        source=f"{SOURCE}, ablation",
        terms={
            **GRPO,
            "sdar": DivergenceTerm("divergence", "jsd", weight=0.01, beta=0.5, gates={"gate": GAP}),
        },
        left_open="not released",
    ),
    entry(
        name="sdar_rkl",
        summary="GRPO, and the reverse KL as a policy gradient behind SDAR's gate: its gate on a "
        "true distance",
        source="none: what the paper's words describe",
        terms={**GRPO, "sdar": distil(0.01, gates={"gate": GAP})},
    ),
    entry(
        name="opsd",
        summary="SDAR without rewards",
        source=f"{SOURCE}, baseline",
        terms={**REGULARISED, "sdar": pulled_up(GAP)},
        left_open="OPSD itself (arXiv 2601.18734) is gkd with a frozen self-teacher",
    ),
    entry(
        name="grpo_opsd",
        summary="SDAR with beta 0: the gate is a half everywhere, a uniform imitation of oneself",
        source=f"{SOURCE}, baseline",
        terms={**GRPO, "sdar": pulled_up(replace(GAP, beta=0.0))},
        left_open="as its scripts have it; no teacher is in its expected gradient",
    ),
    entry(
        name="rlsd",
        summary="the GRPO advantage of a token times a factor, larger where the self-teacher "
        "agrees with its sign, for the first 100 steps",
        source="arXiv 2604.03128, as released with SDAR",
        terms={
            "policy": PolicyGradientTerm(
                "policy_gradient",
                advantages={
                    **reward(),
                    # 0.5 (1 - k / 100), k counted from 1
                    "factor": LogRatioFactor(
                        "log_ratio_factor", weight=LinearDecay(start=0.495, decay=0.005)
                    ),
                },
                ratio=DUAL_CLIPPED,
            ),
            **REGULARISED,
        },
        left_open="100 steps as in SDAR's scripts (50 in the paper); Algorithm 1, which Eq. 16 "
        "contradicts",
    ),
    entry(
        name="skill_sd",
        summary="GRPO, and 1e-3 times the reverse KL to the self-teacher by k3, differentiated "
        "through the ratio too",
        source="arXiv 2604.10674, as released with SDAR",
        terms={**GRPO, "distil": away_from_teacher(1e-3)},
        left_open="no warm-down, as the code runs; its bandit of skills is skills.retrieval=ucb",
    ),
    entry(
        name="skill_sd_warm_down",
        summary="Skill-SD whose weight falls to 0 in 100 steps",
        source="arXiv 2604.10674; SDAR's code logs it and does not use it",
        terms={**GRPO, "distil": away_from_teacher(LinearDecay(start=9.9e-4, decay=1e-5))},
        left_open="the number of steps: RLSD's",
    ),
)
