"""Whole runs through the command line: vLLM samples, the teacher scores, Megatron updates, and the
weights go back.

One student with some skill is made first (itself a run); every other run starts from it. A killed
and a stopped run that are resumed must leave exactly what the uninterrupted one left.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from safetensors.numpy import load_file

from megatron_opd.architectures.architecture import read_architecture
from megatron_opd.conversion import convert
from megatron_opd.weights.hf import HfCheckpoint
from tests.forked import run as run_forked
from tools import demo, make_demo

ROOT = Path(__file__).parents[2]
STEPS = 6
PHASES = (
    "generate",
    "score",
    "teacher",
    "forward",
    "optimizer",
    "refit",
    "save",
    "publish",
    "evaluate",
    "engine",
)
LAYOUTS = {
    "tp2": ["student.layout.tensor_model_parallel_size=2"],
    "dp2": ["student.layout.tensor_model_parallel_size=1"],  # with the distributed optimizer
}


def megatron_opd(*argv: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_opd", *map(str, argv)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finished(
    process: "subprocess.Popen[str]", code: int = 0, seconds: float = 240
) -> tuple[str, str]:
    try:
        stdout, stderr = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code, stderr[-3000:]
    return stdout, stderr


def command(*argv: object, nproc: int | None = None, code: int = 0) -> tuple[str, str]:
    """stdout and stderr of the same, without its imports; `nproc`: in as many ranks, as torchrun
    starts them."""
    return forked("megatron_opd", nproc, *argv, code=code)


def forked(
    program: str, nproc: int | None, *argv: object, code: int = 0, timeout: float = 240
) -> tuple[str, str]:
    done = run_forked(program, nproc, *argv, timeout=timeout)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout, done.stderr


@dataclass
class Bench:
    """The inputs of the runs."""

    assets: Path
    student: Path

    def recipe(self, run_dir: Path, *overrides: str) -> list[str]:
        return [
            str(ROOT / "recipes" / "demo.yaml"),
            f"run_dir={run_dir}",
            f"num_steps={STEPS}",
            f"student.path={self.student}",
            f"teacher.path={self.assets / 'teacher'}",
            f"data.train={self.assets / 'train.jsonl'}",
            f"data.heldout={self.assets / 'heldout.jsonl'}",
            "rollout.num_prompts=8",
            "train.micro_batch_tokens=100",
            "train.optimizer.warmup_steps=2",
            "checkpoint.every=2",
            "eval={every: 3, num_prompts: 60}",
            "student.rope_theta=20000",  # another rotary base than the student's config.json has
            *overrides,
        ]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The demo's data, its untrained teacher, and a student that knows the format."""
    folder = tmp_path_factory.mktemp("bench")
    make_demo.write_assets(folder / "assets", seed=0)
    start = folder / "student_start"
    command(
        "train",
        ROOT / "recipes" / "demo_student_start.yaml",
        f"run_dir={start}",
        "num_steps=120",
        f"student.path={folder / 'assets' / 'student'}",
        f"data.train={folder / 'assets' / 'student_start.jsonl'}",
    )
    losses = [row["train/loss"] for row in rows_of(start) if "train/loss" in row]
    assert losses[-1] < 0.5 * losses[0]
    return Bench(folder / "assets", start / "hf")


@pytest.fixture(scope="module", params=list(LAYOUTS))
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def whole_run(bench: Bench, layout: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed, one of them started as users do."""
    run = tmp_path_factory.mktemp("whole") / layout
    recipe = bench.recipe(run, *LAYOUTS[layout])
    if layout == "tp2":
        finished(megatron_opd("train", *recipe, "--nproc", "2"))
    else:
        command("train", *recipe, nproc=2)
    return run


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_times(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith("timing/")} for row in rows_of(run)]


def until(
    condition: Callable[[], bool], process: "subprocess.Popen[str]", seconds: float = 180
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def workers(process: "subprocess.Popen[str]") -> Iterator[int]:
    """The training processes that `process` has started, by rank."""
    for agent in children(process.pid):
        yield from children(agent)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def steps_logged(run: Path) -> int:
    return (
        len((run / "metrics.jsonl").read_text().splitlines())
        if (run / "metrics.jsonl").exists()
        else 0
    )


def mixed(bench: Bench) -> list[str]:
    """Two parts of data, a further held-out set, and a sum of rewards of which one is routed."""
    train = bench.assets / "train.jsonl"
    heldout = bench.assets / "heldout.jsonl"
    return [
        "data.train=[]",
        f"data.mixture={{a: {{path: {train}}}, b: {{path: {heldout}, weight: 3}}}}",
        f"data.heldout_sets={{more: {{path: {train}, source: b, num_prompts: 4}}}}",
        "reward.rewards={answer: {kind: math}, long: {kind: format, pattern: '.{8,}', "
        "sources: [b], weight: 0.3}}",
        "reward.length_penalty={overlong: 0.5}",
        "rollout.stop=['99']",
    ]


def assert_same_run(run: Path, expected: Path, *more: str) -> None:
    """Metrics, samples, held-out answers and weights, bit for bit; `more` folders of answers."""
    assert without_times(run) == without_times(expected)
    for folder in ("rollouts", "heldout", *more):
        assert (expected / folder).is_dir()
        files = {path.name: path.read_bytes() for path in (expected / folder).iterdir()}
        assert {path.name: path.read_bytes() for path in (run / folder).iterdir()} == files
    got, wanted = (load_file(each / "hf" / "model.safetensors") for each in (run, expected))
    assert got.keys() == wanted.keys()
    assert all((got[name] == wanted[name]).all() for name in wanted)


# ----------------------------------------------------------------------------------------- resuming
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(
    bench: Bench, layout: str, whole_run: Path, tmp_path: Path
) -> None:
    """TP2: one process is killed between steps. DP2: Ctrl-C, which saves first, wherever the run
    is."""
    run = tmp_path / "interrupted"
    process = megatron_opd("train", *bench.recipe(run, *LAYOUTS[layout]), "--nproc", "2")
    until(lambda: steps_logged(run) >= 3, process)
    ranks = list(workers(process))
    assert len(ranks) == 2
    if layout == "tp2":
        os.kill(ranks[1], signal.SIGKILL)
        _, stderr = finished(process, code=1)
        assert "the process of rank 1 was killed by SIGKILL" in stderr
    else:
        process.send_signal(signal.SIGINT)
        _, stderr = finished(process, code=130)
        assert f"go on with: megatron-opd train {run} --resume --nproc 2" in stderr
        assert (run / "checkpoints" / f"step-{steps_logged(run):06d}" / "manifest.json").is_file()
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert steps_logged(run) < STEPS + 1
    command("train", run, "--resume", nproc=2)
    assert_same_run(run, whole_run)


def test_a_run_goes_on_in_another_layout(layout: str, whole_run: Path, tmp_path: Path) -> None:
    """From its checkpoint of step 4: tensor-parallel on one process, data-parallel with tensor
    parallelism."""
    run, tp = tmp_path / "elsewhere", {"tp2": 1, "dp2": 2}[layout]
    shutil.copytree(whole_run, run, ignore=shutil.ignore_patterns("step-000006", "hf"))
    changed = f"student.layout.tensor_model_parallel_size={tp}"
    command("train", run, "--resume", changed, nproc=tp)
    for row, expected in zip(rows_of(run)[4:6], rows_of(whole_run)[4:6], strict=True):
        for key in (
            "train/loss",
            "train/grad_norm",
            "reward/mean",
            "rollout/completion_tokens/mean",
        ):
            assert row[key] == pytest.approx(expected[key], rel=1e-3), key


def test_a_prolonged_run_follows_the_longer_schedule_and_exports_its_end(
    layout: str, whole_run: Path, tmp_path: Path
) -> None:
    if layout == "tp2":
        pytest.skip("the layout does not matter")
    run, longer = tmp_path / "run", f"num_steps={STEPS + 2}"
    shutil.copytree(whole_run, run)
    stdout, _ = command("train", run, "--resume", longer, nproc=2)
    assert f"goes on as that of num_steps={STEPS + 2}" in stdout
    rates = [row["train/learning_rate"] for row in rows_of(run)[:-1]]
    assert len(rates) == STEPS + 2 and rates[STEPS] > 0
    rises = [after > before for before, after in pairwise(rates)]
    assert rises[STEPS - 1] and not any(rises[STEPS:])  # less of the longer schedule is over
    assert step_of(run / "hf") == STEPS + 2 and step_of(run / f"hf-step-{STEPS:06d}") == STEPS
    weights = {
        name: (run / name / "model.safetensors").read_bytes()
        for name in ("hf", f"hf-step-{STEPS:06d}")
    }
    assert weights[f"hf-step-{STEPS:06d}"] == (whole_run / "hf" / "model.safetensors").read_bytes()

    shutil.rmtree(run / "hf")  # as if it had been killed before its export
    (run / f"hf-step-{STEPS:06d}").rename(run / "hf")
    command("train", run, "--resume")
    assert step_of(run / "hf") == STEPS + 2
    assert {name: (run / name / "model.safetensors").read_bytes() for name in weights} == weights
    _, stderr = command("train", run, "--resume", f"num_steps={STEPS}", code=2)
    assert (
        f"num_steps: {STEPS} is below the {STEPS + 2} steps that {run} has done"
        in stderr.splitlines()[-1]
    )


def step_of(hf: Path) -> int:
    return json.loads((hf / "origin.json").read_text())["step"]


@pytest.mark.timeout(600)
def test_a_run_killed_in_any_phase_goes_on_as_if_nothing_had_happened(
    bench: Bench, tmp_path: Path
) -> None:
    """kill -9 while sampling, verifying, scoring, in a forward pass, after the optimizer, in the
    refit, the save ...

    And an engine that fails while it generates, which is healed without a stop.
    """
    recipe = bench.recipe(
        tmp_path, *LAYOUTS["dp2"], "num_steps=3", "rollout.num_prompts=4", "checkpoint.every=1"
    )
    recipe += ["eval={every: 1, num_prompts: 8}", "log.tensorboard=false", *mixed(bench)]
    _, stderr = forked(
        "tests.e2e.killed_runs", None, tmp_path, ",".join(PHASES), *recipe, timeout=500
    )
    ended = {phase: (tmp_path / f"{phase}.ended").read_text() for phase in PHASES}
    assert ended == {phase: "0 0" if phase == "engine" else "9 0" for phase in PHASES}, stderr[
        -3000:
    ]
    restarts = [row.get("rollout/engine_restarts", 0) for row in rows_of(tmp_path / "engine")]
    assert restarts == [0, 1, 0, 0]  # in the evaluation before step 1
    metrics = tmp_path / "engine" / "metrics.jsonl"
    metrics.write_text(
        metrics.read_text().replace('"rollout/engine_restarts": 1', '"timing/engine_restarts": 1')
    )
    for phase in PHASES:
        assert_same_run(tmp_path / phase, tmp_path / "whole", "heldout_more")
    shares = [row["reward/source/b/episodes"] for row in rows_of(tmp_path / "whole")[:-1]]
    assert shares == [12, 12, 12]  # 3 of 4 prompts
    assert "eval/set/more/source/b/accuracy" in rows_of(tmp_path / "whole")[-1]


@pytest.mark.timeout(600)
def test_a_run_with_a_teacher_apart_goes_on_and_so_it_does_with_one_beside(
    bench: Bench, tmp_path: Path
) -> None:
    """Ctrl-C reaches the teacher's process too, which is needed until the step is done. Then that
    process is killed."""
    whole, run = tmp_path / "whole", tmp_path / "stopped"
    apart = [*LAYOUTS["dp2"], "teacher.processes=1", "rollout.num_prompts=4"]
    finished(megatron_opd("train", *bench.recipe(whole, *apart), "--nproc", "2"))

    process = megatron_opd("train", *bench.recipe(run, *apart), "--nproc", "2")
    until(lambda: steps_logged(run) >= 1, process)
    process.send_signal(signal.SIGINT)
    _, stderr = finished(process, code=130)
    assert f"go on with: megatron-opd train {run} --resume --nproc 2" in stderr
    process = megatron_opd("train", run, "--resume", "--nproc", "2")
    until(lambda: steps_logged(run) >= 4, process)
    ranks = list(workers(process))
    os.kill(ranks[1], signal.SIGKILL)
    _, stderr = finished(process, code=1)
    assert (
        stderr.splitlines()[-1]
        == "megatron-opd: error: the process of rank 1 was killed by SIGKILL"
    )
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    finished(megatron_opd("train", run, "--resume", "teacher.processes=null"))
    assert_same_run(run, whole)


@pytest.mark.timeout(600)
def test_engines_apart_sample_what_those_beside_would(bench: Bench, tmp_path: Path) -> None:
    """Alone and with a teacher apart. The engine's process is killed in between, which ends the run
    at once."""
    whole, run = tmp_path / "whole", tmp_path / "apart"
    recipe = [*LAYOUTS["dp2"], "rollout.num_prompts=4"]
    command("train", *bench.recipe(whole, *recipe))
    process = megatron_opd(
        "train", *bench.recipe(run, *recipe, "rollout.processes=1"), "--nproc", "2"
    )
    until(lambda: steps_logged(run) >= 3, process)
    ranks = list(workers(process))
    os.kill(ranks[1], signal.SIGKILL)
    killed = time.monotonic()
    _, stderr = finished(process, code=1)
    assert time.monotonic() - killed < 40  # torchrun's own grace is 30 s
    assert (
        stderr.splitlines()[-1]
        == "megatron-opd: error: the process of rank 1 was killed by SIGKILL"
    )
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert steps_logged(run) < STEPS + 1
    command("train", run, "--resume", "teacher.processes=1", nproc=3)
    assert_same_run(run, whole)


def test_a_model_trained_beside_the_student_goes_on_too(bench: Bench, tmp_path: Path) -> None:
    run, again = tmp_path / "prime", tmp_path / "again"
    beside = [
        "method=prime",
        "method.policy.advantages.process.lr=1e-3",
        "teacher=null",
        "num_steps=3",
    ]
    command("train", *bench.recipe(run, *LAYOUTS["dp2"], *beside))
    assert [row["process_reward/loss"] > 0 for row in rows_of(run)[:3]] == [True] * 3
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "step-000003")
    shutil.rmtree(again / "hf")
    command("train", again, "--resume")
    assert_same_run(again, run)


def test_a_float16_run_goes_on_too(bench: Bench, tmp_path: Path) -> None:
    """With a loss scale that doubles after every good update, until it is too large."""
    run, again = tmp_path / "float16", tmp_path / "again"
    scale = [
        "train.loss_scale={initial: 32768.0, window: 1, hysteresis: 1}",
        "train.max_skipped_updates=0",
    ]
    command(
        "train", *bench.recipe(run, *LAYOUTS["dp2"], "precision=float16", *scale, "num_steps=4")
    )
    rows = rows_of(run)[:4]
    changes = [after["train/loss_scale"] / row["train/loss_scale"] for row, after in pairwise(rows)]
    assert (
        changes == [0.5 if row["train/skipped_updates"] else 2.0 for row in rows[:-1]]
        and 2.0 in changes
    )
    assert all(row["refit/max_error"] < 1e-3 for row in rows)
    assert set(HfCheckpoint(run / "hf").dtypes.values()) == {torch.float16}
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "step-000004")
    shutil.rmtree(again / "hf")
    command("train", again, "--resume")
    assert_same_run(again, run)


def test_one_process_needs_no_launcher_and_draws_the_same_samples(
    bench: Bench, whole_run: Path, tmp_path: Path
) -> None:
    """Started by the Python function, from the same weights in Megatron's format, which vLLM cannot
    read and the refit brings it."""
    run = tmp_path / "alone"
    student = convert.convert(str(bench.student), str(tmp_path / "student"))
    changes = ["eval=null", "num_steps=1", f"student.path={student}"]
    program = tmp_path / "alone.py"
    program.write_text(
        "import sys\nimport megatron_opd\nprint(megatron_opd.train(*sys.argv[1:]))\n"
    )
    stdout, _ = forked(str(program), None, *bench.recipe(run, *LAYOUTS["dp2"], *changes))
    assert stdout.splitlines()[-1] == str(run)
    assert [row["step"] for row in rows_of(run)] == [0, 1]
    sampled = [
        [json.loads(line)["token_ids"] for line in (each / "rollouts" / "step-000000.jsonl").open()]
        for each in (run, whole_run)
    ]
    assert sampled[0] == sampled[1]
    assert {path.name for path in (run / "hf").iterdir()} == {
        path.name for path in (whole_run / "hf").iterdir()
    }


# -------------------------------------------------------------------------------- what a run leaves
def test_metrics_of_a_run(whole_run: Path) -> None:
    rows = rows_of(whole_run)
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [0, 3, STEPS]
    for row in rows[:-1]:
        assert row["mismatch/logprob_abs/mean"] < 1e-3
        # of the row of signs; columns are compared bit for bit
        assert row["refit/max_error"] < 2e-6
        assert row["rollout/policy_version"] == row["step"]
        assert row["train/grad_norm"] > 0
        phases = [
            row[f"timing/{phase}_seconds"]
            for phase in ("generate", "reward", "gather", "teacher", "train")
        ]
        assert sum(phases) + row["timing/refit_seconds"] == pytest.approx(
            row["timing/step_seconds"], rel=0.05
        )
    assert rows[0]["objective/guidance/weight"] == 10.0
    assert rows[3]["objective/guidance/weight"] == pytest.approx(9.7)
    assert any(0 < row["reward/mean"] < 1 for row in rows[:-1]), (
        "no reward to learn from: the test shows nothing"
    )


def test_files_of_a_run(whole_run: Path) -> None:
    present = {path.name for path in whole_run.iterdir()}
    assert {
        "config.yaml",
        "env.json",
        "metrics.jsonl",
        "rollouts",
        "heldout",
        "checkpoints",
        "report.html",
        "plots",
        "tensorboard",
        "hf",
    } <= present
    assert (whole_run / "report.html").stat().st_size > 100_000
    assert not [name for name in present if "partial" in name or "unfinished" in name]
    samples = [
        json.loads(line)
        for line in (whole_run / "rollouts" / "step-000002.jsonl").read_text().splitlines()
    ]
    assert samples[0]["policy_version"] == 2
    assert len(samples[0]["teacher"]["argmax_ids"]) == len(samples[0]["token_ids"])


def test_transformers_reproduces_the_greedy_answers(whole_run: Path) -> None:
    assert read_architecture(whole_run / "hf").rope_theta == 20000
    assert demo.compare_with_transformers(whole_run, STEPS) == (60, 60)


def test_eval_convert_and_report_agree_with_the_run(whole_run: Path, tmp_path: Path) -> None:
    stdout, _ = command("eval", whole_run, "--model", whole_run / "hf")
    assert f"eval/accuracy {rows_of(whole_run)[-1]['eval/accuracy']:.4f}" in stdout
    out = tmp_path / "converted"
    command("convert", whole_run / "checkpoints" / f"step-{STEPS:06d}", out)
    assert (out / "model.safetensors").read_bytes() == (
        whole_run / "hf" / "model.safetensors"
    ).read_bytes()
    command("report", whole_run)
    _, stderr = command("convert", whole_run / "hf", out, code=2)
    assert stderr.count("\n") == 1


def test_groups_of_equal_rewards_are_sampled_anew(bench: Bench, tmp_path: Path) -> None:
    """DAPO's dynamic sampling: every group that trains has a right and a wrong response, however
    many it takes."""
    run = tmp_path / "dapo"
    changes = [
        "method=dapo",
        "teacher=null",
        "num_steps=2",
        "train.optimizer.lr=1e-5",
        "rollout.num_prompts=4",
    ]
    command("train", *bench.recipe(run, *changes), nproc=2)
    steps = rows_of(run)[:2]
    assert [row["reward/uniform_groups/mean"] for row in steps] == [0, 0]
    assert all(0 < row["reward/mean"] < 1 for row in steps)
    state = json.loads((run / "checkpoints" / "step-000002" / "state.json").read_text())
    assert state["source"]["epoch"] > 0 or state["source"]["position"] > 8


def test_mixtures_of_experts_teach_and_learn(bench: Bench, tmp_path: Path) -> None:
    """Each with a layout of its own: the teacher's experts lie on two ranks of the student's data
    parallelism."""
    import torch
    import transformers

    teacher, student, run = tmp_path / "teacher", tmp_path / "student", tmp_path / "moe"
    for directory in (teacher, student):
        ignored = shutil.ignore_patterns("*.safetensors", "config.json")
        shutil.copytree(bench.assets / "teacher", directory, ignore=ignored)
    sizes = json.loads((bench.assets / "teacher" / "config.json").read_text())
    kept = (
        "vocab_size",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
    )
    config = transformers.Qwen3MoeConfig(
        **{key: sizes[key] for key in kept},
        num_hidden_layers=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        intermediate_size=64,
        norm_topk_prob=True,
        initializer_range=0.1,
    )
    for seed, directory in enumerate((teacher, student)):
        torch.manual_seed(seed)
        transformers.Qwen3MoeForCausalLM(config).save_pretrained(directory)
    student = convert.convert(str(student), str(tmp_path / "converted"))
    changes = [
        "method=opd",
        "num_steps=3",
        "teacher.layout.tensor_model_parallel_size=2",
        "teacher.layout.expert_model_parallel_size=2",
        "student.layout.expert_model_parallel_size=2",
        f"teacher.path={teacher}",
        f"student.path={student}",
    ]
    recipe = [
        each
        for each in bench.recipe(run, *LAYOUTS["dp2"])
        if not each.startswith(("teacher.", "student.path"))
    ]
    command("train", *recipe, *changes, nproc=2)
    rows = rows_of(run)[:3]
    assert all(row["teacher/log_ratio/mean"] < -0.1 and row["train/grad_norm"] > 0 for row in rows)
    # The engine has the experts that the trainer has moved.
    assert all(row["mismatch/logprob_abs/mean"] < 1e-5 for row in rows)


def test_traces_are_made_and_learned_from(bench: Bench, tmp_path: Path) -> None:
    """A model's right responses become a file, and the methods that mix traces in read it."""
    data, out = tmp_path / "some.jsonl", tmp_path / "traces.parquet"
    data.write_text("\n".join((bench.assets / "train.jsonl").read_text().splitlines()[:100]) + "\n")
    recipe = [
        f"data.train={data}" if each.startswith("data.train=") else each
        for each in bench.recipe(tmp_path / "unused", "teacher=null", "method=grpo")
    ]
    asked = ["traces", *recipe, "--model", bench.student, "--samples", "3", "--out", out]
    stdout, _ = command(*asked)
    table = pyarrow.parquet.read_table(out)
    rows = table.to_pylist()
    assert 8 <= len(rows) < 100 and f"{len(rows)} traces for {len(rows)} of 100 prompts" in stdout
    for row in rows:
        assert row["response"].endswith(f"\\boxed{{{row['answer']}}}") and row["token_ids"][-1] == 1
    provenance = json.loads(table.schema.metadata[b"megatron-opd"])
    assert provenance["model"] == str(bench.student) and provenance["samples"] == 3
    _, stderr = command(*asked, code=2)
    assert (
        stderr
        == f"megatron-opd: error: --out: {out} exists already; give another file, or remove it\n"
    )

    bare, unverified = tmp_path / "bare.jsonl", tmp_path / "unverified.parquet"
    problems = [json.loads(line)["problem"] for line in data.read_text().splitlines()]
    bare.write_text("".join(json.dumps({"problem": problem}) + "\n" for problem in problems))
    recipe = [f"data.train={bare}" if each.startswith("data.train=") else each for each in recipe]
    command(
        "traces",
        *recipe,
        "--model",
        bench.student,
        "--samples",
        "1",
        "--out",
        unverified,
        "--unverified",
    )
    table = pyarrow.parquet.read_table(unverified)
    assert (
        len(rows) < table.num_rows
        and not json.loads(table.schema.metadata[b"megatron-opd"])["verified"]
    )
    assert {row["answer"] for row in table.to_pylist()} == {""}

    for method, traces in (("tropd", unverified), ("luffy", out)):
        run = tmp_path / method
        changes = [
            f"method={method}",
            "num_steps=2",
            f"data.train={traces}",
            "student.layout.tensor_model_parallel_size=2",
        ]
        changes += ["teacher=null"] if method == "luffy" else []
        recipe = [
            each
            for each in bench.recipe(run, *changes)
            if each != f"data.train={bench.assets / 'train.jsonl'}"
        ]
        command("train", *recipe, nproc=2)
        assert all(
            row["train/loss"] != 0 and row["rollout/given_tokens/mean"] > 0
            for row in rows_of(run)[:2]
        )
        # Evaluated, but without gold answers in its training data there is no reward to report.
        assert all(("reward/mean" in row) == (method == "luffy") for row in rows_of(run)[:2])
        texts = [
            json.loads(line)
            for line in (run / "rollouts" / "step-000000.jsonl").read_text().splitlines()
        ]
        given = {text["given"] for text in texts}
        # prefixes of many lengths
        assert 0 in given and len(given) > 1 if method == "luffy" else len(given) > 4
