"""Methods built on other divergences between teacher and student."""

from megatron_opd.methods.catalogue.entry import entry
from megatron_opd.methods.catalogue.shorthand import NO_RATIO, distil, teacher
from megatron_opd.methods.ratios import ClippedRatio
from megatron_opd.methods.terms import DivergenceTerm, TopKTerm

ENTRIES = (
    entry(
        name="jsd",
        summary="the generalised Jensen-Shannon divergence with beta 0.5, exactly, from the "
        "sampled token alone",
        source="arXiv 2306.13649; gradient: docs/methods.md",
        terms={
            "distil": distil(advantages=teacher(transform="mixture", mix=0.5), ratio=NO_RATIO),
        },
    ),
    entry(
        name="jsd_tropd",
        summary="TrOPD's JSD row as printed: its first half on the top 64, the second as a policy "
        "gradient",
        source="TrOPD, Eq. 4",
        terms={
            "teacher_side": TopKTerm("topk", k=64, divergence="jsd_teacher_side", beta=0.5),
            "student_side": distil(
                advantages=teacher(transform="mixture", mix=0.5), ratio=NO_RATIO
            ),
        },
        left_open="the printed second half, differentiated, points away from the teacher: a policy "
        "gradient",
    ),
    entry(
        name="gkd",
        summary="JSD with beta 0.5 over the whole vocabulary, differentiated",
        source="arXiv 2306.13649",
        terms={"jsd": DivergenceTerm("divergence", "jsd", beta=0.5)},
        on_policy_fraction=0.5,
        left_open="lambda, the share of on-policy batches, is 0.5 as in the implementation in TRL",
    ),
    entry(
        name="minillm",
        summary="PPO on the whitened, length-normalised, discounted return of the log-ratio, plus "
        "reverse KL over the whole vocabulary",
        source="arXiv 2306.08543",
        terms={
            "long": distil(
                advantages=teacher(anchor="old", discount=0.95, mean_to_go=True),
                whiten=True,
                ratio=ClippedRatio("old"),
            ),
            "single": DivergenceTerm("divergence", "reverse_kl"),
        },
        teacher_share=0.2,
        left_open="one update a step, no clip of the returns, no pre-training loss beside",
    ),
)
