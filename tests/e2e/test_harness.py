"""`megatron-opd bench --lm-eval` with the real package and real engines, on one and on two."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import forked
from tests.e2e import tiny_hf
from tests.e2e.test_bench import write_model

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("harness_worker.py")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
LOCK = forked.REPOSITORY / "constraints" / "lm-eval.txt"
# a text longer than the model reads, and a short one
TEXTS = [" ".join(f"w{80 + (7 * i + n) % 15}" for i in range(k)) for n, k in enumerate((3, 700))]
DATA = """\
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
"""
RECIPE = """name: harness
num_steps: 1
max_sequence_length: 64
precision: float32
method: {name: none, terms: {imitate: {kind: cross_entropy, targets: trace}}}
student: {path: %s}
train: {optimizer: {lr: 1.0}}
rollout: {kv_cache_gib: 0.5}
"""
TASKS = {
    "choose": """\
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc}]
""",
    "read": """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
""",
    "say": """\
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{gold}}"
repeats: 3
generation_kwargs: {until: ["{2}", "w91"], do_sample: true, temperature: 1.0, max_gen_toks: 12}
metric_list: [{metric: exact_match}]
filter_list: [{name: first, filter: [{function: take_first}]}]
""",
}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of lm-eval and of what it needs beside the pinned packages."""
    folder = tmp_path_factory.mktemp("packages")
    environment = dict(os.environ)
    for name in ("global.index-url", ":env:.index-url"):  # uv does not read pip's settings
        setting = subprocess.run([*PIP, "config", "get", name], capture_output=True, text=True)
        if setting.returncode == 0:
            environment.setdefault("UV_DEFAULT_INDEX", setting.stdout.strip())
    command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-deps"]
    command += ["--python", sys.executable, "--target", str(folder), "-r", str(LOCK)]
    subprocess.run(command, check=True, timeout=240, env=environment)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and tasks."""
    folder = tmp_path_factory.mktemp("harness")
    write_model(folder / "model", 0)
    (folder / "recipe.yaml").write_text(RECIPE % (folder / "model"))
    questions = []
    for number in range(6):
        choices = ["w84", "w85 w86", "w88"]
        question = {"q": f"w{80 + number} w{81 + number}", "choices": choices, "gold": number % 3}
        questions.append(json.dumps(question))
    (folder / "questions.jsonl").write_text("\n".join(questions) + "\n")
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in TEXTS) + "\n")
    for task, text in TASKS.items():
        file = folder / ("texts.jsonl" if task == "read" else "questions.jsonl")
        (folder / f"{task}.yaml").write_text(DATA.format(task=task, file=file) + text)
    return folder


def bench(folder: Path, packages: Path, nproc: int | None, out: str) -> Any:
    """Runs the tasks; the samples by task, and the process."""
    tasks = ",".join(str(folder / f"{task}.yaml") for task in TASKS)
    ended = forked.run(
        WORKER, nproc, packages, "bench", folder / "recipe.yaml", "--out", folder / out,
        "--lm-eval", tasks,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    samples: dict[str, list[Any]] = {task: [] for task in TASKS}
    for line in (folder / out / "lm_eval_samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        samples[sample["task"]].append(sample)
    return samples, ended


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
        yield


def expected_logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    """The logprob of every token but the first, by transformers."""
    with torch.no_grad():
        logprobs_TV = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return logprobs_TV[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def ids_of(words: str) -> list[int]:
    return [int(word.removeprefix("w")) for word in words.split()]


def test_logprobs_and_completions_are_the_models_on_one_engine_and_on_two(
    folder: Path, packages: Path
) -> None:
    samples, ended = bench(folder, packages, None, "one")
    assert "|choose|" in ended.stdout and "lm_eval.json" in ended.stdout
    results = json.loads((folder / "one" / "lm_eval.json").read_text())
    assert results["config"]["engine"]["name"] == "vllm"

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    right = 0
    for sample in samples["choose"]:
        logprobs = []
        for (context, continuation), [(logprob, greedy)] in zip(
            sample["arguments"], sample["resps"], strict=True
        ):
            before = ids_of(context)
            expected_T = expected_logprobs(model, before + ids_of(continuation))
            assert logprob == pytest.approx(float(expected_T[len(before) - 1 :].sum()), abs=1e-3)
            assert not greedy
            logprobs.append(logprob)
        right += logprobs.index(max(logprobs)) == sample["target"]
    assert results["results"]["choose"]["acc,none"] == pytest.approx(right / 6)

    # the second text is read in two windows, with one token less than the model's positions each
    window = tiny_hf.MAX_POSITIONS - 2
    for sample, text in zip(samples["read"], TEXTS, strict=True):
        ids = [tiny_hf.EOS_ID, *ids_of(text)]
        expected = float(expected_logprobs(model, ids[: window + 1]).sum())
        rest = len(ids) - window - 1
        if rest > 0:
            expected += float(expected_logprobs(model, ids[-window - 1 :])[-rest:].sum())
        assert sample["resps"][0][0] == pytest.approx(expected, abs=1e-2)

    for sample in samples["say"]:
        assert not any("{2}" in text or "w91" in text for text in sample["resps"][0])
    repeats = [len(set(sample["resps"][0])) for sample in samples["say"]]
    assert repeats.count(3) >= 4  # every one is a draw of its own; short ones may be alike
    texts = [text for sample in samples["say"] for text in sample["resps"][0]]
    assert not any("\\boxed " in text for text in texts)  # cut before the 2 that stood there
    assert any(text.endswith("\\boxed") for text in texts)

    on_two, _ = bench(folder, packages, 2, "two")
    for task in ("choose", "read"):
        for sample, other in zip(samples[task], on_two[task], strict=True):
            flat = torch.tensor(sample["resps"], dtype=torch.float64)
            assert torch.allclose(flat, torch.tensor(other["resps"]).double(), atol=1e-3)
    assert [s["resps"] for s in samples["say"]] == [s["resps"] for s in on_two["say"]]


def test_what_cannot_be_asked_is_one_line(folder: Path, packages: Path) -> None:
    task = (folder / "say.yaml").read_text().replace("do_sample: true", "do_sample: true, top_k: 5")
    (folder / "sharp.yaml").write_text(task)
    cases = {
        str(folder / "sharp.yaml"): "task say asks for top_k in its generation_kwargs",
        str(folder / "nowhere.yaml"): "nowhere.yaml: [Errno 2] No such file",
    }
    for name, words in cases.items():
        asked = ["bench", "--model", folder / "model", "--out", folder / "bad", "--lm-eval", name]
        ended = forked.run(WORKER, None, packages, *asked)
        assert ended.returncode == 2 and words in ended.stderr, ended.stderr
        assert "Traceback" not in ended.stderr
    (folder / "bad" / "lm_eval.json").write_text("{}")
    asked[-1] = str(folder / "say.yaml")
    ended = forked.run(WORKER, None, packages, *asked)
    assert ended.returncode == 2 and "exists already" in ended.stderr
