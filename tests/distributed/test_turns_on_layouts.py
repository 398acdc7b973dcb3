"""Episodes with several turns, as a row per turn and as one row, on every layout: loss and gradient
are those of plain torch in float64, and nothing depends on how the rows are cut up."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.distributed import test_layout_invariance as replayed
from tests.distributed.worlds import measure, measured
from tests.scripted import STEP, rows_of_episodes
from tests.tiny_config import tiny_config

KINDS = ("window", "growing")
# processes -> (name, TP, PP, CP, sequence parallel, tokens of a micro-batch)
LAYOUTS = {
    1: [("whole", 1, 1, 1, False, 999), ("micro-batches", 1, 1, 1, False, 70)],
    2: [
        ("dp2", 1, 1, 1, False, 70),
        ("tp2", 2, 1, 1, True, 120),
        ("pp2", 1, 2, 1, False, 120),
        ("cp2", 1, 1, 2, False, 70),
    ],
}
NAMES = [name for layouts in LAYOUTS.values() for name, *_ in layouts]


def method():
    """Outcomes within the group, returns of the teacher's log-ratio, and its best token."""
    from megatron_opd.methods.advantages import LogRatioAdvantage, RewardAdvantage
    from megatron_opd.methods.gates import EndGate
    from megatron_opd.methods.method import MethodConfig
    from megatron_opd.methods.ratios import ClippedRatio
    from megatron_opd.methods.terms import CrossEntropyTerm, PolicyGradientTerm

    advantages = {
        "reward": RewardAdvantage("reward", over="rows"),
        "teacher": LogRatioAdvantage("log_ratio", 0.3, anchor="old", discount=0.9),
    }
    policy = PolicyGradientTerm(
        "policy_gradient",
        advantages=advantages,
        ratio=ClippedRatio("sequence", 0.2, 0.2),
        aggregate="seq-mean-token-mean",
    )
    guidance = CrossEntropyTerm(
        "cross_entropy", "teacher_argmax", 0.7, gates={"body": EndGate("not_end")}
    )
    return MethodConfig("talk", {"policy": policy, "guidance": guidance})


# ------------------------------------------------------------------------------ the dense reference
def dense_reference(directory: Path, kind: str) -> dict[str, float]:
    from transformers import AutoModelForCausalLM

    load = lambda name: AutoModelForCausalLM.from_pretrained(directory / name, dtype=torch.float64)  # noqa: E731
    student, teacher = load("student"), load("teacher")

    def log_p(model, r):
        ids = torch.from_numpy(np.concatenate([r.prompt_ids, r.token_ids])).long()
        start = len(r.prompt_ids) - 1
        return model(ids[None]).logits[0, start : start + r.num_tokens].log_softmax(-1)

    rows = rows_of_episodes(kind, replayed.VOCAB)
    loss, guided = torch.zeros((), dtype=torch.float64), []
    for r in rows:
        own_TV = log_p(student, r)
        with torch.no_grad():
            teacher_TV = log_p(teacher, r)
        places = [t for t in range(r.num_tokens) if r.sources[t] == 0]
        ids = torch.from_numpy(r.token_ids).long()[places]
        own = own_TV[places].gather(1, ids[:, None])[:, 0]
        deltas = teacher_TV[places].gather(1, ids[:, None])[:, 0] - own.detach()
        to_go = torch.stack(
            [sum(0.9**m * d for m, d in enumerate(deltas[n:])) for n in range(len(places))]
        )
        group = torch.tensor([x.reward for x in rows if x.group == r.group]).double()
        outcome = (r.reward - group.mean()) / (group.std() + 1e-6)
        ratio = (own - own.detach()).exp()
        loss = loss - (ratio * (outcome + 0.3 * to_go)).mean() / len(rows)
        guided += [own_TV[t, teacher_TV[t].argmax()] * bool(~r.end_T[t]) for t in places]
    loss = loss - 0.7 * torch.stack(guided).mean()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in student.parameters()]).norm()
    return {"loss": loss.item(), "norm": norm.item()}


# ---------------------------------------------------------------------------------------- the tests
@pytest.fixture(scope="module")
def talked(run_distributed, tmp_path_factory):
    """layout -> kind -> metrics, and kind -> the reference."""
    directory = tmp_path_factory.mktemp("talk")
    replayed.make_models(directory)
    reference = {kind: dense_reference(directory, kind) for kind in KINDS}
    return measured(run_distributed, __file__, directory, LAYOUTS), reference


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", NAMES)
def test_loss_and_gradient_equal_dense_autograd(talked, layout, kind):
    results, reference = talked
    got, want = results[layout][kind], reference[kind]
    assert got["train/loss"] == pytest.approx(want["loss"], abs=1e-5)
    assert got["train/grad_norm"] == pytest.approx(want["norm"], rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", NAMES)
def test_no_metric_depends_on_the_layout(talked, layout, kind):
    got, want = talked[0][layout][kind], talked[0]["whole"][kind]
    assert got.keys() == want.keys()
    for key in want:
        assert got[key] == pytest.approx(want[key], rel=1e-5, abs=1e-5), key


def test_a_turn_has_the_same_probability_in_both_kinds_of_rows(talked):
    """A row per turn stands behind all that was said: the model reads the same."""
    for layout in NAMES:
        window, growing = (talked[0][layout][kind] for kind in KINDS)
        for key in ("mismatch/logprob_abs/mean", "teacher/log_ratio/mean", "student/entropy/mean"):
            assert window[key] == pytest.approx(growing[key], rel=1e-5, abs=1e-6), (layout, key)


# -------------------------------------------------------------------------------------- the program
def talk(directory: Path, _: str, tp: int, pp: int, cp: int, sp: bool, micro: int) -> dict:
    from megatron_opd.architectures.config import LayoutConfig
    from megatron_opd.contracts.signals import Signals
    from megatron_opd.objective.loss import Objective, finish
    from megatron_opd.teacher.score import MegatronTeacher
    from megatron_opd.trainer.step import Trainer
    from megatron_opd.trainer.student import prepare

    layout = LayoutConfig(tp, pp, sp, context_parallel_size=cp)
    teacher = MegatronTeacher(
        *replayed.load_model(directory / "teacher", layout),
        student_vocab_size=replayed.VOCAB, micro_batch_tokens=micro, temperature=1.0,
    )  # fmt: skip
    chunks, arch, parallel = replayed.load_model(directory / "student", layout)
    config = tiny_config(1e-30, layout, method=method())  # the weights stay as they are
    student = prepare(chunks, arch, parallel, config)
    trainer = Trainer(
        student, Objective(config.method, arch.vocab_size, 1.0),
        updates_per_step=1, micro_batch_tokens=micro, temperature=1.0, max_skipped=0,
    )  # fmt: skip
    out = {}
    for kind in KINDS:
        rows = rows_of_episodes(kind, replayed.VOCAB)
        signals = Signals(teacher.score(rows), student=trainer.signals(rows))
        columns = partial(replayed.columns_of, config.method, rows, signals, STEP)
        (update,) = trainer.step(rows, columns, step=STEP)
        out[kind] = finish(update)
    return out


def main() -> int:
    return measure(LAYOUTS, talk)


if __name__ == "__main__":
    sys.exit(main())
