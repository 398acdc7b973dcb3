"""Distillation on the student's samples with other weights, baselines and scales of the log-ratio,
and what remains of it without a teacher."""

from megatron_opd.methods.advantages import (
    ConstantAdvantage,
    EntropyAdvantage,
    LogRatioAdvantage,
    ProximalReturnAdvantage,
    StateAdvantage,
)
from megatron_opd.methods.catalogue.entry import entry
from megatron_opd.methods.catalogue.shorthand import distil, teacher
from megatron_opd.methods.gates import DriftGate, LogprobQuantileGate
from megatron_opd.methods.ratios import ClippedRatio

LEAST_LIKELY = LogprobQuantileGate("logprob_quantile", bottom=0.2)

ENTRIES = (
    entry(
        name="exopd",
        summary="OPD whose reward log T - log R is scaled by 1.25, beyond the teacher: the "
        "advantage is 1.25 (T - S) - 0.25 (R - S)",
        source="G-OPD, arXiv 2602.12125",
        terms={
            "distil": distil(
                advantages={
                    "teacher": LogRatioAdvantage("log_ratio", weight=1.25),
                    "reference": LogRatioAdvantage("log_ratio", weight=-0.25, model="reference"),
                }
            )
        },
        left_open="lambda is 1.25; the reference is the student as the run found it, where the "
        "paper also takes the teacher's own base model",
    ),
    entry(
        name="vopd",
        summary="OPD with the state's value, minus KL(student, teacher) over the whole vocabulary, "
        "as a detached baseline",
        source="arXiv 2605.07865",
        terms={
            "distil": distil(advantages={**teacher(), "baseline": StateAdvantage("state_kl")}),
        },
        left_open="the baseline over the whole vocabulary, not over a top k",
    ),
    entry(
        name="iw_opd",
        summary="OPD whose tokens count 1 + 0.5 times the share of the row's drift from the "
        "teacher that is not yet behind them",
        source="arXiv 2606.22600, Algorithm 1",
        terms={
            "distil": distil(
                advantages=teacher(anchor="rollout"),
                ratio=ClippedRatio("old", dual_clip=3.0),
                gates={"drift": DriftGate("drift", gamma=0.5)},
            )
        },
    ),
    entry(
        name="opsa",
        summary="no teacher, no reward: an advantage from -0.5 to -1, with the token's entropy, on "
        "the 20 % of tokens that the student thought least likely",
        source="arXiv 2608.31046",
        terms={
            "suppress": distil(
                advantages={
                    "constant": ConstantAdvantage("constant", weight=-0.5),
                    "entropy": EntropyAdvantage("entropy", weight=-0.5),
                },
                gates={"least_likely": LEAST_LIKELY},
                denominator="gated",
            )
        },
        left_open="the lowest and highest entropy are those of all tokens of the update",
    ),
    entry(
        name="opsa_fixed",
        summary="OPSA with the same advantage of -1 for all of its tokens",
        source="arXiv 2608.31046, control",
        terms={
            "suppress": distil(
                advantages={"constant": ConstantAdvantage("constant", weight=-1.0)},
                gates={"least_likely": LEAST_LIKELY},
                denominator="gated",
            )
        },
    ),
    entry(
        name="top_d",
        summary="the log-ratio to a mixture of teacher and sampler, plus its mean over the tokens "
        "behind, z-scored over the group's tokens",
        source="TOP-D, arXiv 2607.04751, Eq. 8",
        terms={
            "distil": distil(
                advantages={"proximal": ProximalReturnAdvantage("proximal_return", mix=0.5)},
                ratio=ClippedRatio("rollout"),
            )
        },
        left_open="alpha is 0.5; PPO's clip in the place of the trust-region masks. Another "
        "project calls this method TROPD, which here is another one",
    ),
)
