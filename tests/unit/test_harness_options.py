"""Options of `bench --lm-eval` that would have no effect, and the package that is not there."""

import sys
from pathlib import Path

import pytest

from megatron_opd.cli.main import main
from tests.e2e import tiny_hf


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--lm-eval", "gsm8k", "--suites", "aime24"], "--suites: no effect with --lm-eval"),
        (["--lm-eval", "gsm8k", "--samples", "4"], "--samples: no effect with --lm-eval"),
        (["--lm-eval", "gsm8k", "--server", "http://x"], "--server: no effect with --lm-eval"),
        (["--suites", "aime24", "--num-fewshot", "0"], "no effect without --lm-eval"),
        (["--suites", "aime24", "--apply-chat-template"], "no effect without --lm-eval"),
        (["--lm-eval", "gsm8k"], "install megatron-opd[lm-eval]"),
    ],
)
def test_one_line_says_what_has_no_effect_or_is_missing(
    more: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as where it is not installed
    tiny_hf.write(tiny_hf.build("qwen3", seed=0), tmp_path / "model")
    asked = ["bench", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), *more]
    capsys.readouterr()
    assert main(asked) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
