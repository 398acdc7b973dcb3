"""The catalogue: a name, the paper it comes from, and the terms of its loss.

`method: NAME` in a recipe takes an entry as it is; `method: {name: NAME, <term>: {<key>: ...}}`
changes keys of it. Formulas, and what the papers leave open: docs/methods.md.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from megatron_opd.methods.advantages import (
    Advantage,
    LogRatioAdvantage,
    ProcessRewardAdvantage,
    RewardAdvantage,
    ShapingAdvantage,
    TopKAdvantage,
)
from megatron_opd.methods.gates import (
    EntropyGate,
    EntropyQuantileGate,
    LogRatioGate,
    ProbabilityGapGate,
    TrustGate,
    WrongGate,
)
from megatron_opd.methods.ratios import (
    ClippedRatio,
    DetachedRatio,
    NoRatio,
    Ratio,
    ShapedProbability,
    TeacherRatio,
)
from megatron_opd.methods.schedules import LinearDecay, Switch, Weight
from megatron_opd.methods.terms import (
    Aggregate,
    CrossEntropyTerm,
    DivergenceTerm,
    EntropyTerm,
    MethodConfig,
    PolicyGradientTerm,
    PrefixConfig,
    Term,
    TopKTerm,
)

SEQUENCES: Aggregate = "seq-mean-token-mean"
_UNCLIPPED = ClippedRatio("old", None, None)


@dataclass(frozen=True)
class CatalogueEntry:
    method: MethodConfig
    summary: str
    source: str
    open: str = ""  # what the paper leaves open, and what is chosen here


CATALOGUE: dict[str, CatalogueEntry] = {}


def _add(
    name: str,
    summary: str,
    source: str,
    terms: dict[str, Term],
    *,
    left_open: str = "",
    **beside: Any,
) -> None:
    CATALOGUE[name] = CatalogueEntry(
        MethodConfig(name, terms, **beside), summary, source, left_open
    )


# -------------------------------------------------------------------------------------------- parts
def _policy(**keys: Any) -> PolicyGradientTerm:
    return PolicyGradientTerm("policy_gradient", **keys)


def _reward(normalise: Any = "std") -> dict[str, Advantage]:
    return {"reward": RewardAdvantage("reward", normalise=normalise)}


def _of_teacher(weight: Weight = 1.0, **keys: Any) -> dict[str, Advantage]:
    return {"teacher": LogRatioAdvantage("log_ratio", weight=weight, **keys)}


def _distil(weight: Weight = 1.0, ratio: Ratio = _UNCLIPPED, **keys: Any) -> PolicyGradientTerm:
    """The reverse KL on the student's samples: -rho sg[log q - log p]."""
    advantages = keys.pop("advantages", None) or _of_teacher()
    return PolicyGradientTerm(
        "policy_gradient", weight=weight, advantages=advantages, ratio=ratio, **keys
    )


def _reference(weight: float) -> PolicyGradientTerm:
    """weight * k3 of KL(student || reference), whose gradient is that of -sg[e^D - 1] log p."""
    advantages: dict[str, Advantage] = {
        "reference": LogRatioAdvantage("log_ratio", model="reference", transform="expm1")
    }
    return PolicyGradientTerm(
        "policy_gradient", weight=weight, advantages=advantages, ratio=NoRatio("none")
    )


def _guidance(weight: Weight) -> CrossEntropyTerm:
    return CrossEntropyTerm(
        "cross_entropy", targets="teacher_argmax", weight=weight, aggregate=SEQUENCES
    )


def _topk(k: int, **keys: Any) -> TopKTerm:
    return TopKTerm("topk", k=k, **keys)


_grpo = _policy()
_trace = CrossEntropyTerm("cross_entropy", targets="trace")
_FLOOR = math.log(0.3) / 0.7

# fmt: off
# ------------------------------------------------------------------------------------ rewards alone
_add("sft", "negative log-likelihood of the data set's own responses, token-mean", "arXiv 2605.13230, baseline",
     {"trace": _trace})
_add("grpo", "group-normalised rewards, clipped ratio, mean per sequence, no reference KL",
     "arXiv 2402.03300, Eq. 3 without its KL term", {"policy": _policy(aggregate=SEQUENCES)})
_add("grpo++", "GRPO without KL, averaged over tokens", "arXiv 2605.13230, Eq. 4", {"policy": _grpo},
     left_open="Eq. 4 has no clip; 0.2, the default of the code base the paper used")
_add("dr_grpo", "rewards only centred, sums over tokens divided by the longest response: Dr. GRPO, Oat-Zero",
     "arXiv 2503.20783", {"policy": _policy(advantages=_reward("mean"), aggregate="seq-mean-token-sum-norm")})
_add("simplerl_zero", "GRPO with a reference KL of 1e-4 and an entropy bonus of 1e-3", 
     "SimpleRL-Zero, arXiv 2503.18892",
     {"policy": _grpo, "reference": _reference(1e-4), "entropy": EntropyTerm("entropy", weight=1e-3)})
_add("dapo", "GRPO++ with clip-higher 0.2 / 0.28, overlong punishment, and groups of equal rewards sampled anew",
     "arXiv 2503.14476",
     {"policy": _policy(ratio=ClippedRatio("old", 0.2, 0.28),
                        advantages={"reward": RewardAdvantage("reward", overlong=0.2)})},
     max_refills=10)
_add("prime", "leave-one-out rewards plus the log-ratio of a model, trained beside to tell right from wrong, as reward "
     "of every token", "arXiv 2502.01456, Eq. 5 and Algorithm 1",
     {"policy": _policy(advantages=_reward("leave_one_out") | {"process": ProcessRewardAdvantage("process_reward")},
                        whiten=True)},
     max_refills=10,
     left_open="tokens are scored before the process model's update, one update a step, their rewards not normalised "
     "(the code base has other options); its filter, 0.2 to 0.8 of 4 samples right, is that of "
     "unequal rewards")
_add("gspo", "GRPO whose ratio is the sequence's geometric mean", "arXiv 2507.18071, Eq. 14",
     {"policy": _policy(ratio=ClippedRatio("sequence", 3e-4, 4e-4), aggregate=SEQUENCES)})
_add("cispo", "GRPO whose clipped ratio is a detached weight: no token loses its gradient", "arXiv 2506.13585",
     {"policy": _policy(ratio=DetachedRatio("detached"))},
     left_open="upper bound 1 + 5, as in ScaleRL; no lower one")
_add("luffy", "each group holds a trace; its tokens have the shaped probability p / (p + 0.1) as ratio",
     "arXiv 2504.14945",
     {
         "on_policy": _policy(advantages=_reward("mean"), ratio=_UNCLIPPED, aggregate="seq-mean-token-sum-norm",
                              denominator="all"),
         "off_policy": _policy(advantages=_reward("mean"), ratio=ShapedProbability("shaped"),
                               aggregate="seq-mean-token-sum-norm", denominator="all"),
         "entropy": EntropyTerm("entropy", weight=1e-3),
     },
     traces_per_group=1)

# ------------------------------------------------------------------------------ TGPO and its family
_add("tgpo", "GRPO++ plus a constant weight times the negative log-likelihood of the teacher's argmax token",
     "arXiv 2605.13230, Eq. 6 (its sign corrected)", {"policy": _grpo, "guidance": _guidance(2e-3)},
     left_open="Eq. 3 averages per sequence, Eq. 4 over tokens: the guidance is per sequence, as printed")
_add("tgpo_annealing", "TGPO whose guidance weight falls linearly to 0 (at step 200 with the paper's numbers)",
     "arXiv 2605.13230, Eq. 6 and section 4",
     {"policy": _grpo, "guidance": _guidance(LinearDecay(start=2e-3, decay=1e-5))})
for _name, _signal, _summary in (
    ("tgpo_r", "argmax_logprob", "GRPO++ whose advantage gains the student's own logprob of the teacher's argmax"),
    (
        "tgpo_r_indicator",
        "argmax_indicator",
        "GRPO++ whose advantage gains 0.1 where it took the teacher's argmax",
    ),
    ("tgpo_r_teacher", "teacher_logprob", "GRPO++ whose advantage gains the teacher's logprob of the token"),
):
    _add(_name, _summary, "arXiv 2605.13230, Eq. 5" + ("" if _name == "tgpo_r" else " as its prose reads"),
         {"policy": _policy(advantages=_reward() | {"shaping": ShapingAdvantage("shaping", _signal, 0.1)})},  # type: ignore[arg-type]
         left_open="the coefficient is nowhere in the paper: 0.1")
_add("rkl", "reverse KL: the advantage is the teacher's log-ratio to the sampler, the ratio is to the sampler too",
     "On-Policy Distillation, Thinking Machines 2025",
     {"distil": _distil(advantages=_of_teacher(anchor="rollout"), ratio=ClippedRatio("rollout", None, None))},
     left_open="their loss is a sum; token-mean here, so that the learning rate does not depend on the batch")
_KDRL = "arXiv 2506.02208"
for _name, _beta, _gates, _summary in (
    ("kdrl", 2e-3, {}, "GRPO++ plus 2e-3 times k2, half the squared log-ratio, differentiated"),
    ("kdrl_annealing", LinearDecay(5e-3, 5e-5, 1e-3), {}, "KDRL whose weight falls from 5e-3 to 1e-3"),
    ("kdrl_response_mask", 2e-3, {"wrong": WrongGate("wrong")}, "KDRL whose teacher term is on wrong responses alone"),
    ("kdrl_group_mask", 2e-3, {"wrong": WrongGate("wrong", "group")},
     "KDRL whose teacher term is on groups without a right response"),
):
    # The gradient of k2 is that of -sg[D] log p, sample by sample.
    _add(_name, _summary, _KDRL, {"policy": _grpo, "distil": _distil(_beta, NoRatio("none"), gates=_gates)},
         left_open="two sources give two annealings, 5e-3 to 1e-3 and 0.2 to 2e-3: the first")
_add("opd_then_rl", "reverse KL for 60 steps, then GRPO++", "arXiv 2609.04108",
     {"distil": _distil(Switch("switch", 1.0, 60, 0.0)), "policy": _policy(weight=Switch("switch", 0.0, 60, 1.0))})
_add("trrd", "GRPO whose ratio is to a mixture of old policy and teacher: RLAD", "arXiv 2602.22495v2, Eq. 3",
     {"policy": _policy(ratio=TeacherRatio("teacher_mixture"), aggregate=SEQUENCES), "reference": _reference(1e-3)},
     left_open="the paper's prose swaps the ends: alpha = 1 is GRPO, as in Eq. 3; the weight of its KL: 1e-3")

# ----------------------------------------------------------------------------- TrOPD and its family
_TROPD = "TrOPD"
_TRUST, _OUTLIER = TrustGate("trust"), TrustGate("trust", invert=True)
_prefix_loss = replace(_trace, weight=1e-3, denominator="all")



def _over_all(name: str) -> PolicyGradientTerm:
    """The term of a baseline, averaged over the tokens of the prefixes too."""
    term = CATALOGUE[name].method.terms["distil"]
    assert isinstance(term, PolicyGradientTerm)
    return replace(term, denominator="all")


_RATIO = "whether a ratio and a clip are applied is not said: a ratio, no clip"
_add("opd", "reverse KL as a policy gradient with the log-ratio as advantage (K1)", _TROPD + ", baseline",
     {"distil": _distil()}, left_open=_RATIO)
_add("mask_outlier", "OPD without the tokens whose log-ratio is below ln(0.3) / 0.7", _TROPD + ", Table 1",
     {"distil": _distil(gates={"floor": LogRatioGate("log_ratio", _FLOOR)})},
     left_open="the threshold is not printed: REOPOLD's with lambda = 0.3")
_add("reopold", "OPD whose log-ratio has the floor ln(0.3) / 0.7", "arXiv 2603.11137, Eq. 5 and 7",
     {"distil": _distil(advantages=_of_teacher(transform="floor", mix=0.3))})
_add("reopold_2stage", "REOPOLD above the floor for 100 steps, then on the 20 % of highest student entropy",
     "arXiv 2603.11137, section 4",
     {
         "above_floor": _distil(Switch("switch", 1.0, 100, 0.0), denominator="gated",
                                advantages=_of_teacher(transform="floor", mix=0.3),
                                gates={"floor": LogRatioGate("log_ratio", _FLOOR)}),
         "uncertain": _distil(Switch("switch", 0.0, 100, 1.0), denominator="gated",
                              advantages=_of_teacher(transform="floor", mix=0.3),
                              gates={"entropy": EntropyQuantileGate("entropy_quantile", 0.2)}),
     })
_add("entropy_opd", "OPD on the 20 % of tokens with the highest student entropy", "arXiv 2506.01939; TrOPD, baseline",
     {"distil": _distil(gates={"entropy": EntropyQuantileGate("entropy_quantile", 0.2)})},
     left_open="the denominator is not said: all tokens")
_add("eopd", "OPD, plus forward KL on the teacher's renormalised top 16 where its entropy is above 0.8 nats",
     "arXiv 2603.07079",
     {
         "distil": _distil(ratio=ClippedRatio("old"), advantages=_of_teacher(anchor="old"), aggregate=SEQUENCES),
         "uncertain": _topk(16, tail="renormalise", aggregate=SEQUENCES,
                            gates={"entropy": EntropyGate("entropy", 0.8)}),
     },
     left_open="the clip: 0.2")
_add("full_fkl", "forward KL on the teacher's top 64, not renormalised", _TROPD + ", baseline", {"forward": _topk(64)})
_add("full_fkl_reward", "the value of that forward KL as a scalar reward: the other reading of the paper", _TROPD,
     {"policy": _policy(advantages={"forward": TopKAdvantage("topk_kl", 64)}, ratio=NoRatio("none"))})
_add("fkl_outlier", "OPD within the trust region, forward KL on the top 64 outside it", _TROPD + ", Table 5",
     {"distil": _distil(gates={"trust": _TRUST}), "outliers": _topk(64, gates={"outlier": _OUTLIER})},
     left_open="the Bernoulli variable is drawn once per rollout")
_tropd: dict[str, Term] = {
    "distil": _distil(gates={"trust": _TRUST}, denominator="all"),
    "outliers": _topk(64, gates={"outlier": _OUTLIER}, denominator="all"),
    "prefix": _prefix_loss,
}
_PREFIX_OPEN = (
    "the FKL is differentiated; the Bernoulli variable is drawn once per rollout; prefix lengths "
    "are uniform below the "
    "cosine; " + _RATIO
)
_add("tropd", "FKL outlier, on responses that begin with a part of a trace which gets 1e-3 of cross-entropy", _TROPD,
     _tropd, prefix=PrefixConfig(200), left_open=_PREFIX_OPEN)
_add("tropd_expected", "TrOPD with the trust probability in the place of its draw", _TROPD + ", a variant of ours",
     {"distil": _distil(gates={"trust": TrustGate("trust", True)}, denominator="all"),
      "outliers": _topk(64, gates={"outlier": TrustGate("trust", True, True)}, denominator="all"),
      "prefix": _prefix_loss},
     prefix=PrefixConfig(200), left_open=_PREFIX_OPEN)
_add("tropd_mask", "Mask Outlier with the prefix", _TROPD + ", Table 5",
     {"distil": _over_all("mask_outlier"), "prefix": _prefix_loss},
     prefix=PrefixConfig(200), left_open=_PREFIX_OPEN)
_add("tropd_clip", "REOPOLD's floor with the prefix", _TROPD + ", Table 5",
     {"distil": _over_all("reopold"), "prefix": _prefix_loss},
     prefix=PrefixConfig(200), left_open=_PREFIX_OPEN)
_aopd_forward = _topk(10, divide_by_k=True, gates={"low": ProbabilityGapGate("probability_gap")}, aggregate=SEQUENCES)
_add("aopd", "OPD where the teacher gives the token more than the student, else forward KL on the top K over K",
     "arXiv 2605.06387v3, Eq. 7",
     {
         "distil": _distil(gates={"high": ProbabilityGapGate("probability_gap", invert=True)}, aggregate=SEQUENCES),
         "forward": _aopd_forward,
     },
     left_open="K is not printed: 10")
_add("tropd_aopd", "TrOPD plus AOPD's forward KL where the teacher gives the token no more than the student",
     _TROPD + ", Table 6", _tropd | {"forward": _aopd_forward}, prefix=PrefixConfig(200),
     left_open="how the two are joined is ambiguous: the reading that changes anything; " + _PREFIX_OPEN)

# -------------------------------------------------------------------------------- other divergences
_add("jsd", "the generalised Jensen-Shannon divergence with beta 0.5, exactly, from the sampled token alone",
     "arXiv 2306.13649; gradient: docs/methods.md",
     {"distil": _distil(advantages=_of_teacher(transform="mixture", mix=0.5), ratio=NoRatio("none"))})
_add("jsd_tropd", "TrOPD's JSD row as printed: its first half on the top 64, the second as a policy gradient",
     _TROPD + ", Eq. 4",
     {
         "teacher_side": _topk(64, divergence="jsd_teacher_side", beta=0.5),
         "student_side": _distil(advantages=_of_teacher(transform="mixture", mix=0.5), ratio=NoRatio("none")),
     },
     left_open="the printed second half, differentiated, points away from the teacher: a policy gradient")
_add("gkd", "JSD with beta 0.5 over the whole vocabulary, differentiated", "arXiv 2306.13649",
     {"jsd": DivergenceTerm("divergence", "jsd", beta=0.5)}, on_policy_fraction=0.5,
     left_open="lambda, the share of on-policy batches, is 0.5 as in the implementation in TRL")
_add("minillm", "PPO on the whitened, length-normalised, discounted return of the log-ratio, plus reverse KL over the "
     "whole vocabulary", "arXiv 2306.08543",
     {
         "long": _distil(ratio=ClippedRatio("old"),
                         advantages=_of_teacher(anchor="old", discount=0.95, mean_to_go=True), whiten=True),
         "single": DivergenceTerm("divergence", "reverse_kl"),
     },
     teacher_share=0.2, left_open="one update a step, no clip of the returns, no pre-training loss beside")
# fmt: on
