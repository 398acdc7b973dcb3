"""Whether the keys of one term fit together, and have an effect."""

from dataclasses import replace

from megatron_opd.errors import ConfigError
from megatron_opd.methods.advantages import (
    LogRatioAdvantage,
    ProcessRewardAdvantage,
    RewardAdvantage,
)
from megatron_opd.methods.corrections import Correction
from megatron_opd.methods.gates import ProbabilityGapGate
from megatron_opd.methods.needs import gates_of, of_sequence
from megatron_opd.methods.ratios import ClippedRatio, ShapedProbability
from megatron_opd.methods.schedules import CosineDecay, LinearDecay, Switch, Weight
from megatron_opd.methods.terms import DivergenceTerm, PolicyGradientTerm, Term, TopKTerm
from megatron_opd.recipe.keys import RunConfig

_BEFORE_THE_UPDATE = (RewardAdvantage, ProcessRewardAdvantage)
# Parameters of the whole-vocabulary divergences.
_PARAMETERS = {"jsd": ("beta",), "skew_forward_kl": ("alpha",), "skew_reverse_kl": ("alpha",),
               "alpha_beta": ("alpha", "beta")}  # fmt: skip


def check_term(key: str, term: Term, config: RunConfig) -> list[str]:
    """Checks one term; returns warnings. Raises ConfigError naming a key of the term's `key`."""
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
    warnings = []
    group = config.rollout.samples_per_prompt + config.method.traces_per_group
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
    ratio = term.ratio
    default = ClippedRatio("old")
    of_old = isinstance(ratio, ClippedRatio) and ratio.kind in ("old", "sequence")
    if of_old and config.train.updates_per_step == 1:
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
    """The window must not be empty, and must hold 1. Raises ConfigError.

    The ratios are 1 where the sampler agrees with the trainer.
    """
    low = correction.low
    high = correction.high
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
    parameters = _PARAMETERS.get(term.divergence, ())
    for name in ("alpha", "beta"):
        value = getattr(term, name)
        if (value is None) == (name in parameters):
            problem = "missing" if value is None else "no effect"
            raise ConfigError(f"{key}.{name}: {problem} with {term.divergence}")
        if value is not None and term.divergence != "alpha_beta" and not 0 < value < 1:
            raise ConfigError(f"{key}.{name}: {value} must lie between 0 and 1")
    total = (term.alpha or 0) + (term.beta or 0)
    if term.divergence == "alpha_beta" and 0 in (term.alpha, term.beta, total):
        raise ConfigError(f"{key}.alpha: alpha, beta and their sum must not be 0")
    layout = config.student.layout
    teacher = config.teacher.layout if config.teacher else layout
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
