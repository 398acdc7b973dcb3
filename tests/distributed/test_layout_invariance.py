"""Recorded rollouts replayed on every layout: teacher signals, loss and gradient norm are those of
plain torch.

The reference is `transformers` with dense autograd and the formulas of the papers, written out
again here. Each layout then takes several optimizer steps (with Megatron's optimizer, distributed
over replicas) on the same rollouts.
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.distributed.worlds import measure, measured
from tests.tiny_config import tiny_config

STEPS = 3
VOCAB = 61  # odd: the last tensor-parallel shard holds a padding row
# processes -> (name, TP, PP, sequence parallel, tokens of a micro-batch); "fused" in a name: the
# fused output layer
LAYOUTS = {
    1: [
        ("tp1", 1, 1, False, 999),
        ("tp1 micro 70", 1, 1, False, 70),
        ("tp1 micro 20 fused", 1, 1, False, 20),
    ],
    2: [
        ("tp2", 2, 1, False, 90),
        ("tp2 sp", 2, 1, True, 90),
        ("pp2", 1, 2, False, 90),
        ("dp2", 1, 1, False, 90),
        ("tp2 fused", 2, 1, False, 90),
        ("tp2 sp fused", 2, 1, True, 90),
        ("pp2 fused", 1, 2, False, 90),
    ],
    4: [("tp2 pp2", 2, 2, False, 60), ("tp2 dp2", 2, 1, True, 60), ("pp2 dp2", 1, 2, False, 60)],
}
METHODS = ("tgpo", "grpo", "sft", "tgpo in 2 updates")


# -------------------------------------------------------------------------------- the replayed data
def make_models(directory: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    sizes = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    torch.manual_seed(0)
    student = Qwen3ForCausalLM(
        Qwen3Config(**sizes, head_dim=16, tie_word_embeddings=False, initializer_range=0.2)
    )
    student.save_pretrained(directory / "student")
    teacher = Qwen2ForCausalLM(
        Qwen2Config(**sizes, tie_word_embeddings=True, initializer_range=0.2)
    )
    teacher.save_pretrained(directory / "teacher")


def recorded_rows():
    """24 completions of 6 prompts with rewards, lengths from 1 to 12, by a policy that is not the
    student's."""
    from tests.rows import row, task

    rng = np.random.default_rng(7)
    rows = []
    for group in range(6):
        ids = rng.integers(0, VOCAB, rng.integers(1, 9)).astype(np.int32)
        of = task(group, prompt_ids=ids)
        for sample in range(4):
            n = int(rng.integers(1, 13))
            rows.append(
                row(
                    rng.integers(0, VOCAB, n), of=of, sample=sample, group=group,
                    logprobs=rng.normal(-3, 0.5, n), reward=float(rng.integers(0, 2)),
                )
            )  # fmt: skip
    return rows


def method_of(name):
    from megatron_opd.methods.catalogue import CATALOGUE
    from megatron_opd.methods.method import MethodConfig
    from megatron_opd.methods.ratios import ClippedRatio
    from megatron_opd.methods.terms import CrossEntropyTerm, PolicyGradientTerm

    if not name.startswith("tgpo"):
        return CATALOGUE[name].method
    return MethodConfig(
        "tgpo",
        {
            "policy": PolicyGradientTerm("policy_gradient", ratio=ClippedRatio("old", 0.02, 0.03)),
            "guidance": CrossEntropyTerm(
                "cross_entropy", "teacher_argmax", 0.7, aggregate="seq-mean-token-mean"
            ),
        },
    )


# ------------------------------------------------------------------------------ the dense reference
def dense_reference(directory: Path) -> dict:
    from transformers import AutoModelForCausalLM

    rows = recorded_rows()
    load = lambda name: AutoModelForCausalLM.from_pretrained(directory / name, dtype=torch.float64)  # noqa: E731
    student, teacher = load("student"), load("teacher")

    def log_p(model, r):
        ids = torch.from_numpy(np.concatenate([r.prompt_ids, r.token_ids])).long()
        start = len(r.prompt_ids) - 1
        return model(ids[None]).logits[0, start : start + r.num_tokens].log_softmax(-1)

    with torch.no_grad():
        teacher_log_p = [log_p(teacher, r) for r in rows]
    targets = [lp.argmax(-1) for lp in teacher_log_p]
    rewards = torch.tensor([r.reward for r in rows]).double().view(6, 4)
    advantages = (
        (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
    ).flatten()
    tokens = sum(r.num_tokens for r in rows)
    out = {
        "argmax": [int(v) for t in targets for v in t],
        "logprobs": [float(lp[t, i]) for lp, r in zip(teacher_log_p, rows, strict=True)
                     for t, i in enumerate(r.token_ids)],
        "entropy": [float(-(row.exp() * row).sum()) for lp in teacher_log_p for row in lp],
    }  # fmt: skip
    for name in ("tgpo", "grpo", "sft"):
        student.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        for r, target, advantage in zip(rows, targets, advantages, strict=True):
            lp = log_p(student, r)
            sampled = lp.gather(1, torch.from_numpy(r.token_ids).long()[:, None])[:, 0]
            ratio = (sampled - sampled.detach()).exp()
            guided = lp.gather(1, target[:, None])[:, 0]
            loss = (
                loss
                + {
                    "tgpo": -(ratio * advantage).sum() / tokens - 0.7 * guided.mean() / len(rows),
                    "grpo": -(ratio * advantage).mean() / len(rows),
                    "sft": -sampled.sum() / tokens,
                }[name]
            )
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in student.parameters()]).norm()
        out[name] = {"loss": loss.item(), "norm": norm.item()}
    return out


# ---------------------------------------------------------------------------------------- the tests
@pytest.fixture(scope="module")
def replayed(run_distributed, tmp_path_factory):
    """layout -> what the program below wrote, and the reference."""
    directory = tmp_path_factory.mktemp("replay")
    make_models(directory)
    return measured(run_distributed, __file__, directory, LAYOUTS), dense_reference(directory)


NAMES = [name for layouts in LAYOUTS.values() for name, *_ in layouts]


@pytest.mark.parametrize("layout", NAMES)
def test_teacher_signals_equal_transformers(replayed, layout):
    results, reference = replayed
    assert results[layout]["argmax"] == reference["argmax"]
    np.testing.assert_allclose(results[layout]["logprobs"], reference["logprobs"], atol=2e-5)
    np.testing.assert_allclose(results[layout]["entropy"], reference["entropy"], atol=2e-5)


@pytest.mark.parametrize("method", ["tgpo", "grpo", "sft"])
@pytest.mark.parametrize("layout", NAMES)
def test_first_loss_and_gradient_norm_equal_dense_autograd(replayed, layout, method):
    results, reference = replayed
    got, want = results[layout][method][0], reference[method]
    assert got["train/loss"] == pytest.approx(want["loss"], abs=1e-5)
    assert got["train/grad_norm"] == pytest.approx(want["norm"], rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", NAMES)
def test_later_steps_equal_one_process(replayed, layout, method):
    results, _ = replayed
    for got, want in zip(results[layout][method], results["tp1"][method], strict=True):
        assert got.keys() == want.keys()
        for key in want:
            # A difference of logprobs near 4 has their error.
            close = 8e-4 if key == "teacher/log_ratio/mean" else 2e-5
            assert got[key] == pytest.approx(want[key], rel=2e-4, abs=close), key


def test_clipping_is_active_once_the_policy_has_moved(replayed):
    first, second = replayed[0]["tp1"]["tgpo in 2 updates"][:2]
    assert first["objective/policy/clip_fraction"] == 0
    assert second["objective/policy/clip_fraction"] > 0


# -------------------------------------------------------------------------------------- the program
def load_model(model_dir, layout, recompute="none"):
    """(chunks with weights, architecture, groups) in float32. Collective over the world."""
    from megatron_opd.architectures.architecture import read_architecture
    from megatron_opd.mcore import parallel as groups
    from megatron_opd.mcore.model import build_model
    from megatron_opd.weights.load import load_hf

    arch, parallel = read_architecture(model_dir), groups.create(layout)
    chunks = build_model(arch, parallel, precision="float32", recompute=recompute)
    load_hf(chunks, model_dir, arch, parallel)
    return chunks, arch, parallel


def replay(directory: Path, name: str, tp: int, pp: int, sp: bool, micro: int) -> dict:
    from megatron_opd.architectures.config import LayoutConfig
    from megatron_opd.contracts.signals import Signals
    from megatron_opd.doctor.rows import begun_with_trace
    from megatron_opd.objective.loss import Objective, finish
    from megatron_opd.teacher.score import MegatronTeacher
    from megatron_opd.trainer.step import Trainer
    from megatron_opd.trainer.student import prepare

    rows, layout, fused = recorded_rows(), LayoutConfig(tp, pp, sp), "fused" in name
    # The teacher's layout is another one wherever that is possible.
    frozen = load_model(directory / "teacher", LayoutConfig(pp, tp) if pp != tp else LayoutConfig())
    teacher = MegatronTeacher(
        *frozen,
        student_vocab_size=VOCAB,
        micro_batch_tokens=micro + 10,
        temperature=1.0,
        offload=fused,
    )
    signals = teacher.score(rows)
    out: dict = {
        "argmax": signals.argmax_ids_T.tolist(),
        "logprobs": signals.logprobs_T.tolist(),
        "entropy": signals.entropy_T.tolist(),
    }
    for name in METHODS:
        updates = 2 if name.endswith("2 updates") else 1
        chunks, arch, parallel = load_model(directory / "student", layout)
        config = tiny_config(
            1e-2, layout, warmup_steps=2, clip_grad=0.5, num_steps=STEPS, method=method_of(name),
            updates_per_step=updates, fused_output_layer=fused,
        )  # fmt: skip
        student = prepare(chunks, arch, parallel, config)
        objective = Objective(config.method, arch.vocab_size, 1.0)
        trainer = Trainer(
            student,
            objective,
            updates_per_step=updates,
            micro_batch_tokens=micro,
            temperature=1.0,
            max_skipped=0,
        )

        # Of supervised data no token is the student's own.
        samples = [begun_with_trace(r, r.num_tokens) for r in rows] if name == "sft" else rows
        out[name] = []
        for step in range(STEPS):
            whole = Signals(signals, student=trainer.signals(samples) if updates > 1 else None)
            columns = partial(columns_of, config.method, samples, whole, step)
            out[name] += [finish(update) for update in trainer.step(samples, columns, step=step)]
    return out


def columns_of(method, samples, signals, step, rows, tokens):
    from megatron_opd.objective.batch import Batch
    from megatron_opd.objective.columns import build_columns

    return build_columns(method, Batch(samples[rows], signals.part(tokens), 0, step, 64))


def main() -> int:
    from megatron_opd.vocab_parallel import linear

    linear.SLAB_TOKENS = 8  # several slabs in every micro-batch
    return measure(LAYOUTS, replay)


if __name__ == "__main__":
    sys.exit(main())
