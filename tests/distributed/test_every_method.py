"""Every method of the catalogue takes a real update on Megatron models: the same one on every
layout.

Student, teacher and reference are Megatron models. Some rollouts begin with tokens of a trace, and
some are traces. What the formulas should give is in tests/unit/test_method_gradients.py; here
splitting the work must not change it.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from megatron_opd.contracts.signals import StudentSignals
from megatron_opd.doctor.rows import as_read_by
from megatron_opd.methods.catalogue import CATALOGUE, agents
from megatron_opd.methods.needs import active, parts
from megatron_opd.methods.ratios import ClippedRatio, DetachedRatio, TeacherRatio
from tests.distributed import test_layout_invariance as replayed
from tests.distributed.worlds import measure, measured
from tests.tiny_config import tiny_config

STEP = 1
RATIOS = ClippedRatio, DetachedRatio, TeacherRatio  # to the student at the step's start
# processes -> (name, TP, sequence parallel, CP, tokens of a micro-batch, fused output layer, the
# teacher's TP)
LAYOUTS = {
    1: [
        ("whole", 1, False, 1, 999, False, 1),
        ("2 micro-batches", 1, False, 1, 152, True, 1),
        ("4 micro-batches", 1, False, 1, 78, False, 1),
    ],
    2: [
        ("tp2", 2, True, 1, 999, False, 2),
        ("tp2, teacher tp1", 2, False, 1, 110, True, 1),
        ("dp2", 1, False, 1, 60, False, 1),
        ("cp2", 1, False, 2, 60, False, 1),
    ],
}
NAMES = [name for layouts in LAYOUTS.values() for name, *_ in layouts]
# Those of SDAR's family have the ratio of grpo_agents beside terms without one.
SAME_RATIO = {entry.method.name for entry in agents.ENTRIES} - {"grpo_agents", "rlsd", "skill_sd"}
OF_RATIOS = [
    name
    for name, entry in CATALOGUE.items()
    if any(isinstance(part, RATIOS) for part in parts(entry.method)) and name not in SAME_RATIO
]


def cases(layout: str) -> list[tuple[str, str]]:
    """Methods, each with the update of a step that is made: in a later one ratios are not 1, and
    some are clipped."""
    # those that cut a batch or a sequence
    later = OF_RATIOS if layout in ("whole", "2 micro-batches", "cp2") else []
    return [*((method, "first") for method in CATALOGUE), *((method, "later") for method in later)]


@pytest.fixture(scope="module")
def updates(run_distributed, tmp_path_factory):
    """layout -> "first" or "later" -> method -> metrics of its update."""
    directory = tmp_path_factory.mktemp("methods")
    replayed.make_models(directory)
    return measured(run_distributed, __file__, directory, LAYOUTS)


@pytest.mark.parametrize("method", CATALOGUE)
def test_an_update_is_finite_and_has_every_term(updates, method):
    metrics = updates["whole"]["first"][method]
    assert all(np.isfinite(value) for value in metrics.values())
    losses = {key for key in metrics if key.startswith("objective/") and key.endswith("/loss")}
    assert losses == {
        f"objective/{name}/loss" for name in active(CATALOGUE[method].method, STEP).terms
    }
    assert metrics["train/grad_norm"] > 0


# A process reward is a sum over a sequence, which context parallelism cuts: the checks refuse it.
SPLIT = [
    (layout, *case)
    for layout in NAMES[1:]
    for case in cases(layout)
    if (layout, case[0]) != ("cp2", "prime")
]


@pytest.mark.parametrize(("layout", "method", "when"), SPLIT)
def test_the_update_does_not_depend_on_the_layout(updates, layout, method, when):
    got, want = updates[layout][when][method], updates["whole"][when][method]
    assert got.keys() == want.keys()
    for key in want:
        assert got[key] == pytest.approx(want[key], rel=5e-5, abs=5e-6), key


def test_the_figures_are_those_of_before(updates, check_golden):
    """Losses and gradient norms that were kept: what moves or renames code must not change them."""
    kept = ("loss", "train/grad_norm")
    first = updates["whole"]["first"]
    check_golden(
        "methods", {m: {k: v for k, v in f.items() if k.endswith(kept)} for m, f in first.items()}
    )


def test_a_sequences_ratio_makes_another_update_once_the_policy_has_moved(updates):
    first, later = ({name: of[name]["train/grad_norm"] for name in ("grpo", "gspo")}
                    for of in updates["whole"].values())  # fmt: skip
    assert first["gspo"] == pytest.approx(first["grpo"], rel=1e-5)
    assert later["gspo"] != pytest.approx(later["grpo"], rel=1e-2)


def test_methods_differ(updates):
    """No two methods make the same update, but those that are equal on policy, at this step, or on
    these rewards, or with the teacher as reference."""
    equal = [
        {"grpo", "gspo"},
        {"grpo++", "dapo", "cispo", "kdrl_group_mask"},
        {"opd", "opd_then_rl", "exopd"},
        {"tgpo", "tgpo_annealing"},
    ]
    norms: dict[float, set[str]] = {}
    for method, metrics in updates["whole"]["first"].items():
        norms.setdefault(round(metrics["train/grad_norm"], 6), set()).add(method)
    together = [methods for methods in norms.values() if len(methods) > 1]
    assert all(any(methods <= each for each in equal) for methods in together), together


# -------------------------------------------------------------------------------------- the program
def run(
    directory: Path,
    layout_name: str,
    tp: int,
    sp: bool,
    cp: int,
    micro: int,
    fused: bool,
    teacher_tp: int,
) -> dict:
    from megatron_opd.architectures.config import LayoutConfig
    from megatron_opd.contracts.signals import Signals
    from megatron_opd.methods.needs import fit_topk, needs_of, process_reward
    from megatron_opd.objective.batch import Batch
    from megatron_opd.objective.loss import Objective, finish
    from megatron_opd.objective.process_reward import ProcessRewardObjective, process_columns
    from megatron_opd.teacher.score import MegatronTeacher
    from megatron_opd.trainer.process_reward import ProcessModel, prepare_process_model
    from megatron_opd.trainer.step import Trainer
    from megatron_opd.trainer.student import prepare

    shared = {"context_parallel_size": cp}
    layout, frozen = LayoutConfig(tp, 1, sp, **shared), LayoutConfig(teacher_tp, **shared)
    model = lambda name, layout: replayed.load_model(directory / name, layout)  # noqa: E731
    scoring = {
        "student_vocab_size": replayed.VOCAB,
        "micro_batch_tokens": micro,
        "temperature": 1.0,
    }
    teacher, reference = (MegatronTeacher(*model("teacher", frozen), **scoring) for _ in range(2))
    chunks, arch, parallel = model("student", layout)
    config = tiny_config(1e-30, layout, fused_output_layer=fused)  # the weights stay as they are
    student = prepare(chunks, arch, parallel, config)
    advantage = replace(process_reward(CATALOGUE["prime"].method), lr=1e-2)
    process = ProcessModel(
        prepare_process_model(*model("student", layout), config, advantage),
        ProcessRewardObjective(advantage.beta, arch.vocab_size, 1.0), micro, 1.0,
    )  # fmt: skip
    learned = process.learn(
        recorded := replayed.recorded_rows(),
        process_columns(
            Batch(recorded, Signals(None, reference.score(recorded).logprobs_T), 0, STEP, 64)
        ),
        step=STEP,
    )
    out: dict = {"first": {}, "later": {}}
    for name, when in cases(layout_name):
        method, samples = (
            fit_topk(CATALOGUE[name].method, 8),
            as_read_by(CATALOGUE[name].method, recorded),
        )
        needs = needs_of(active(method, STEP), updates_per_step=2 if when == "later" else 1)
        objective = Objective(method, arch.vocab_size, 1.0)
        trainer = Trainer(
            student,
            objective,
            updates_per_step=1,
            micro_batch_tokens=micro,
            temperature=1.0,
            max_skipped=0,
            teacher_head=teacher.head if needs.teacher_head else None,
        )
        signals = Signals(
            teacher.score(samples, needs.topk) if needs.teacher else None,
            reference.score(samples).logprobs_T if needs.reference else None,
            moved(trainer.signals(samples), when) if needs.student_pass else None,
            process.logprobs(samples) if needs.process else None,
        )
        columns = partial(replayed.columns_of, method, samples, signals, STEP)
        (metrics,) = trainer.step(samples, columns, step=STEP)
        out[when][name] = finish(metrics) | (learned if needs.process else {})
    return out


def moved(signals: StudentSignals, when: str) -> StudentSignals:
    """Of a policy that was another one before the step's first updates, for a later one."""
    noise_T = np.random.default_rng(3).normal(0, 0.1, len(signals.logprobs_T)).astype(np.float32)
    return replace(signals, logprobs_T=signals.logprobs_T + noise_T * (when == "later"))


def main() -> int:
    from megatron_opd.vocab_parallel import linear

    linear.SLAB_TOKENS = 8
    return measure(LAYOUTS, run)


if __name__ == "__main__":
    sys.exit(main())
