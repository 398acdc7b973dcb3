"""TrOPD and its family: distillation on the student's own samples, and where it is trusted."""

import math
from dataclasses import replace

from megatron_opd.methods.advantages import TopKAdvantage
from megatron_opd.methods.catalogue.entry import entry
from megatron_opd.methods.catalogue.shorthand import (
    NO_RATIO,
    SEQUENCES,
    TRACE,
    distil,
    teacher,
)
from megatron_opd.methods.gates import (
    EntropyGate,
    EntropyQuantileGate,
    LogRatioGate,
    ProbabilityGapGate,
    TrustGate,
)
from megatron_opd.methods.method import PrefixConfig
from megatron_opd.methods.ratios import ClippedRatio
from megatron_opd.methods.schedules import Switch
from megatron_opd.methods.terms import PolicyGradientTerm, Term, TopKTerm

TRUSTED = TrustGate("trust")
OUTLIER = TrustGate("trust", invert=True)
ABOVE_FLOOR = LogRatioGate("log_ratio", at_least=math.log(0.3) / 0.7)
MOST_UNCERTAIN = EntropyQuantileGate("entropy_quantile", top=0.2)
FLOORED = teacher(transform="floor", mix=0.3)

MASKED_OUTLIERS = distil(gates={"floor": ABOVE_FLOOR})
REOPOLD = distil(advantages=FLOORED)
AOPD_FORWARD = TopKTerm(
    "topk",
    k=10,
    divide_by_k=True,
    gates={"low": ProbabilityGapGate("probability_gap")},
    aggregate=SEQUENCES,
)
# With a prefix, terms are averaged over its tokens too: denominator "all".
PREFIX = replace(TRACE, weight=1e-3, denominator="all")
TROPD: dict[str, Term] = {
    "distil": distil(gates={"trust": TRUSTED}, denominator="all"),
    "outliers": TopKTerm("topk", k=64, gates={"outlier": OUTLIER}, denominator="all"),
    "prefix": PREFIX,
}

RATIO_OPEN = "whether a ratio and a clip are applied is not said: a ratio, no clip"
PREFIX_OPEN = (
    "the FKL is differentiated; the Bernoulli variable is drawn once per rollout; prefix lengths "
    f"are uniform below the cosine; {RATIO_OPEN}"
)

ENTRIES = (
    entry(
        name="opd",
        summary="reverse KL as a policy gradient with the log-ratio as advantage (K1)",
        source="TrOPD, baseline",
        terms={"distil": distil()},
        left_open=RATIO_OPEN,
    ),
    entry(
        name="mask_outlier",
        summary="OPD without the tokens whose log-ratio is below ln(0.3) / 0.7",
        source="TrOPD, Table 1",
        terms={"distil": MASKED_OUTLIERS},
        left_open="the threshold is not printed: REOPOLD's with lambda = 0.3",
    ),
    entry(
        name="reopold",
        summary="OPD whose log-ratio has the floor ln(0.3) / 0.7",
        source="arXiv 2603.11137, Eq. 5 and 7",
        terms={"distil": REOPOLD},
    ),
    entry(
        name="reopold_2stage",
        summary="REOPOLD above the floor for 100 steps, then on the 20 % of highest student "
        "entropy",
        source="arXiv 2603.11137, section 4",
        terms={
            "above_floor": distil(
                Switch("switch", before=1.0, at=100, after=0.0),
                advantages=FLOORED,
                gates={"floor": ABOVE_FLOOR},
                denominator="gated",
            ),
            "uncertain": distil(
                Switch("switch", before=0.0, at=100, after=1.0),
                advantages=FLOORED,
                gates={"entropy": MOST_UNCERTAIN},
                denominator="gated",
            ),
        },
    ),
    entry(
        name="entropy_opd",
        summary="OPD on the 20 % of tokens with the highest student entropy",
        source="arXiv 2506.01939; TrOPD, baseline",
        terms={"distil": distil(gates={"entropy": MOST_UNCERTAIN})},
        left_open="the denominator is not said: all tokens",
    ),
    entry(
        name="eopd",
        summary="OPD, plus forward KL on the teacher's renormalised top 16 where its entropy is "
        "above 0.8 nats",
        source="arXiv 2603.07079",
        terms={
            "distil": distil(
                advantages=teacher(anchor="old"), ratio=ClippedRatio("old"), aggregate=SEQUENCES
            ),
            "uncertain": TopKTerm(
                "topk",
                k=16,
                tail="renormalise",
                gates={"entropy": EntropyGate("entropy", above=0.8)},
                aggregate=SEQUENCES,
            ),
        },
        left_open="the clip: 0.2",
    ),
    entry(
        name="full_fkl",
        summary="forward KL on the teacher's top 64, not renormalised",
        source="TrOPD, baseline",
        terms={"forward": TopKTerm("topk", k=64)},
    ),
    entry(
        name="full_fkl_reward",
        summary="the value of that forward KL as a scalar reward: the other reading of the paper",
        source="TrOPD",
        terms={
            "policy": PolicyGradientTerm(
                "policy_gradient",
                advantages={"forward": TopKAdvantage("topk_kl", k=64)},
                ratio=NO_RATIO,
            )
        },
    ),
    entry(
        name="fkl_outlier",
        summary="OPD within the trust region, forward KL on the top 64 outside it",
        source="TrOPD, Table 5",
        terms={
            "distil": distil(gates={"trust": TRUSTED}),
            "outliers": TopKTerm("topk", k=64, gates={"outlier": OUTLIER}),
        },
        left_open="the Bernoulli variable is drawn once per rollout",
    ),
    entry(
        name="tropd",
        summary="FKL outlier, on responses that begin with a part of a trace which gets 1e-3 of "
        "cross-entropy",
        source="TrOPD",
        terms=TROPD,
        prefix=PrefixConfig(steps=200),
        left_open=PREFIX_OPEN,
    ),
    entry(
        name="tropd_expected",
        summary="TrOPD with the trust probability in the place of its draw",
        source="TrOPD, a variant of ours",
        terms={
            "distil": distil(gates={"trust": replace(TRUSTED, expected=True)}, denominator="all"),
            "outliers": TopKTerm(
                "topk",
                k=64,
                gates={"outlier": replace(OUTLIER, expected=True)},
                denominator="all",
            ),
            "prefix": PREFIX,
        },
        prefix=PrefixConfig(steps=200),
        left_open=PREFIX_OPEN,
    ),
    entry(
        name="tropd_mask",
        summary="Mask Outlier with the prefix",
        source="TrOPD, Table 5",
        terms={"distil": replace(MASKED_OUTLIERS, denominator="all"), "prefix": PREFIX},
        prefix=PrefixConfig(steps=200),
        left_open=PREFIX_OPEN,
    ),
    entry(
        name="tropd_clip",
        summary="REOPOLD's floor with the prefix",
        source="TrOPD, Table 5",
        terms={"distil": replace(REOPOLD, denominator="all"), "prefix": PREFIX},
        prefix=PrefixConfig(steps=200),
        left_open=PREFIX_OPEN,
    ),
    entry(
        name="aopd",
        summary="OPD where the teacher gives the token more than the student, else forward KL on "
        "the top K over K",
        source="arXiv 2605.06387v3, Eq. 7",
        terms={
            "distil": distil(
                gates={"high": ProbabilityGapGate("probability_gap", invert=True)},
                aggregate=SEQUENCES,
            ),
            "forward": AOPD_FORWARD,
        },
        left_open="K is not printed: 10",
    ),
    entry(
        name="tropd_aopd",
        summary="TrOPD plus AOPD's forward KL where the teacher gives the token no more than the "
        "student",
        source="TrOPD, Table 6",
        terms={**TROPD, "forward": AOPD_FORWARD},
        prefix=PrefixConfig(steps=200),
        left_open="how the two are joined is ambiguous: the reading that changes anything; "
        + PREFIX_OPEN,
    ),
)
