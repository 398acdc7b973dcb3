"""Whether a method can be run: its signals exist, its parts fit together, and its gradient has the
teacher in it."""

from dataclasses import replace

from megatron_opd.errors import ConfigError
from megatron_opd.methods.advantages import (
    LogRatioAdvantage,
    ProcessRewardAdvantage,
    RewardAdvantage,
    ShapingAdvantage,
    TopKAdvantage,
)
from megatron_opd.methods.catalogue import CATALOGUE
from megatron_opd.methods.corrections import Correction
from megatron_opd.methods.gates import EntropyGate, ProbabilityGapGate
from megatron_opd.methods.needs import (
    gates_of,
    needs_of,
    of_sequence,
    parts,
    reads_teacher,
    reads_traces,
)
from megatron_opd.methods.ratios import ClippedRatio, ShapedProbability
from megatron_opd.methods.schedules import CosineDecay, LinearDecay, Switch, Weight
from megatron_opd.methods.terms import (
    DivergenceTerm,
    MethodConfig,
    PolicyGradientTerm,
    Term,
    TopKTerm,
)
from megatron_opd.recipe.keys import RunConfig

_BEFORE_THE_UPDATE = (RewardAdvantage, ProcessRewardAdvantage)
# Parameters of the whole-vocabulary divergences.
_PARAMETERS = {"jsd": ("beta",), "skew_forward_kl": ("alpha",), "skew_reverse_kl": ("alpha",),
               "alpha_beta": ("alpha", "beta")}  # fmt: skip


def check_method(config: RunConfig) -> list[str]:
    """Returns warnings. Raises ConfigError naming the key."""
    method, needs = config.method, needs_of(config.method)
    warnings = []
    if (needs.teacher or needs.teacher_head) and config.teacher is None:
        raise ConfigError(
            f"teacher: missing; method.{_reader(method)} of {method.name} reads the teacher"
        )
    if config.teacher and not (needs.teacher or needs.teacher_head):
        warnings.append(f"teacher: not loaded, method {method.name} reads no teacher")
    _check_mixture(method)
    if sum(isinstance(part, ProcessRewardAdvantage) for part in parts(method)) > 1:
        raise ConfigError(
            f"method: {method.name} has several process_reward advantages; one model is trained "
            "for one"
        )
    for name, term in method.terms.items():
        warnings += _check_term(f"method.{name}", term, config)
    if all(term.weight == 0 for term in method.terms.values()):
        raise ConfigError("method: the weight of every term is 0, so nothing is learned")
    return warnings + _check_gradient(method)


def _reader(method: MethodConfig) -> str:
    """The first term that reads the teacher."""
    alone = {name: needs_of(MethodConfig("", {name: term})) for name, term in method.terms.items()}
    readers = (name for name, needs in alone.items() if needs.teacher or needs.teacher_head)
    return next(readers, "teacher_share")


def _check_teacher_share(method: MethodConfig) -> None:
    """Of tokens that the teacher drew the engine has no logprob of the student's; given tokens are
    nobody's turn."""
    key = "method.teacher_share"
    if not needs_of(method).rollouts:
        raise ConfigError(f"{key}: no effect, {method.name} samples nothing; remove it")
    for other in ("prefix", "on_policy_fraction"):
        if getattr(method, other) != getattr(MethodConfig("", {}), other):
            raise ConfigError(f"{key}: does not go with method.{other}; remove one of them")
    for name, term in method.terms.items():
        of_rollout = [
            part
            for part in parts(MethodConfig("", {name: term}))
            if isinstance(part, Correction)
            or "rollout" in (getattr(part, "kind", ""), getattr(part, "anchor", ""))
        ]
        if of_rollout:
            raise ConfigError(
                f"{key}: method.{name} reads the sampler's logprobs, which the teacher's tokens "
                "lack"
            )


def _check_mixture(method: MethodConfig) -> None:
    """Terms on traces need traces, and traces need such a term; groups are sampled anew for their
    rewards."""
    if method.teacher_share:
        _check_teacher_share(method)
    if method.max_refills and not needs_of(method).rewards:
        raise ConfigError(
            f"method.max_refills: no effect, {method.name} reads no rewards; remove it"
        )
    if method.on_policy_fraction < 1:
        of_samples = _policies(method)
        if of_samples or not needs_of(method).rollouts:
            what = (
                f"method.{of_samples[0]} needs samples"
                if of_samples
                else "every term is on traces already"
            )
            raise ConfigError(f"method.on_policy_fraction: {what}; set it to 1")
    on_traces = [name for name, term in method.terms.items() if reads_traces(term)]
    mixed = [key for key in ("traces_per_group", "prefix") if getattr(method, key)]
    if len(on_traces) == len(method.terms) and mixed:
        raise ConfigError(
            f"method.{mixed[0]}: no effect, every term of {method.name} is on traces alone; remove "
            "it"
        )
    if mixed and not on_traces:
        raise ConfigError(
            f"method.{mixed[0]}: no effect, no term of {method.name} is on traces; remove it"
        )
    if on_traces and len(on_traces) < len(method.terms) and not mixed:
        raise ConfigError(
            f"method.{on_traces[0]}: is on traces beside terms on samples; set "
            "method.traces_per_group or method.prefix"
        )
    for name in on_traces:
        if isinstance(method.terms[name], PolicyGradientTerm) and not method.traces_per_group:
            raise ConfigError(
                f"method.{name}.ratio: shaped is of traces in a group; set method.traces_per_group"
            )


def _check_term(key: str, term: Term, config: RunConfig) -> list[str]:
    warnings = _check_weight(f"{key}.weight", term.weight, config.num_steps)
    gates = gates_of(term)
    for name, gate in gates.items():
        if replace(gate, invert=not gate.invert) in gates.values():
            raise ConfigError(
                f"{key}.gates.{name}: with its own opposite no token is left; take one of them out"
            )
        if isinstance(gate, ProbabilityGapGate) and not -1 < gate.at_most < 1:
            raise ConfigError(
                f"{key}.gates.{name}.at_most: {gate.at_most} splits no tokens, a difference of "
                "probabilities lies between -1 and 1"
            )
    correction = getattr(term, "correction", None)
    if correction:
        _check_correction(f"{key}.correction", correction)
    if isinstance(term, PolicyGradientTerm):
        warnings += _check_policy(key, term, config)
    if isinstance(term, TopKTerm):
        if (term.beta is None) != (term.divergence == "forward_kl"):
            raise ConfigError(
                f"{key}.beta: belongs to divergence=jsd_teacher_side, and to it alone"
            )
        if term.divergence != "forward_kl" and term.tail != "none":
            raise ConfigError(f"{key}.tail: no effect with divergence={term.divergence}; remove it")
    if isinstance(term, DivergenceTerm):
        _check_divergence(key, term, config)
    return warnings


def _check_policy(key: str, term: PolicyGradientTerm, config: RunConfig) -> list[str]:
    warnings, group = [], config.rollout.samples_per_prompt + config.method.traces_per_group
    if not term.advantages:
        raise ConfigError(
            f"{key}.advantages: empty, so the term has no gradient; give one, or remove the term"
        )
    for name, advantage in term.advantages.items():
        where = f"{key}.advantages.{name}"
        warnings += _check_weight(f"{where}.weight", advantage.weight, config.num_steps)
        if isinstance(advantage, RewardAdvantage) and advantage.normalise != "none" and group == 1:
            raise ConfigError(
                f"rollout.samples_per_prompt: 1 gives {key} no group to compare; set 2 or more"
            )
        if isinstance(advantage, ProcessRewardAdvantage) and group == 1:
            raise ConfigError(
                f"rollout.samples_per_prompt: 1 gives {key} no group to compare; set 2 or more"
            )
        if isinstance(advantage, LogRatioAdvantage):
            _check_log_ratio(where, advantage)
        if term.whiten and not (
            of_sequence(advantage) or isinstance(advantage, _BEFORE_THE_UPDATE)
        ):
            raise ConfigError(
                f"{key}.whiten: {name} changes within the update; its advantages must be known "
                "before it"
            )
    ratio, default = term.ratio, ClippedRatio("old")
    if (
        isinstance(ratio, ClippedRatio)
        and ratio.kind in ("old", "sequence")
        and config.train.updates_per_step == 1
    ):
        for name in ("clip_low", "clip_high"):
            value = getattr(ratio, name)
            if value is not None and value != getattr(default, name):
                warnings.append(
                    f"{key}.ratio.{name}: no effect with train.updates_per_step=1: the ratio is 1"
                )
    if isinstance(ratio, ShapedProbability) and term.correction:
        raise ConfigError(f"{key}.correction: no effect on traces; remove it")
    return warnings


def _check_correction(key: str, correction: Correction) -> None:
    """A sampler that agrees with the trainer has a ratio of 1, whatever is made of it: a window
    must hold it."""
    low, high = correction.low, correction.high
    if correction.kind in ("truncated", "sequence_truncated"):
        if low:
            raise ConfigError(f"{key}.low: no effect with kind={correction.kind}; remove it")
    elif low >= high:
        raise ConfigError(f"{key}.low: {low} is not below high={high}, so no token is kept")
    elif not low <= 1 <= high:
        raise ConfigError(
            f"{key}: keeps ratios from {low} to {high}, and none of a sampler that agrees with the "
            "trainer; let 1 lie between low and high"
        )


def _policies(method: MethodConfig) -> list[str]:
    return [name for name, term in method.terms.items() if isinstance(term, PolicyGradientTerm)]


def _check_log_ratio(key: str, advantage: LogRatioAdvantage) -> None:
    if (advantage.mix is not None) != (advantage.transform in ("floor", "mixture")):
        raise ConfigError(
            f"{key}.mix: belongs to transform=floor and transform=mixture, and to these alone"
        )
    if of_sequence(advantage) and advantage.anchor == "current":
        raise ConfigError(
            f"{key}.anchor: returns are of the student before the update; set old or rollout"
        )
    if advantage.mean_to_go and not advantage.discount:
        raise ConfigError(f"{key}.mean_to_go: no effect with discount=0; remove it")
    if advantage.mix == 1:
        raise ConfigError(f"{key}.mix: must be below 1")


def _check_divergence(key: str, term: DivergenceTerm, config: RunConfig) -> None:
    wanted = _PARAMETERS.get(term.divergence, ())
    for name in ("alpha", "beta"):
        value = getattr(term, name)
        if (value is None) == (name in wanted):
            raise ConfigError(
                f"{key}.{name}: {'missing' if value is None else 'no effect'} with "
                f"{term.divergence}"
            )
        if value is not None and term.divergence != "alpha_beta" and not 0 < value < 1:
            raise ConfigError(f"{key}.{name}: {value} must lie between 0 and 1")
    if term.divergence == "alpha_beta" and 0 in (
        term.alpha,
        term.beta,
        (term.alpha or 0) + (term.beta or 0),
    ):
        raise ConfigError(f"{key}.alpha: alpha, beta and their sum must not be 0")
    layout, teacher = (
        config.student.layout,
        config.teacher.layout if config.teacher else config.student.layout,
    )
    if max(layout.pipeline_model_parallel_size, teacher.pipeline_model_parallel_size) > 1:
        raise ConfigError(
            f"teacher.layout: {key} compares whole distributions, which pipeline stages cannot yet"
        )
    if teacher.tensor_model_parallel_size not in (1, layout.tensor_model_parallel_size):
        raise ConfigError(
            f"teacher.layout.tensor_model_parallel_size: {key} compares whole distributions: 1, or "
            "the student's"
        )


def _check_weight(key: str, weight: Weight, num_steps: int) -> list[str]:
    match weight:
        case LinearDecay(start, decay, floor):
            if decay == 0:
                raise ConfigError(f"{key}.decay: 0 never decays; write {key}={start}")
            if floor >= start:
                raise ConfigError(
                    f"{key}.floor: {floor} is not below start={start}; write one number"
                )
            if start - decay <= floor and num_steps > 1:
                return [f"{key}.decay: the weight is at its floor from step 1 on"]
        case CosineDecay() if weight.end >= weight.start:
            raise ConfigError(
                f"{key}.end: {weight.end} is not below start={weight.start}; write one number"
            )
        case Switch():
            if weight.before == weight.after:
                raise ConfigError(f"{key}.after: equals before={weight.before}; write one number")
            if weight.at >= num_steps:
                return [f"{key}.at: {weight.at} is never reached within num_steps={num_steps}"]
        case 0 | 0.0:
            return [f"{key}: 0, so the term is computed without effect"]
    return []


# ---------------------------------------------------------------------------- the expected gradient
def _check_gradient(method: MethodConfig) -> list[str]:
    """A teacher that is asked, and yet not in the expected gradient, is a mistake; a paper's own is
    a warning."""
    if not needs_of(method).teacher or _teaches(method):
        return []
    problem = (
        f"method {method.name}: what reads the teacher depends on the state alone, so its expected "
        "gradient is 0 (a baseline, in the sense of REINFORCE): the teacher is asked and teaches "
        "nothing"
    )
    if method.name in CATALOGUE and not _teaches(CATALOGUE[method.name].method):
        return [f"{problem}; it is so in the paper"]
    raise ConfigError(f"{problem}; use a log_ratio advantage, a topk or a cross_entropy term")


def _teaches(method: MethodConfig) -> bool:
    return needs_of(method).teacher_head or any(_has_teacher(part) for part in parts(method))


def _has_teacher(part: object) -> bool:
    """Whether a part depends on the teacher's opinion of the sampled token, or pulls towards its
    tokens."""
    if isinstance(part, ShapingAdvantage):
        return part.signal != "argmax_logprob"
    if isinstance(part, TopKAdvantage | EntropyGate):
        return False
    return reads_teacher(part)
