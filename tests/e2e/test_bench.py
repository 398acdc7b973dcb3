"""`megatron-opd bench` with real engines: whole, killed, resumed, on two, and by a server."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_opd.cli.main import main
from tests import forked
from tests.e2e import tiny_hf

pytestmark = pytest.mark.slow
QUESTIONS = 12
SAMPLES = 4
WORKER = Path(__file__).with_name("bench_worker.py")


def write_model(directory: Path, seed: int) -> Path:
    """A random model whose every word is a boxed number, so that each answer can be graded."""
    tiny_hf.write(tiny_hf.build("qwen3", seed=seed), directory)
    words = {"<pad>": 0, "<eos>": tiny_hf.EOS_ID}
    words |= {f"\\boxed{{{i % 5}}}" + "~" * (i // 5): i for i in range(2, tiny_hf.VOCAB_SIZE - 20)}
    words |= {f"w{i}": i for i in range(tiny_hf.VOCAB_SIZE - 20, tiny_hf.VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, and questions."""
    folder = tmp_path_factory.mktemp("bench")
    for seed in (0, 1):
        write_model(folder / f"model{seed}", seed)
    lines = []
    for number in range(QUESTIONS):
        words = " ".join(f"w{80 + (number * 7 + place) % 15}" for place in range(4 + number))
        lines.append(json.dumps({"problem": words, "answer": str(number % 5)}))
    (folder / "words.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def arguments(folder: Path, out: str, model: str = "model0") -> list[str]:
    return [
        "bench", "--model", str(folder / model), "--out", str(folder / out),
        "--suites", "math_500", "--data", f"math_500={folder / 'words.jsonl'}",
        "--samples", str(SAMPLES), "--max-tokens", "12",
    ]  # fmt: skip


def samples_of(directory: Path) -> dict[tuple[str, int], dict[str, Any]]:
    rows = pyarrow.parquet.read_table(directory / "samples.parquet").to_pylist()
    return {(row["key"], row["sample"]): row for row in rows}


def summary_of(directory: Path) -> dict[str, Any]:
    results = json.loads((directory / "results.json").read_text())
    return dict(results["suites"]["math_500"]["summary"])


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """A result that nothing disturbed."""
    ended = forked.run("megatron_opd", None, *arguments(folder, "whole"))
    assert ended.returncode == 0, ended.stderr
    assert "math_500" in ended.stdout and "whole/report.html" in ended.stdout
    return folder / "whole"


def test_every_sample_is_written_graded_and_counted(whole: Path) -> None:
    samples = samples_of(whole)
    assert len(samples) == QUESTIONS * SAMPLES
    scores = [row["score"] for row in samples.values()]
    summary = summary_of(whole)
    assert summary["questions"] == QUESTIONS and summary["samples"] == SAMPLES
    assert summary["score"] == pytest.approx(sum(scores) / len(scores))
    assert 0 < sum(scores) < len(scores)  # some are right
    assert len({row["text"] for row in samples.values()}) > QUESTIONS  # samples have seeds
    assert sorted(path.name for path in whole.iterdir()) == [
        "report.html", "request.json", "results.json", "samples.parquet"
    ]  # fmt: skip


def test_a_killed_evaluation_goes_on_with_two_engines_and_writes_no_sample_twice(
    folder: Path, whole: Path
) -> None:
    counts = folder / "counts"
    asked = arguments(folder, "killed")
    assert forked.run(WORKER, None, 17, counts, *asked).returncode == -signal.SIGKILL
    torn = folder / "killed" / "completions.0.jsonl"
    torn.write_text(torn.read_text() + '{"key": ["math_500", "cut sho')
    ended = forked.run(WORKER, 2, 0, counts, *asked)
    assert ended.returncode == 0, ended.stderr
    assert "48 samples of math_500; 17 are there already\n" in ended.stdout
    kept = counts.read_text().splitlines()
    assert len(kept) == len(set(kept)) == QUESTIONS * SAMPLES
    expected = samples_of(whole)
    actual = samples_of(folder / "killed")
    assert {key: row["text"] for key, row in actual.items()} == {
        key: row["text"] for key, row in expected.items()
    }
    assert summary_of(folder / "killed") == summary_of(whole)


def test_another_evaluation_is_refused_in_the_same_directory(
    folder: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (whole / "results.json").read_bytes()
    assert main([*arguments(folder, "whole"), "--samples", "2"]) == 2  # the last one counts
    assert "protocol.samples" in capsys.readouterr().err
    assert main(arguments(folder, "whole", "model1")) == 2
    assert "another model" in capsys.readouterr().err
    assert (whole / "results.json").read_bytes() == before


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """vLLM's own server with the first model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    settings = {
        "model": folder / "model0",
        "dtype": "float32",
        "max-model-len": 64,
        "port": port,
        "host": "127.0.0.1",
        "generation-config": "vllm",
    }
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    log = (folder / "server.log").open("w")
    server = subprocess.Popen(
        # as the engine of a run works
        [*command, "--enforce-eager", "--no-async-scheduling", "--no-enable-chunked-prefill"],
        env=environment, stdout=log, stderr=log,
        start_new_session=True,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen(f"{url}/v1/models", timeout=1)
                break
            except OSError:
                alive = server.poll() is None and time.monotonic() < deadline
                assert alive, (folder / "server.log").read_text()[-2000:]
                time.sleep(0.2)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        log.close()


def test_a_server_answers_from_the_same_prompts_and_seeds(
    folder: Path, whole: Path, address: str
) -> None:
    """Most samples are the engine's word for word, which no other prompt, seed, temperature or
    top_p would give; vLLM's server has another sampler than an engine that returns logprobs, which
    turns a token in fifty here.

    It decodes token by token, with a space ahead that this tokenizer leaves.
    """
    assert main([*arguments(folder, "served"), "--server", address]) == 0
    expected = samples_of(whole)
    actual = samples_of(folder / "served")
    assert actual.keys() == expected.keys()
    same = [k for k, row in actual.items() if row["text"].split() == expected[k]["text"].split()]
    assert len(same) > len(actual) / 2, len(same)


def test_a_server_that_is_not_there_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments(folder, "nowhere"), "--server", "http://127.0.0.1:9"]) == 1
    assert "does not answer" in capsys.readouterr().err


def test_two_models_are_compared_on_the_same_questions(
    folder: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = forked.run("megatron_opd", None, *arguments(folder, "other", "model1"))
    assert ended.returncode == 0, ended.stderr
    assert main(["bench", "compare", str(whole), str(folder / "other")]) == 0
    assert "math_500" in capsys.readouterr().out


def test_a_result_is_graded_again(folder: Path, whole: Path) -> None:
    assert main(["bench", "regrade", str(whole), "--out", str(folder / "again")]) == 0
    assert summary_of(folder / "again") == summary_of(whole)
