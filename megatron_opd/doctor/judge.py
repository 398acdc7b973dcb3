"""The meaning of the doctor's measurements: lines made of numbers."""

import math
from collections.abc import Iterator
from typing import Any

from megatron_opd.doctor.finding import Finding
from megatron_opd.methods.needs import active, needs_of
from megatron_opd.recipe.keys import RunConfig

Metrics = dict[str, float]
FIRST = 1e-4  # relative deviation of loss and gradient norm in the first update
LATER = 1e-3  # likewise in updates after the weights have moved
ZERO = 1e-3  # a gradient, relative to that of another teacher
CHANGE = 1e-5  # relative; on one layout an update repeats itself
REFIT = 1e-4  # mean difference of logprobs, nats
SCALE = 0.1  # losses below it count as this large: a policy gradient's is near 0


def judge(
    config: RunConfig, nproc: int, on_layout: dict[str, Any], on_one: list[Metrics]
) -> Iterator[Finding]:
    """Judges the measurements.

    `on_layout` is what `measure` returns on the recipe's layout, `on_one` what `measure_updates`
    returns on one process.
    """
    yield _gradients(config, nproc, on_layout["updates"], on_one)
    yield _own_teacher(config, on_layout)
    yield _other_teacher(config, on_layout)
    yield _refit(config, on_layout)


def _gradients(
    config: RunConfig, nproc: int, ours: list[Metrics], theirs: list[Metrics]
) -> Finding:
    layouts = f"student {config.student.layout}"
    if config.teacher:
        layouts += f", teacher {config.teacher.layout}"
    worst = 0.0
    passed = len(ours) == len(theirs)
    for number, (update, reference) in enumerate(zip(ours, theirs, strict=False)):
        deviation = _deviation(update, reference)
        worst = max(worst, deviation)
        passed = passed and deviation <= (LATER if number else FIRST)
    if config.teacher_processes:
        layouts += f" on {config.teacher_processes} of them alone"
    if config.rollout.processes:
        layouts += f", engines on {config.rollout.processes} of them alone"
    text = (
        f"{len(ours)} updates of {config.method.name} on {nproc} processes ({layouts}): loss and "
        "gradient norm "
    )
    if passed:
        return Finding("ok", "gradients", f"{text}are those of one process, to {worst:.0e}")
    return Finding(
        "fail",
        "gradients",
        f"{text}differ from those of one process by {worst:.0e}: {_pair(ours, theirs)}",
    )


def _own_teacher(config: RunConfig, measured: dict[str, Any]) -> Finding:
    subject = "teacher = student"
    if "own_teacher" not in measured:
        return Finding(
            "ok",
            subject,
            f"does not apply: no term of {config.method.name} is a distance from the teacher",
        )
    own = measured["own_teacher"][0]
    keys = [key for key in own if key.startswith("objective/") and key.endswith("/loss")]
    names = [key.split("/")[1] for key in keys]
    loss = abs(own["train/loss"])
    norm = own["train/grad_norm"]
    usual = measured["distance"][0]["train/grad_norm"]
    text = (
        f"{', '.join(names)}: loss {loss:.0e}, gradient norm {norm:.0e}, with another teacher "
        f"{usual:.0e}"
    )
    passed = loss <= ZERO * SCALE and norm <= ZERO * usual
    return Finding(
        "ok" if passed else "fail",
        subject,
        text + ("" if passed else "; the first two should be 0"),
    )


def _other_teacher(config: RunConfig, measured: dict[str, Any]) -> Finding:
    subject = "other teacher"
    needs = needs_of(active(config.method, 0))
    if config.self_teacher:
        return Finding("ok", subject, "does not apply: the student is its own teacher")
    if not (needs.teacher or needs.teacher_head) or "other_teacher" not in measured:
        return Finding(
            "ok",
            subject,
            f"does not apply: {config.method.name} reads no teacher at its first step",
        )
    change = _deviation(measured["other_teacher"][0], measured["updates"][0])
    if CHANGE < change < math.inf:
        text = f"other teacher weights change loss or gradient norm by {change:.0e}"
        return Finding("ok", subject, text)
    text = f"other teacher weights change loss and gradient norm by {change:.0e}"
    return Finding("fail", subject, text)


def _refit(config: RunConfig, measured: dict[str, Any]) -> Finding:
    if not needs_of(config.method).rollouts:
        return Finding("ok", "refit", f"does not apply: {config.method.name} samples nothing")
    if "refit" not in measured:
        return Finding("warn", "refit", "not checked: vLLM is not installed")
    refit = measured["refit"]
    mean = refit["mean"]
    largest = refit["max"]
    stale = refit["stale"]
    text = (
        f"engine and trainer differ by {mean:.0e} nats a token (at most {largest:.0e}) over "
        f"{refit['tokens']} tokens at temperature {config.rollout.temperature:g}; before "
        f"it by {stale:.0e}"
    )
    return Finding("ok" if mean <= REFIT and stale > 10 * REFIT else "fail", "refit", text)


def _deviation(update: Metrics, reference: Metrics) -> float:
    """The larger of the two relative deviations; infinite where one is no number."""
    scales = {"train/loss": SCALE, "train/grad_norm": 1e-6}
    deviations = []
    for key, scale in scales.items():
        deviation = abs(update[key] - reference[key]) / max(abs(reference[key]), scale)
        deviations.append(deviation if math.isfinite(deviation) else math.inf)
    return max(deviations)


def _pair(ours: list[Metrics], theirs: list[Metrics]) -> str:
    keys = ("train/loss", "train/grad_norm")
    return "; ".join(f"{key} {ours[0][key]:.6g} and {theirs[0][key]:.6g}" for key in keys)
