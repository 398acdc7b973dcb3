"""The language model of these tests, made once by tools/make_real_model.py and kept in its
cache."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked import REPOSITORY


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """SmolLM2-135M-Instruct in bfloat16. The first time it takes a minute, and the network."""
    tool = REPOSITORY / "tools" / "make_real_model.py"
    done = subprocess.run(
        [sys.executable, str(tool)], capture_output=True, text=True, cwd=REPOSITORY, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())
