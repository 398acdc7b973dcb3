"""What of a job needs no Slurm: profiles, the batch script, names of nodes, their reports."""

import errno
import json
import math
import os
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_opd.cli import main as cli
from megatron_opd.cluster import job as jobs
from megatron_opd.cluster import rank, script
from megatron_opd.cluster.job import Job
from megatron_opd.cluster.nodes import Report, interface, report, unfit
from megatron_opd.cluster.place import Place, expand
from megatron_opd.cluster.profile import (
    PROFILES,
    ClusterConfig,
    ContainerConfig,
    check_present,
    load_profile,
    seconds,
)
from megatron_opd.cluster.submit import unmounted
from megatron_opd.cluster.watch import in_words
from megatron_opd.errors import ConfigError
from megatron_opd.recipe.load import dump_config, load_config
from megatron_opd.start import load_run
from megatron_opd.tasks.pin import pin
from tests.unit.tiny_model_files import write_recipe

CPU = ClusterConfig(gpu="cpu", processes_per_node=2)


# ----------------------------------------------------------------------------------------- profiles
def test_every_packaged_profile_loads() -> None:
    names = [path.stem for path in PROFILES.glob("*.yaml")]
    assert {"a100", "h800", "cpu-test"} <= set(names)
    for name in names:
        assert load_profile(name) == load_profile(str(PROFILES / f"{name}.yaml"))
    assert load_profile("a100", ["nodes=4", "account=me", "environment.NCCL_DEBUG=INFO"]).nodes == 4


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "gpu: a100\nprocesses_per_node: 8\nparttion: x",
            "parttion: unknown key; did you mean partition?",
        ),
        ("gpu: v100\nprocesses_per_node: 8", "gpu: "),
        ("gpu: a100", "processes_per_node: missing"),
        (
            "gpu: a100\nprocesses_per_node: 4\ngpus_per_node: 8",
            "processes_per_node: 4 is not gpus_per_node=8",
        ),
        (
            "gpu: cpu\nprocesses_per_node: 4\ngpus_per_node: 8",
            "gpus_per_node: no effect with gpu=cpu",
        ),
        (
            "gpu: cpu\nprocesses_per_node: 1\ntunnel: {host: h, user: u, directory: opd}",
            "tunnel.directory: opd is no absol",
        ),
        (
            "gpu: cpu\nprocesses_per_node: 1\ntunnel: {host: h, user: u, directory: /opd, "
            "identity: /absent}",
            "tunnel.identity: /absent does not exist",
        ),
        ("gpu: cpu\nprocesses_per_node: 1\ntime: 4h", "time: 4h is no time as Slurm writes it"),
        (
            "gpu: cpu\nprocesses_per_node: 1\ntime: '5'",
            "save_before_seconds: 300 are not less than time=5",
        ),
        ("gpu: [", "cannot be read as YAML"),
        ("", "must be a mapping"),
    ],
)
def test_a_wrong_profile_is_one_line(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_profile(str(path))
    assert str(error.value).startswith(f"{path}: ") and problem in str(error.value)
    assert "\n" not in str(error.value)


def test_times_are_read_as_slurm_writes_them() -> None:
    texts = ["30", "30:15", "4:00:00", "1-12", "1-12:30", "01-12:30:15", "0", "UNLIMITED"]
    assert [seconds(text) for text in texts] == [
        1800,
        1815,
        14400,
        129600,
        131400,
        131415,
        math.inf,
        math.inf,
    ]


def test_what_a_job_brings_along_must_be_there() -> None:
    absent = {
        "cluster.secrets: NOT_SET_ANYWHERE is not set in your environment; export it first": [
            "NOT_SET_ANYWHERE"
        ],
        "cluster.container.image: /absent.sqsh does not exist": ContainerConfig("/absent.sqsh"),
        "cluster.container.mounts: /absent does not exist": ContainerConfig(
            "registry#image:1", ["/:/", "/absent:/b"]
        ),
    }
    for problem, each in absent.items():
        profile = (
            replace(CPU, secrets=each) if isinstance(each, list) else replace(CPU, container=each)
        )
        with pytest.raises(ConfigError) as error:
            check_present(profile)
        assert str(error.value) == problem


def test_what_no_mount_shows_is_a_warning(tmp_path: Path) -> None:
    config = load_config(str(write_recipe(tmp_path)))

    def job_of(*mounts: str) -> Job:
        container = ContainerConfig("x", list(mounts))
        return jobs.make(config, replace(CPU, container=container), "python")

    assert (
        unmounted(config, job_of(f"{tmp_path}:{tmp_path}:rw", f"{Path.cwd()}:{Path.cwd()}")) == []
    )
    assert unmounted(config, jobs.make(config, CPU, "python")) == []
    (line,) = unmounted(config, job_of(f"{tmp_path}:{tmp_path}"))
    assert line.startswith(f"cluster.container.mounts: {Path.cwd()} is below none of them")
    assert (
        len(unmounted(config, job_of(f"{tmp_path}:/elsewhere", f"{Path.cwd()}:{Path.cwd()}"))) >= 3
    )


def test_a_wrong_override_of_a_profile_names_itself() -> None:
    with pytest.raises(ConfigError, match=r"override cluster\.'nodes=0': nodes: "):
        load_profile("a100", ["nodes=0"])
    with pytest.raises(ConfigError, match="--cluster: a10: no such file; unknown profile"):
        load_profile("a10")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["cluster.nodes=2"], "rollout.num_prompts: the 8 sequences of an update do not divide"),
        (
            ["student.layout.tensor_model_parallel_size=2", "cluster.processes_per_node=1"],
            "student.layout: TP 2 x PP 1",
        ),
    ],
)
def test_a_recipe_that_the_allocation_cannot_hold_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str
) -> None:
    profile = tmp_path / "cluster.yaml"
    profile.write_text("gpu: cpu\nprocesses_per_node: 3\n")
    command = [
        "launch",
        str(write_recipe(tmp_path)),
        *arguments,
        "--cluster",
        str(profile),
        "--prepare",
    ]
    assert cli.main(command) == 2
    assert capsys.readouterr().err.startswith(f"megatron-opd: error: {problem}")
    assert not list(tmp_path.glob("**/*.job"))


def test_a_run_whose_data_have_changed_is_not_submitted_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = tmp_path / "cluster.yaml"
    profile.write_text("gpu: cpu\nprocesses_per_node: 2\n")
    recipe = write_recipe(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump_config(pin(load_config(str(recipe)))))
    (tmp_path / "train.jsonl").write_text('{"problem": "1+1=", "answer": "2"}\n')
    assert cli.main(["launch", str(recipe), "--cluster", str(profile), "--prepare"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'train.jsonl'}: has changed since data.sha256 of config.yaml" in line
    assert not (tmp_path / "run.job").exists()


def test_a_moved_run_is_submitted_where_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = tmp_path / "cluster.yaml"
    profile.write_text("gpu: cpu\nprocesses_per_node: 2\n")
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "config.yaml").write_text(dump_config(pin(load_config(str(write_recipe(tmp_path))))))
    command = ["launch", str(moved), "seed=1", "--cluster", str(profile), "--prepare"]
    assert cli.main(command) == 2  # its place is known before Slurm is asked
    (line,) = capsys.readouterr().err.splitlines()
    assert f"seed: differs from {moved / 'config.yaml'}" in line
    assert load_run(str(moved), []).directory == str(moved)
    elsewhere = str(tmp_path / "elsewhere")
    assert load_run(str(moved), [f"run_dir={elsewhere}"]).directory == elsewhere


# --------------------------------------------------------------------------------- the batch script
def job(tmp_path: Path, cluster: ClusterConfig = CPU) -> Job:
    return Job("tiny", str(tmp_path / "run"), str(tmp_path), "/shared/python", cluster)


def test_a_job_is_read_as_it_was_written(tmp_path: Path) -> None:
    for cluster in (
        CPU,
        replace(CPU, container=ContainerConfig("image", ["/a:/b"]), secrets=["X"]),
    ):
        written = job(tmp_path, cluster)
        written.directory.mkdir(exist_ok=True)
        written.write()
        assert jobs.read(written.directory) == written
    with pytest.raises(ConfigError, match="no job was launched there"):
        jobs.read(tmp_path / "other.job")


def test_a_jobs_number_is_noted_once_and_after_the_next_ones(tmp_path: Path) -> None:
    jobs.note_id(tmp_path, "7")
    assert jobs.job_ids(tmp_path) == ["7"]
    (tmp_path / "job_id").write_text(
        "8\n9\n"
    )  # the batch script was there first, and has submitted again
    jobs.note_id(tmp_path, "8")
    assert jobs.job_ids(tmp_path) == ["8", "9"]


def test_a_path_with_a_space_is_refused(tmp_path: Path) -> None:
    config = replace(
        load_config(str(write_recipe(tmp_path))), run_dir=str(tmp_path / "my runs" / "a")
    )
    with pytest.raises(ConfigError, match=r"run_dir: .* has a space"):
        jobs.make(config, CPU, "/shared/python")


def test_flags_are_those_that_the_profile_has() -> None:
    cluster = replace(CPU, account="me", memory="0", exclusive=True, nodes=2, cpus_per_process=3)
    assert script.flags(job(Path("/shared"), cluster)) == {
        "account": "me",
        "nodes": 2,
        "ntasks-per-node": 2,
        "cpus-per-task": 3,
        "mem": "0",
        "exclusive": True,
        "time": "04:00:00",
        "signal": "USR1@300",
        "open-mode": "append",
    }


def test_the_batch_script_is_shell_and_runs_in_a_container(tmp_path: Path) -> None:
    cluster = replace(
        CPU,
        container=ContainerConfig("/images/opd.sqsh", ["/data:/data", "/runs:/runs"]),
        setup=["module load cuda"],
        environment={"NOTE": "two words"},
    )
    text = script.sbatch(job(tmp_path, cluster))
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=True).returncode == 0
    assert (
        "--container-image=/images/opd.sqsh --container-mounts=/data:/data,/runs:/runs "
        "--container-env=OMP_" in text
    )
    assert (
        "srun --kill-on-bad-exit=1 --wait=1800 " in text
    )  # rank 0 may be the last to be done by minutes
    assert "export NOTE='two words'\n" in text and "\nmodule load cuda\n" in text


# What the processes left -> what the batch script does about it; each time it ends with `code`.
ENDINGS = {
    "finished": ("finished", 0, []),
    "out of time": ("requeue", 0, ["scontrol requeue 7"]),
    "stopped": ("stopped", 0, []),
    "unfit": ("exclude", 3, ["sbatch --parsable --requeue --exclude=gpu1,gpu3"]),
    "killed": (None, 137, ["scontrol requeue 7"]),
    "finished, then failed": ("finished", 1, []),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_what_happens_when_a_job_ends(tmp_path: Path, name: str) -> None:
    verdict, code, wanted = ENDINGS[name]
    ended(tmp_path, verdict, code)
    said = calls(tmp_path)
    assert [line[: len(each)] for line, each in zip(said, wanted, strict=True)] == wanted


def test_a_run_that_keeps_dying_stays_down_unless_it_gets_further(tmp_path: Path) -> None:
    for _ in range(5):
        ended(tmp_path, None, 137)
    assert len(calls(tmp_path)) == CPU.max_failures
    (tmp_path / "run" / "checkpoints" / "step-000002").mkdir(parents=True)
    ended(tmp_path, None, 137)
    assert len(calls(tmp_path)) == CPU.max_failures + 1


def test_nothing_starts_a_cancelled_run_again(tmp_path: Path) -> None:
    job(tmp_path).directory.mkdir()
    (job(tmp_path).directory / "cancelled").touch()
    ended(tmp_path, "requeue", 0)
    assert calls(tmp_path) == []


def test_a_job_that_slurm_ends_starts_again_only_after_its_time_limit(tmp_path: Path) -> None:
    """What scontrol of 22.05 shows then; the verdict may be late, or that of a process that was
    asked to end."""
    for verdict in (None, "stopped"):
        ended(tmp_path, verdict, 0, "JobId=7 JobState=COMPLETING Reason=None Dependency=(null)")
        assert calls(tmp_path) == []
    ended(tmp_path, "stopped", 0, "JobId=7 JobState=COMPLETING Reason=TimeLimit Dependency=(null)")
    assert calls(tmp_path) == ["scontrol requeue 7"]


def test_a_job_that_made_room_for_another_starts_again(tmp_path: Path) -> None:
    for made_room, wanted in (("None", []), ("2026-11-22T02:52:55", ["scontrol requeue 7"])):
        ended(
            tmp_path,
            "stopped",
            0,
            f"JobId=7 JobState=RUNNING Reason=None PreemptTime={made_room} Dependency=(null)",
        )
        assert calls(tmp_path) == wanted


def ended(
    tmp_path: Path,
    verdict: str | None,
    code: int,
    shown: str = "JobId=7 JobState=RUNNING Reason=None",
) -> None:
    """Runs the script's own lines, with commands in the place of Slurm's that note what they are
    asked to do."""
    directory, commands = job(tmp_path).directory, tmp_path / "bin"
    directory.mkdir(exist_ok=True)
    commands.mkdir(exist_ok=True)
    for command in ("scontrol", "sbatch"):
        answer = f'[ "$1" = show ] && echo "{shown}" && exit'
        (commands / command).write_text(
            f'#!/bin/sh\n{answer}\necho "{command} $*" >>{tmp_path}/calls\n'
        )
        (commands / command).chmod(0o755)
    (directory / "excluded").write_text("gpu1\ngpu3\n")
    leaves = f"echo {verdict} >{directory}/verdict\n" if verdict else ""
    text = f"{script.when_it_ends(job(tmp_path))}\n{leaves}exit {code}\n"
    environment = os.environ | {"PATH": f"{commands}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", "-c", text], env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert (directory / "job_id").read_text().split()[0] == "7"


def calls(tmp_path: Path) -> list[str]:
    path = tmp_path / "calls"
    return path.read_text().splitlines() if path.exists() else []


# -------------------------------------------------------------------------------------------- nodes
@pytest.mark.parametrize(
    ("nodelist", "names"),
    [
        ("gpu1", ["gpu1"]),
        ("gpu1,login", ["gpu1", "login"]),
        ("gpu[01-03,7]", ["gpu01", "gpu02", "gpu03", "gpu7"]),
        ("a[1-2]-ib,b,c[09-10]", ["a1-ib", "a2-ib", "b", "c09", "c10"]),
    ],
)
def test_slurms_short_names_are_written_out(nodelist: str, names: list[str]) -> None:
    assert expand(nodelist) == names


def test_unfit_nodes_are_found(tmp_path: Path) -> None:
    reports = {
        "fit": Report("fit", "", "1", "2"),
        "ill": Report("ill", "7 of 8 GPUs are visible", "1", "2"),
        "old": Report("old", "", "1", "1"),
    }
    for node, each in reports.items():
        (tmp_path / f"{node}.json").write_text(json.dumps(vars(each)))
    assert unfit(tmp_path, ["fit", "ill", "old", "away"], seconds=0.3) == {
        "away": "did not report within 0 s",
        "ill": "7 of 8 GPUs are visible",
        "old": "has torch 1, fit has 2",
    }
    assert unfit(tmp_path, ["fit"], seconds=5) == {}


def test_the_interface_towards_another_node_is_found() -> None:
    assert interface("127.0.0.1") == interface("localhost") == "lo"
    assert interface("192.0.2.1") in {"", *(name for _, name in socket.if_nameindex())} - {"lo"}
    assert interface("no-such-node.invalid") == ""


def test_a_node_that_lacks_a_gpu_or_fails_the_sites_check_says_so(tmp_path: Path) -> None:
    there = torch.cuda.device_count()
    found = {
        "fit": CPU,
        "lacks": replace(CPU, gpus_per_node=there + 1),
        "ill": replace(CPU, node_check="echo too hot >&2; exit 1"),
        "silent": replace(CPU, node_check="exit 1"),
    }
    problems = {
        node: report(job(tmp_path, cluster), tmp_path, node).problem
        for node, cluster in found.items()
    }
    assert problems == {
        "fit": "",
        "lacks": f"the check of its GPUs failed: {there} of {there + 1} GPUs are visible",
        "ill": "cluster.node_check failed: too hot",
        "silent": "cluster.node_check failed",
    }
    assert unfit(tmp_path, list(found), seconds=5) == {
        node: text for node, text in problems.items() if text
    }


# ------------------------------------------------------------------------------------ the heartbeat
def test_a_heartbeat_says_how_long_a_step_has_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank, "HEARTBEAT_SECONDS", 0.01)
    each, place = job(tmp_path), Place(0, 1, 0, "n1", ["n1"], "7", "7-0")
    metrics = tmp_path / "run" / "metrics.jsonl"
    for directory in (each.directory, metrics.parent):
        directory.mkdir()

    def beat(*wanted: object) -> dict[str, Any]:
        until = time.monotonic() + 20
        while True:
            found = json.loads((each.directory / "heartbeat.json").read_text())
            if [found["state"], found["step"]] == list(wanted):
                return found
            assert time.monotonic() < until, found
            time.sleep(0.01)

    with rank.heartbeat(each, place) as state:
        first = beat("running", None)
        metrics.write_text('{"step": 4}\n{"step": 5}\n{"st')
        fifth = beat("running", 5)
        state["state"] = "finished"
    last = beat("finished", 5)
    assert first["since"] < fifth["since"] == last["since"] < last["time"]
    assert in_words(first | {"time": first["since"] + 9}, first["since"] + 12) == (
        "last heartbeat: running before its first step for 9 s, 3 s ago on n1 (attempt 7-0)"
    )
    assert (
        in_words(last, last["time"])
        == "last heartbeat: finished at step 5, 0 s ago on n1 (attempt 7-0)"
    )


def test_a_heartbeat_that_the_disk_refuses_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rank, "write_atomically", refuse)
    with rank.heartbeat(job(tmp_path), Place(0, 1, 0, "n1", ["n1"], "7", "7-0")):
        pass
