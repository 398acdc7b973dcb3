"""Methods that learn from rewards or traces alone, without a teacher."""

from megatron_opd.methods.advantages import ProcessRewardAdvantage, RewardAdvantage
from megatron_opd.methods.catalogue.entry import entry
from megatron_opd.methods.catalogue.shorthand import (
    GRPO,
    SEQUENCES,
    TRACE,
    UNCLIPPED,
    reference_kl,
    reward,
)
from megatron_opd.methods.ratios import ClippedRatio, DetachedRatio, ShapedProbability
from megatron_opd.methods.terms import EntropyTerm, PolicyGradientTerm

ENTRIES = (
    entry(
        name="sft",
        summary="negative log-likelihood of the data set's own responses, token-mean",
        source="arXiv 2605.13230, baseline",
        terms={"trace": TRACE},
    ),
    entry(
        name="grpo",
        summary="group-normalised rewards, clipped ratio, mean per sequence, no reference KL",
        source="arXiv 2402.03300, Eq. 3 without its KL term",
        terms={"policy": PolicyGradientTerm("policy_gradient", aggregate=SEQUENCES)},
    ),
    entry(
        name="grpo++",
        summary="GRPO without KL, averaged over tokens",
        source="arXiv 2605.13230, Eq. 4",
        terms={"policy": GRPO},
        left_open="Eq. 4 has no clip; 0.2, the default of the code base the paper used",
    ),
    entry(
        name="dr_grpo",
        summary="rewards only centred, sums over tokens divided by the longest response: "
        "Dr. GRPO, Oat-Zero",
        source="arXiv 2503.20783",
        terms={
            "policy": PolicyGradientTerm(
                "policy_gradient", advantages=reward("mean"), aggregate="seq-mean-token-sum-norm"
            )
        },
    ),
    entry(
        name="simplerl_zero",
        summary="GRPO with a reference KL of 1e-4 and an entropy bonus of 1e-3",
        source="SimpleRL-Zero, arXiv 2503.18892",
        terms={
            "policy": GRPO,
            "reference": reference_kl(1e-4),
            "entropy": EntropyTerm("entropy", weight=1e-3),
        },
    ),
    entry(
        name="dapo",
        summary="GRPO++ with clip-higher 0.2 / 0.28, overlong punishment, and groups of equal "
        "rewards sampled anew",
        source="arXiv 2503.14476",
        terms={
            "policy": PolicyGradientTerm(
                "policy_gradient",
                advantages={"reward": RewardAdvantage("reward", overlong=0.2)},
                ratio=ClippedRatio("old", clip_low=0.2, clip_high=0.28),
            )
        },
        max_refills=10,
    ),
    entry(
        name="prime",
        summary="leave-one-out rewards plus the log-ratio of a model, trained beside to tell right "
        "from wrong, as reward of every token",
        source="arXiv 2502.01456, Eq. 5 and Algorithm 1",
        terms={
            "policy": PolicyGradientTerm(
                "policy_gradient",
                advantages={
                    **reward("leave_one_out"),
                    "process": ProcessRewardAdvantage("process_reward"),
                },
                whiten=True,
            )
        },
        max_refills=10,
        left_open="tokens are scored before the process model's update, one update a step, their "
        "rewards not normalised (the code base has other options); its filter, 0.2 to 0.8 of 4 "
        "samples right, is that of unequal rewards",
    ),
    entry(
        name="gspo",
        summary="GRPO whose ratio is the sequence's geometric mean",
        source="arXiv 2507.18071, Eq. 14",
        terms={
            "policy": PolicyGradientTerm(
                "policy_gradient",
                ratio=ClippedRatio("sequence", clip_low=3e-4, clip_high=4e-4),
                aggregate=SEQUENCES,
            )
        },
    ),
    entry(
        name="cispo",
        summary="GRPO whose clipped ratio is a detached weight: no token loses its gradient",
        source="arXiv 2506.13585",
        terms={"policy": PolicyGradientTerm("policy_gradient", ratio=DetachedRatio("detached"))},
        left_open="upper bound 1 + 5, as in ScaleRL; no lower one",
    ),
    entry(
        name="luffy",
        summary="each group holds a trace; its tokens have the shaped probability p / (p + 0.1) "
        "as ratio",
        source="arXiv 2504.14945",
        terms={
            "on_policy": PolicyGradientTerm(
                "policy_gradient",
                advantages=reward("mean"),
                ratio=UNCLIPPED,
                aggregate="seq-mean-token-sum-norm",
                denominator="all",
            ),
            "off_policy": PolicyGradientTerm(
                "policy_gradient",
                advantages=reward("mean"),
                ratio=ShapedProbability("shaped"),
                aggregate="seq-mean-token-sum-norm",
                denominator="all",
            ),
            "entropy": EntropyTerm("entropy", weight=1e-3),
        },
        traces_per_group=1,
    ),
)
