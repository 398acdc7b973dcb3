"""Checks of the teacher, or the student in its place, and of the rows that it reads."""

from megatron_opd.architectures.architecture import Architecture
from megatron_opd.errors import ConfigError
from megatron_opd.methods.method import MethodConfig
from megatron_opd.methods.needs import needs_of
from megatron_opd.recipe.agents import SelfTeacherConfig
from megatron_opd.recipe.keys import RunConfig


def check_guide(config: RunConfig) -> list[str]:
    """There is one teacher where a term reads one. Returns warnings. Raises ConfigError."""
    method = config.method
    needs = needs_of(method)
    read = needs.teacher or needs.teacher_head
    if config.teacher and config.self_teacher:
        raise ConfigError("self_teacher: does not go with teacher; remove one of them")
    if read and config.teacher is None and config.self_teacher is None:
        raise ConfigError(
            f"teacher: missing; method.{_reader(method)} of {method.name} reads the teacher; give "
            "one, or set self_teacher={} for the student itself"
        )
    if config.teacher and not read:
        return [f"teacher: not loaded, method {method.name} reads no teacher"]
    if config.self_teacher:
        _check_self_teacher(config, config.self_teacher, read=read)
    return []


def longest_read(config: RunConfig, name: str) -> int:
    """The most tokens of a row that a model goes through, its privileged text included."""
    longest = config.max_sequence_length
    guide = "student" if config.self_teacher else "teacher"
    if config.skills and config.skills.reader == "teacher" and name == guide:
        longest += config.skills.max_tokens
    return longest


def check_positions(config: RunConfig, architectures: dict[str, Architecture]) -> None:
    """The models have positions for the longest rows that they read. Raises ConfigError."""
    for name, architecture in architectures.items():
        most = architecture.max_position_embeddings
        longest = longest_read(config, name)
        if longest <= most:
            continue
        if longest == config.max_sequence_length:
            raise ConfigError(
                f"max_sequence_length: {longest} is more than the {name}'s "
                f"max_position_embeddings={most}"
            )
        raise ConfigError(
            f"skills.max_tokens: with max_sequence_length={config.max_sequence_length} a row has "
            f"{longest} tokens, more than the {name}'s max_position_embeddings={most}"
        )


def _check_self_teacher(config: RunConfig, settings: SelfTeacherConfig, *, read: bool) -> None:
    method = config.method
    if not read:
        raise ConfigError(
            f"self_teacher: no effect, method {method.name} reads no teacher; remove it"
        )
    if method.teacher_share:
        raise ConfigError(
            "self_teacher: does not go with method.teacher_share, which samples from a second "
            "model; give a teacher"
        )
    usual = SelfTeacherConfig()
    for key, kind in (("every", "every"), ("decay", "average")):
        if settings.weights != kind and getattr(settings, key) != getattr(usual, key):
            raise ConfigError(f"self_teacher.{key}: no effect with weights={settings.weights}")
    privileged = config.skills is not None and config.skills.reader == "teacher"
    if settings.weights == "present" and not privileged:
        raise ConfigError(
            "self_teacher.weights: present, and no skills.reader=teacher: the teacher says what "
            "the student says; give skills, or set weights to first, every or average"
        )
    if needs_of(method).teacher_head and config.student.layout.context_parallel_size > 1:
        raise ConfigError(
            f"student.layout.context_parallel_size: {method.name} compares whole distributions, "
            "and a self-teacher's prompts are cut up otherwise; use tensor parallelism"
        )


def _reader(method: MethodConfig) -> str:
    """The first term that reads the teacher."""
    alone = {name: needs_of(MethodConfig("", {name: term})) for name, term in method.terms.items()}
    readers = (name for name, needs in alone.items() if needs.teacher or needs.teacher_head)
    return next(readers, "teacher_share")
