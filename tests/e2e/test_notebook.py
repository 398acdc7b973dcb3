"""The notebook's cells run one after the other, with fewer steps, in a folder of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "distillation.ipynb"
STEPS = '{"teacher": 350, "start": 250, "distillation": 100}'
FEWER = '{"teacher": 3, "start": 3, "distillation": 2}'


def test_every_cell_runs(tmp_path: Path) -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    program = "\n\n".join(sources)
    assert program.count(STEPS) == 1
    (tmp_path / "notebook.py").write_text(program.replace(STEPS, FEWER))
    done = subprocess.run(
        [sys.executable, "notebook.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "override 'rollout.num_promts=8': unknown key; did you mean num_prompts?"
    assert "runs/converted" in lines
    assert any(line.startswith("True 74.7 GiB") for line in lines)


def test_it_was_saved_after_a_run_of_all_cells() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    counts = [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert all(output["output_type"] != "error" for output in outputs)
