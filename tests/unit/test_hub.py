"""Models named by their id on the Hugging Face Hub: from the cache, from a hub, or one line with
the command."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from megatron_opd.checks.hub import HubModel, parse_id
from tests.unit.tiny_model_files import write_model, write_recipe

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("Qwen/Qwen2.5-Math-7B", HubModel("Qwen/Qwen2.5-Math-7B", None)),
        ("Qwen/Qwen3-8B@main", HubModel("Qwen/Qwen3-8B", "main")),
        (f"a/b@{COMMIT}", HubModel("a/b", COMMIT)),
        ("a/b@refs/pr/1", HubModel("a/b", "refs/pr/1")),
        *(
            (path, None)
            for path in (
                "models/Qwen3-8B",
                "runs/demo",
                "Qwen3-8B",
                "a/b/c",
                "./a",
                "../a",
                "/a/b",
                "~/a",
            )
        ),
        *((path, None) for path in ("", "a/", "a b/c", "a/b@", "here/model", "here/absent")),
    ],
)
def test_what_can_be_an_id(
    path: str, model: HubModel | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse_id(path) == model


def check(
    recipe: Path, model: str, cache: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    usual = {
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "",
    }
    command = [sys.executable, "-m", "megatron_opd", "check", str(recipe), f"student.path={model}"]
    root = str(Path(__file__).parents[2])
    environment = (
        os.environ | {"PYTHONPATH": root, "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | usual | environment
    )
    return subprocess.run(
        command, capture_output=True, text=True, cwd=recipe.parent, env=environment
    )


def test_a_model_of_the_cache_needs_no_network(tmp_path: Path) -> None:
    recipe, repository = write_recipe(tmp_path), tmp_path / "cache" / "models--tiny--model"
    write_model(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for name in ("tiny/model", f"tiny/model@{COMMIT}"):
        result = check(recipe, name, tmp_path / "cache", HF_HUB_OFFLINE="1")
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.startswith("OK: tiny")


@pytest.mark.parametrize(
    "environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}]
)
def test_a_model_that_cannot_be_had_is_one_line_with_the_command(
    environment: dict[str, str], tmp_path: Path
) -> None:
    result = check(write_recipe(tmp_path), "tiny/model@v1", tmp_path / "cache", **environment)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(
        "megatron-opd: error: tiny/model@v1: no such directory, and it cannot be had from the"
    )
    assert line.endswith("or run where there is a network: hf download tiny/model --revision v1")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """The part of the Hub's interface that a download uses, for one model of real files."""
    files = {path.name: path for path in write_model(tmp_path / "hub").iterdir()}
    (tmp_path / "hub" / "pytorch_model.bin").write_bytes(b"pickled")

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(send=False)

        def do_GET(self) -> None:
            self._answer(send=True)

        def _answer(self, *, send: bool) -> None:
            path = self.path.split("?")[0]
            if match := re.fullmatch(rf"/tiny/model/resolve/{COMMIT}/(.+)", path):
                content = files[match[1]].read_bytes()
                self._respond(
                    content if send else b"",
                    {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'},
                    content,
                )
            elif path.startswith("/api/models/tiny/model/revision/"):
                self._respond(
                    json.dumps({"id": "tiny/model", "sha": COMMIT, "siblings": []}).encode()
                )
            elif path.startswith(f"/api/models/tiny/model/tree/{COMMIT}"):
                self._respond(
                    json.dumps([entry(path) for path in (tmp_path / "hub").iterdir()]).encode()
                )
            else:
                self.send_error(404)

        def _respond(
            self, body: bytes, headers: dict[str, str] | None = None, whole: bytes | None = None
        ) -> None:
            self.send_response(200)
            for name, value in {"X-Repo-Commit": COMMIT, **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body if whole is None else whole)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def entry(path: Path) -> dict[str, Any]:
    oid = hashlib.sha1(path.read_bytes()).hexdigest()
    return {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": oid}


def test_a_model_is_downloaded_once_without_its_pickles(tmp_path: Path, hub: str) -> None:
    (tmp_path / "work").mkdir()
    recipe, cache = write_recipe(tmp_path / "work"), tmp_path / "cache"
    result = check(recipe, "tiny/model", cache, HF_ENDPOINT=hub)
    assert (result.returncode, result.stdout[:8]) == (0, "OK: tiny"), result.stderr
    snapshot = cache / "models--tiny--model" / "snapshots" / COMMIT
    assert {path.name for path in snapshot.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    (snapshot / "model.safetensors").unlink()  # as after a download of the tokenizer alone
    assert check(recipe, "tiny/model", cache, HF_ENDPOINT=hub).returncode == 0
    assert check(recipe, "tiny/model", cache, HF_ENDPOINT="http://127.0.0.1:9").returncode == 0


def test_directories_that_recipes_name_say_how_they_come_to_be(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    for path, remedy in (
        ("runs/demo_student_start/hf", "make it with: make demo"),
        ("runs/demo_real_teacher/hf", "make it with: make demo-real"),
        (
            "models/Qwen3-8B",
            "or download it there: hf download ORGANISATION/Qwen3-8B --local-dir models/Qwen3-8B",
        ),
    ):
        result = check(recipe, path, tmp_path / "cache", HF_ENDPOINT="http://127.0.0.1:9")
        assert result.returncode == 2
        assert result.stderr.startswith(f"megatron-opd: error: {path}: no such model directory; ")
        assert result.stderr.endswith(f"{remedy}\n")
