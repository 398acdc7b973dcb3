"""The student as its own teacher, with privileged prompts, on every layout: what it says is the
student's weights on the longer prompt, whichever weights the recipe names, also after a resume."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_opd.contracts.rows import Source
from tests.distributed import test_layout_invariance as replayed
from tests.distributed.worlds import measure, measured
from tests.scripted import rows_of_episodes
from tests.tiny_config import tiny_config

STEPS = 3
EVERY = 2
DECAY = 0.5
WEIGHTS = ("present", "first", "every", "average")
LONGEST_SKILL = 9
# processes -> (name, TP, PP, CP, sequence parallel, tokens of a micro-batch)
LAYOUTS = {
    1: [
        ("whole", 1, 1, 1, False, 9999),
        ("2 micro-batches", 1, 1, 1, False, 700),
        ("4 micro-batches", 1, 1, 1, False, 350),
    ],
    2: [
        ("dp2", 1, 1, 1, False, 400),
        ("tp2", 2, 1, 1, True, 600),
        ("pp2", 1, 2, 1, False, 600),
        ("cp2", 1, 1, 2, False, 400),
    ],
}
NAMES = [name for layouts in LAYOUTS.values() for name, *_ in layouts]
# name of the results -> rows, of the student's present weights
HISTORIES = {"present": "window", "growing": "growing"}
WITH_DIVERGENCE = {"divergence": "window", "growing divergence": "growing"}
# Two more, on 2 processes and of other models, whose own student says what is right.
OTHER_MODELS = {
    "experts shared out": ("experts", 1, 1, 2, 500),  # model, PP, virtual stages, EP, tokens
    "virtual stages": ("deep", 2, 2, 1, 500),
}
# Cut into micro-batches the other weights say nothing new; a checkpoint is as good in any layout.
OF_ALL_WEIGHTS = [name for name in NAMES if "micro" not in name]
RESUMED = ("whole", "tp2", "pp2")
CASES = [(name, rows) for name in NAMES for rows in HISTORIES]
CASES += [(name, "present") for name in OTHER_MODELS]
# Whole distributions need both models' halves of a vocabulary in one process.
WITH_DIVERGENCES = [name for name in NAMES if name not in ("pp2", "cp2")]


def privileged(rows, seed: int = 0):
    """The rows, all but the first samples with a text of their group in front of the prompt."""
    skills = np.random.default_rng(seed).integers(0, replayed.VOCAB, (99, LONGEST_SKILL))
    out = []
    for r in rows:
        skill = skills[r.group, : 4 + r.group].astype(np.int32)
        ids = None if r.sample == 0 else np.concatenate([skill, r.prompt_ids])
        out.append(replace(r, privileged_ids=ids))
    return out


def method(*, divergence: bool):
    """GRPO and SDAR's gated log-likelihood, one with a divergence behind the same gate."""
    from megatron_opd.methods.advantages import ConstantAdvantage, RewardAdvantage
    from megatron_opd.methods.gates import SigmoidGate
    from megatron_opd.methods.method import MethodConfig
    from megatron_opd.methods.ratios import NoRatio
    from megatron_opd.methods.terms import DivergenceTerm, PolicyGradientTerm

    gate = SigmoidGate("sigmoid", 5.0, anchor="current")
    terms = {
        "policy": PolicyGradientTerm(
            "policy_gradient", advantages={"reward": RewardAdvantage("reward", over="rows")}
        ),
        "sdar": PolicyGradientTerm(
            "policy_gradient",
            weight=0.5,
            advantages={"each": ConstantAdvantage("constant")},
            ratio=NoRatio("none"),
            gates={"gap": gate},
        ),
    }
    if divergence:
        terms["divergence"] = DivergenceTerm(
            "divergence", "jsd", weight=0.5, beta=0.5, gates={"gap": gate}
        )
    return MethodConfig("own", terms)


def make_other_models(directory: Path) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {
        "vocab_size": replayed.VOCAB, "hidden_size": 32, "intermediate_size": 48,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "head_dim": 16, "tie_word_embeddings": False, "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(1)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    mixture = Qwen3MoeConfig(**sizes, **experts, num_hidden_layers=2, norm_topk_prob=True)
    Qwen3MoeForCausalLM(mixture).save_pretrained(directory / "experts")
    Qwen3ForCausalLM(Qwen3Config(**sizes, num_hidden_layers=4)).save_pretrained(directory / "deep")


# ------------------------------------------------------------------------------ the dense reference
def dense_reference(directory: Path, history: str) -> dict[str, float]:
    """The first update of "present" with the divergence, in float64."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory / "student", dtype=torch.float64)
    rows = privileged(rows_of_episodes(history, replayed.VOCAB))

    def log_p(prompt_ids, r):
        ids = torch.from_numpy(np.concatenate([prompt_ids, r.token_ids])).long()
        start = len(prompt_ids) - 1
        return model(ids[None]).logits[0, start : start + r.num_tokens].log_softmax(-1)

    tokens = sum(int((r.sources == Source.STUDENT).sum()) for r in rows)
    loss = torch.zeros((), dtype=torch.float64)
    for r in rows:
        own_TV = log_p(r.prompt_ids, r)
        with torch.no_grad():
            prompt_ids = r.prompt_ids if r.privileged_ids is None else r.privileged_ids
            teacher_TV = log_p(prompt_ids, r)
        ids_T1 = torch.from_numpy(r.token_ids).long()[:, None]
        own_T, teacher_T = (of_TV.gather(1, ids_T1)[:, 0] for of_TV in (own_TV, teacher_TV))
        group = torch.tensor([x.reward for x in rows if x.group == r.group]).double()
        advantage = (r.reward - group.mean()) / (group.std() + 1e-6)
        gate_T = (5 * (teacher_T - own_T.detach())).sigmoid()
        middle_TV = (0.5 * own_TV.exp() + 0.5 * teacher_TV.exp()).log()
        jsd_T = 0.5 * (teacher_TV.exp() * (teacher_TV - middle_TV)).sum(1)
        jsd_T = jsd_T + 0.5 * (own_TV.exp() * (own_TV - middle_TV)).sum(1)
        ratio_T = (own_T - own_T.detach()).exp()
        loss_T = -ratio_T * advantage - 0.5 * gate_T * own_T + 0.5 * gate_T * jsd_T
        loss = loss + loss_T[torch.from_numpy(r.sources == Source.STUDENT)].sum()
    loss = loss / tokens
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    return {"train/loss": loss.item(), "train/grad_norm": norm.item()}


# ---------------------------------------------------------------------------------------- the tests
@pytest.fixture(scope="module")
def found(run_distributed, tmp_path_factory):
    """layout -> what the program below found, and the references of `WITH_DIVERGENCE`."""
    directory = tmp_path_factory.mktemp("own")
    replayed.make_models(directory)
    make_other_models(directory)
    references = {
        name: dense_reference(directory, history) for name, history in WITH_DIVERGENCE.items()
    }
    return measured(run_distributed, __file__, directory, LAYOUTS), references


@pytest.mark.parametrize(("layout", "rows"), CASES)
def test_the_teacher_is_the_student_on_the_longer_prompt(found, layout, rows):
    got = found[0][layout][rows]
    for said, own in zip(got["teacher"], got["student on them"], strict=True):
        np.testing.assert_allclose(said, own, atol=2e-5)
    assert np.abs(np.subtract(got["teacher"][0], got["student"][0])).mean() > 0.1
    # The updates moved it, so that the other weights can be told apart.
    assert np.abs(np.subtract(got["teacher"][0], got["teacher"][2])).mean() > 0.01


@pytest.mark.parametrize("layout", OF_ALL_WEIGHTS)
def test_which_weights(found, layout):
    got = found[0][layout]
    first = got["present"]["teacher"][0]
    for said in got["first"]["teacher"]:
        np.testing.assert_allclose(said, first, atol=2e-5)
    every = got["every"]
    np.testing.assert_allclose(every["teacher"][0], first, atol=2e-5)
    np.testing.assert_allclose(every["teacher"][1], first, atol=2e-5)
    np.testing.assert_allclose(every["teacher"][2], every["student on them"][2], atol=2e-5)
    np.testing.assert_allclose(got["average"]["teacher"][0], first, atol=2e-5)
    assert np.abs(np.subtract(got["average"]["teacher"][1], first)).mean() > 1e-3
    assert got["average"]["error"] < 1e-6


@pytest.mark.parametrize(("layout", "rows"), CASES)
def test_another_skill_changes_the_teacher_alone(found, layout, rows):
    got = found[0][layout][rows]
    changed = np.abs(np.subtract(got["other skill"], got["teacher"][-1]))
    assert changed.mean() > 0.1
    without = ~np.array(got["has skill"])
    np.testing.assert_allclose(changed[without], 0, atol=2e-5)
    np.testing.assert_allclose(got["student of other skill"], got["student"][-1], atol=1e-7)
    assert got["kept"]  # train mode and gradients of the student, as they were


@pytest.mark.parametrize("rows", WITH_DIVERGENCE)
@pytest.mark.parametrize("layout", WITH_DIVERGENCES)
def test_loss_and_gradient_equal_dense_autograd(found, layout, rows):
    results, references = found
    got = results[layout][rows][0]
    for key, want in references[rows].items():
        assert got[key] == pytest.approx(want, rel=2e-5, abs=1e-5), key


@pytest.mark.parametrize("layout", NAMES)
def test_no_metric_depends_on_the_layout(found, layout):
    got, want = found[0][layout], found[0]["whole"]
    for weights in got:
        updates, wanted = (x[weights] for x in (got, want))
        if weights not in WITH_DIVERGENCE:
            updates, wanted = updates["updates"], wanted["updates"]
        for update, whole in zip(updates, wanted, strict=True):
            assert update.keys() == whole.keys()
            for key in whole:
                assert update[key] == pytest.approx(whole[key], rel=2e-4, abs=1e-4), key


@pytest.mark.parametrize("layout", RESUMED)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_resumed_run_goes_on_exactly(found, layout, weights):
    got = found[0][layout][weights]
    assert got["resumed"] == got["updates"][-1]


# -------------------------------------------------------------------------------------- the program
def config_of(directory: Path, layout, micro: int, weights: str, *, divergence: bool = False):
    from megatron_opd.architectures.config import ModelConfig
    from megatron_opd.recipe.agents import SelfTeacherConfig, SkillsConfig

    return tiny_config(
        1e-2,
        method=method(divergence=divergence),
        micro_batch_tokens=micro,
        student=ModelConfig(str(directory / "student"), layout=layout),
        skills=SkillsConfig("", max_tokens=LONGEST_SKILL),
        self_teacher=SelfTeacherConfig(weights, every=EVERY, decay=DECAY),
    )


def run(directory: Path, name: str, tp: int, pp: int, cp: int, sp: bool, micro: int):
    from megatron_opd.architectures.config import LayoutConfig
    from megatron_opd.doctor.measure import updates
    from megatron_opd.runs.assemble import assemble

    layout = LayoutConfig(tp, pp, sp, context_parallel_size=cp)
    rows = {
        history: privileged(rows_of_episodes(history, replayed.VOCAB))
        for history in HISTORIES.values()
    }
    out = {}
    for weights in WEIGHTS if name in OF_ALL_WEIGHTS else ("present",):
        config = config_of(directory, layout, micro, weights)
        checkpoints = directory / f"{name} {weights}" if name in RESUMED else None
        out[weights] = steps(config, rows["window"], checkpoints)
    config = config_of(directory, layout, micro, "present")
    out["growing"] = steps(config, rows["growing"], None)
    if name in WITH_DIVERGENCES:
        config = config_of(directory, layout, micro, "present", divergence=True)
        for case, history in WITH_DIVERGENCE.items():
            out[case] = updates(assemble(config), rows[history], steps=STEPS)
    return out


def steps(config, rows, checkpoints: Path | None) -> dict:
    """The updates of some steps, what was said in each, and what a resumed run does in the last."""
    from megatron_opd.runs.assemble import assemble
    from megatron_opd.runs.learner import learn
    from megatron_opd.teacher.privileged import with_privileged_prompts
    from megatron_opd.trainer import checkpoint

    learner = assemble(config)
    before = modes(learner)
    out: dict = {"teacher": [], "student": [], "student on them": [], "updates": []}
    averages = {name: value.clone() for name, value in learner.tensors()}
    for step in range(STEPS):
        out["student"].append(learner.trainer.signals(rows).logprobs_T.tolist())
        longer = with_privileged_prompts(rows)
        out["student on them"].append(learner.trainer.signals(longer).logprobs_T.tolist())
        signals = learner.judges.signals(rows, step)
        out["teacher"].append(signals.teacher.logprobs_T.tolist())
        if step == STEPS - 1:
            state = {"source": {}, "num_steps": STEPS}
            if checkpoints:
                checkpoint.save(checkpoints, step, learner.trained, state, keep=1)
            other = privileged(rows, seed=1)
            out["other skill"] = learner.judges.teacher.score(other).logprobs_T.tolist()
            out["student of other skill"] = learner.trainer.signals(other).logprobs_T.tolist()
        updates, _ = learn(learner, rows, signals, step)
        out["updates"] += updates
        for name, value in learner.tensors():
            averages[name] = DECAY * averages[name] + (1 - DECAY) * value
    out["has skill"] = [r.privileged_ids is not None for r in rows for _ in r.token_ids]
    out["kept"] = modes(learner) == before
    if config.self_teacher.weights == "average":
        out["error"] = error_of(learner, averages)
    if checkpoints is None:
        return out
    resumed = assemble(config)
    checkpoint.load(checkpoints / f"step-{STEPS - 1:06d}", resumed.trained)
    signals = resumed.judges.signals(rows, STEPS - 1)
    (out["resumed"],) = learn(resumed, rows, signals, STEPS - 1)[0]
    return out


def modes(learner) -> list:
    chunks = learner.student.bare_chunks
    gradients = [p.requires_grad for chunk in chunks for p in chunk.parameters()]
    return [[chunk.training for chunk in chunks], gradients]


def error_of(learner, averages) -> float:
    """The largest difference of the copy's weights from averages of the student's."""
    from megatron_opd.weights.export import iter_hf_tensors

    with learner.copy.stored():
        own = iter_hf_tensors(learner.copy.chunks, learner.student.arch, learner.student.parallel)
        return max(float((value - averages[name]).abs().max()) for name, value in own)


def run_other(directory: Path, name: str) -> dict:
    from megatron_opd.architectures.config import LayoutConfig, ModelConfig

    model, pp, vp, ep, micro = OTHER_MODELS[name]
    layout = LayoutConfig(
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vp,
        expert_model_parallel_size=ep,
    )
    config = config_of(directory, layout, micro, "present")
    config = replace(config, student=ModelConfig(str(directory / model), layout=layout))
    rows = privileged(rows_of_episodes("window", replayed.VOCAB))
    return {"present": steps(config, rows, None)}


def work(directory: Path, name: str, *layout) -> dict:
    return run(directory, name, *layout) if layout else run_other(directory, name)


def main() -> int:
    return measure(LAYOUTS | {2: [*LAYOUTS[2], *((name,) for name in OTHER_MODELS)]}, work)


if __name__ == "__main__":
    sys.exit(main())
