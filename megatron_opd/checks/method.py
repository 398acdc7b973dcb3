"""Checks of a method: its signals exist, its terms fit together, its teacher teaches."""

from megatron_opd.checks.guides import check_guide
from megatron_opd.errors import ConfigError
from megatron_opd.methods.advantages import ProcessRewardAdvantage
from megatron_opd.methods.catalogue import CATALOGUE
from megatron_opd.methods.method import MethodConfig
from megatron_opd.methods.needs import needs_of, parts
from megatron_opd.methods.part import Around, TermPart, parts_of
from megatron_opd.recipe.keys import RunConfig


def check_method(config: RunConfig) -> list[str]:
    """Checks the recipe's method. Returns warnings. Raises ConfigError naming the key."""
    method = config.method
    needs = needs_of(method)
    warnings = check_guide(config)
    if needs.data_sources and config.data.source_column is None and not config.data.parts:
        raise ConfigError(
            f"data.source_column: missing; {method.name} weighs tasks by where they are from"
        )
    _check_mixture(method)
    if sum(isinstance(part, ProcessRewardAdvantage) for part in parts(method)) > 1:
        raise ConfigError(
            f"method: {method.name} has several process_reward advantages; one model is trained "
            "for one"
        )
    around = _around(config)
    for key, part in parts_of(method.terms, "method"):
        warnings += part.check(key, around)
    if all(term.weight == 0 for term in method.terms.values()):
        raise ConfigError("method: the weight of every term is 0, so nothing is learned")
    return warnings + _check_gradient(method)


def _around(config: RunConfig) -> Around:
    student = config.student.layout
    teacher = config.teacher.layout if config.teacher else student
    traces = config.method.traces_per_group
    return Around(
        num_steps=config.num_steps,
        group_size=config.rollout.samples_per_prompt + traces,
        traces_per_group=traces,
        updates_per_step=config.train.updates_per_step,
        pipeline_stages=max(
            student.pipeline_model_parallel_size, teacher.pipeline_model_parallel_size
        ),
        student_tp=student.tensor_model_parallel_size,
        teacher_tp=teacher.tensor_model_parallel_size,
    )


def _check_teacher_share(method: MethodConfig) -> None:
    """Refuses what does not go with tokens that the teacher draws. Raises ConfigError.

    The engine has no student logprob for such tokens, and a prefix takes the turn of neither model.
    """
    key = "method.teacher_share"
    if not needs_of(method).rollouts:
        raise ConfigError(f"{key}: no effect, {method.name} samples nothing; remove it")
    for other in ("prefix", "on_policy_fraction"):
        if getattr(method, other) != getattr(MethodConfig("", {}), other):
            raise ConfigError(f"{key}: does not go with method.{other}; remove one of them")
    for name, term in method.terms.items():
        if needs_of(MethodConfig("", {name: term})).sampler:
            raise ConfigError(
                f"{key}: method.{name} reads the sampler's logprobs, which the teacher's tokens "
                "lack"
            )


def _check_mixture(method: MethodConfig) -> None:
    """Checks that traces and terms on traces come together. Raises ConfigError.

    Refills need rewards: only they say whether a group is to be sampled anew.
    """
    if method.teacher_share:
        _check_teacher_share(method)
    if method.max_refills and not needs_of(method).rewards:
        raise ConfigError(
            f"method.max_refills: no effect, {method.name} reads no rewards; remove it"
        )
    if method.on_policy_fraction < 1:
        of_samples = [name for name, term in method.terms.items() if term.only_of_samples()]
        if of_samples or not needs_of(method).rollouts:
            problem = "every term is on traces already"
            if of_samples:
                problem = f"method.{of_samples[0]} needs samples"
            raise ConfigError(f"method.on_policy_fraction: {problem}; set it to 1")
    on_traces = [name for name, term in method.terms.items() if term.of_traces]
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


# ---------------------------------------------------------------------------- the expected gradient
def _check_gradient(method: MethodConfig) -> list[str]:
    """A teacher that is asked but teaches nothing: an error, in a paper's method a warning.

    A term that reads the teacher beside others that learn from it is warned of alone.
    """
    idle = [name for name, term in method.terms.items() if _asks_in_vain(name, term)]
    asked = needs_of(method).teacher
    taught = any(part.teaches() for part in parts(method))
    if not idle and (taught or not asked):
        return []
    where = "".join(f"method.{name} of " for name in idle)
    problem = (
        f"{where}method {method.name}: what reads the teacher depends on the state alone, so its "
        "expected gradient is 0 (a baseline, in the sense of REINFORCE): the teacher is asked and "
        "teaches nothing"
    )
    paper = CATALOGUE.get(method.name)
    if paper and idle and all(_asks_in_vain(name, paper.method.terms.get(name)) for name in idle):
        return [f"{problem}; it is so in the paper"]
    if taught:
        return [problem]
    raise ConfigError(f"{problem}; use a log_ratio advantage, a topk or a cross_entropy term")


def _asks_in_vain(name: str, term: TermPart | None) -> bool:
    """True for a term that reads the teacher, and whose expected gradient is without it."""
    if term is None or not needs_of(MethodConfig("", {name: term})).teacher:
        return False
    return not any(part.teaches() for _, part in parts_of(term))
