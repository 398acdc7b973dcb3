"""Benchmarks on a device that does not hold all that they measure."""

import pytest
import torch

from benchmarks.vocab_parallel import _timed_in_turn, show


def test_what_does_not_fit_is_left_out_and_the_rest_is_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = []

    def too_large() -> tuple[float, float, int]:
        calls.append("too large")
        raise torch.OutOfMemoryError("CUDA out of memory")

    runs = {
        "dense torch": too_large,
        "ours": lambda: (0.5, 200.0, 3),
        "megatron": lambda: (1.0, 400.0, 3),
    }
    rows = _timed_in_turn(runs, 100, repeat=2)
    assert calls == ["too large"]  # once
    assert [*rows] == ["ours", "megatron"] and rows["ours"]["bytes_per_logit"] == 2.0
    case = {"tp": 1, "tokens": 10, "vocab": 10, "k": 1, "dtype": "float32"}
    show(
        [{**case, "rows": {name: row | {"share_of_bandwidth": 0.5} for name, row in rows.items()}}]
    )
    shown = capsys.readouterr().out
    assert "left out, its 100 logits do not fit: dense torch" in shown and "megatron" in shown
