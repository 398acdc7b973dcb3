"""Jobs on a real Slurm of two virtual nodes: `make test-slurm` sets it up. Every wait has an end.

All runs have the same recipe. Whatever happens to a job, the run it leaves equals that of two local
processes.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests import forked
from tools import make_demo

ROOT = Path(__file__).parents[2]
CLUSTER = Path("/var/lib/megatron-opd-slurm")
TP2 = "student.layout.tensor_model_parallel_size=2"
STEPS = 6

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def run(*argv: object, code: int = 0, seconds: float = 240, **environment: str) -> tuple[str, str]:
    """A megatron-opd command."""
    done = subprocess.run(
        [sys.executable, "-m", "megatron_opd", *map(str, argv)],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=seconds,
    )  # fmt: skip
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout, done.stderr


def train_here(nproc: int, *argv: object, run_dir: Path) -> Path:
    """A run on this machine, in ranks that share one's imports."""
    done = forked.run("megatron_opd", nproc, "train", *argv, f"run_dir={run_dir}")
    assert done.returncode == 0, done.stderr[-3000:]
    return run_dir


def slurm(*command: str) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=60
    ).stdout.strip()


def wait(what: str, condition: Callable[[], Any], seconds: float = 180) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, (
            f"waited {seconds} s for: {what}\n{slurm('squeue')}\n{slurm('sinfo', '-N')}"
        )
        time.sleep(0.2)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The demo with models that have learned nothing: guidance moves the student from the first
    step on."""
    assets = tmp_path_factory.mktemp("slurm") / "assets"
    make_demo.write_assets(assets, seed=0)
    return [
        str(ROOT / "recipes" / "demo.yaml"),
        f"num_steps={STEPS}",
        f"student.path={assets / 'student'}",
        f"teacher.path={assets / 'teacher'}",
        f"data.train={assets / 'train.jsonl'}",
        f"data.heldout={assets / 'heldout.jsonl'}",
        "rollout.num_prompts=8",
        "train.optimizer.warmup_steps=2",
        "checkpoint.every=2",
        "eval={every: 3, num_prompts: 40}",
        TP2,
    ]


@pytest.fixture(scope="module")
def expected(recipe: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two processes on this machine."""
    return train_here(2, *recipe, run_dir=tmp_path_factory.mktemp("local") / "run")


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    leave = slurm("squeue", "-h", "-o", "%A").split()
    for job in leave:
        slurm("scancel", job)
    wait("the queue to empty", lambda: not slurm("squeue", "-h"))
    start_node("node2")


def launch(recipe: list[str], run_dir: Path, *overrides: str, **environment: str) -> str:
    """Returns the job's number."""
    stdout, _ = run(
        "launch", *recipe, f"run_dir={run_dir}", *overrides, "--cluster", "cpu-test", **environment
    )
    return stdout.split()[1].rstrip(":")


def job_dir(run_dir: Path) -> Path:
    return run_dir.with_name(run_dir.name + ".job")


def state(run_dir: Path) -> str:
    path = job_dir(run_dir) / "heartbeat.json"
    return json.loads(path.read_text())["state"] if path.exists() else "not begun"


def rows(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def assert_same(run_dir: Path, expected: Path) -> None:
    """Every number but times."""
    one, other = (
        [
            {key: value for key, value in row.items() if not key.startswith("timing/")}
            for row in rows(each)
        ]
        for each in (run_dir, expected)
    )
    assert one == other
    assert (run_dir / "report.html").is_file() and (run_dir / "hf" / "model.safetensors").is_file()


def finish(run_dir: Path, seconds: float = 240) -> None:
    newest = lambda: (job_dir(run_dir) / "job_id").read_text().split()[-1]  # noqa: E731
    wait("the run to finish", lambda: not in_queue(newest()), seconds)
    assert state(run_dir) == "finished", run("logs", run_dir)[0][-3000:]


def in_queue(job: str) -> bool:
    return job in slurm("squeue", "-h", "-o", "%A").split()


def ranks(run_dir: Path) -> dict[str, list[int]]:
    """Node -> its processes, of a job that runs."""
    found: dict[str, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                argv = (entry / "cmdline").read_bytes().split(b"\0")
                environment = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"megatron_opd.cluster.rank" in argv and str(job_dir(run_dir)).encode() in argv:
                names = [each for each in environment if each.startswith(b"SLURMD_NODENAME=")]
                if b"srun" not in argv[0] and names:
                    found.setdefault(names[0].partition(b"=")[2].decode(), []).append(
                        int(entry.name)
                    )
    return found


# -------------------------------------------------------------------------------------------- nodes
def pid_of(node: str) -> int | None:
    path = CLUSTER / f"slurmd-{node}.pid"
    if not path.exists():
        return None
    pid = int(path.read_text())
    return pid if Path(f"/proc/{pid}").exists() else None


def kill_node(node: str, run_dir: Path) -> None:
    """As when its power goes: the daemon, the job's step there, and its processes, at once."""
    daemon = pid_of(node)
    assert daemon is not None
    victims = [daemon, *ranks(run_dir)[node]]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _is_step_of(entry, node):
            victims.append(int(entry.name))
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    wait(f"{node} to be gone", lambda: pid_of(node) is None)


def _is_step_of(entry: Path, node: str) -> bool:
    try:
        name, environment = (entry / "comm").read_text().strip(), (entry / "environ").read_bytes()
    except OSError:
        return False
    return name == "slurmstepd" and f"SLURMD_NODENAME={node}".encode() in environment.split(b"\0")


def start_node(node: str) -> None:
    if pid_of(node) is None:
        subprocess.run(["slurmd", "-N", node], check=True, timeout=60)
    up = (
        "idle",
        "mix",
        "comp",
        "alloc",
    )  # a lost message can leave a node "completing" for minutes, which hurts nobody
    wait(
        f"{node} to be up", lambda: slurm("sinfo", "-h", "-p", "test", "-n", node, "-o", "%t") in up
    )


def assert_outlives_node2(job: str, run_dir: Path, expected: Path) -> None:
    wait(
        "the first checkpoint",
        lambda: (run_dir / "checkpoints" / "step-000002" / "manifest.json").exists(),
    )
    kill_node("node2", run_dir)
    wait(
        "the job to leave the lost node",
        lambda: slurm("squeue", "-h", "-j", job, "-o", "%T") != "RUNNING",
        120,
    )
    start_node("node2")
    finish(run_dir)
    assert_same(run_dir, expected)
    assert len(list((job_dir(run_dir) / "attempts").iterdir())) == 2


# ---------------------------------------------------------------------------------------- the tests
def test_tensor_parallelism_across_nodes_trains_as_two_local_processes(
    recipe: list[str], expected: Path, tmp_path: Path
) -> None:
    """Its secret is with the processes, and in no file."""
    secret = ["cluster.secrets=[OPD_TOKEN]", "cluster.node_check='[ ${#OPD_TOKEN} -eq 12 ]'"]
    job = launch(recipe, tmp_path / "run", *secret, OPD_TOKEN="xyzzy-plugh!")
    finish(tmp_path / "run")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20 and not [path for path in files if b"xyzzy-plugh!" in path.read_bytes()]
    assert_same(tmp_path / "run", expected)
    stdout, _ = run("status", tmp_path / "run")
    assert stdout.startswith(f"job {job}: COMPLETED\nlast heartbeat: finished at step {STEPS}, ")
    stdout, _ = run("logs", tmp_path / "run")
    assert f"step {STEPS - 1}/{STEPS}" in stdout
    nodes = {
        json.loads(path.read_text())["node"]
        for path in (job_dir(tmp_path / "run") / "attempts").glob("*/n*.json")
    }
    assert nodes == {"node1", "node2"}
    _, stderr = run(
        "launch", *recipe, f"run_dir={tmp_path / 'run'}", "--cluster", "cpu-test", code=2
    )
    assert f"{tmp_path / 'run'} is finished, {STEPS} steps; give num_steps=... to go on" in stderr


def test_a_lost_node_costs_no_step(recipe: list[str], expected: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = launch(recipe, run_dir)
    assert_outlives_node2(job, run_dir, expected)


def test_a_killed_process_costs_no_step(recipe: list[str], expected: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    launch(recipe, run_dir)
    wait(
        "the first checkpoint",
        lambda: (run_dir / "checkpoints" / "step-000002" / "manifest.json").exists(),
    )
    os.kill(ranks(run_dir)["node2"][0], signal.SIGKILL)
    finish(run_dir)
    assert_same(run_dir, expected)
    (survivor,) = (job_dir(run_dir) / "logs").glob("*_0_0.out")
    said = survivor.read_text()
    assert "node1: another process of the job is gone, and its own log may say why (" in said
    assert "Traceback" not in said
    assert len(list((job_dir(run_dir) / "attempts").iterdir())) == 2


@pytest.mark.parametrize(
    ("role", "layout"),
    [("rollout", "{}"), ("teacher", "{tensor_model_parallel_size: 2}")],
    ids=["rollout", "teacher"],
)
def test_a_node_with_a_role_of_its_own_is_lost_and_costs_no_step(
    recipe: list[str], tmp_path: Path, role: str, layout: str
) -> None:
    """Two a node: the student's two replicas on one, two engines or the teacher's two ranks on the
    other."""
    run_dir, apart = (
        tmp_path / "run",
        ["student.layout={}", f"teacher.layout={layout}", f"{role}.processes=2"],
    )
    local = train_here(4, *recipe, *apart, run_dir=tmp_path / "local")
    job = launch(recipe, run_dir, *apart, "cluster.processes_per_node=2")
    assert_outlives_node2(job, run_dir, local)


def test_a_job_makes_room_for_another_and_costs_no_step(
    recipe: list[str], expected: Path, tmp_path: Path
) -> None:
    """Slurm asks it to end, and would start it again had it not ended by itself."""
    run_dir = tmp_path / "run"
    job = launch(recipe, run_dir, "cluster.exclusive=true")
    wait("a step", lambda: len(rows(run_dir)) > 0)
    slurm(
        "srun", "--partition=urgent", "--account=megatron-opd", "--nodes=2", "--exclusive", "true"
    )
    finish(run_dir)
    assert_same(run_dir, expected)
    assert {each.name for each in (job_dir(run_dir) / "attempts").iterdir()} == {
        f"{job}-0",
        f"{job}-1",
    }


def test_a_run_outlives_its_time_limit(recipe: list[str], tmp_path: Path) -> None:
    """Slurm's own signal, ahead of its own limit. More steps than a job has time for; only scancel
    ends it."""
    run_dir = tmp_path / "run"
    steps = 2000
    job = launch(
        recipe,
        run_dir,
        f"num_steps={steps}",
        "eval=null",
        "log={rollouts_per_step: 0, tensorboard: false}",
        "checkpoint.every=0",
        "cluster.time=00:02:00",
        "cluster.save_before_seconds=75",
    )
    wait("a second job", lambda: len(list((job_dir(run_dir) / "attempts").iterdir())) == 2, 180)
    wait("its first step", lambda: len(rows(run_dir)) > json_step(run_dir), 120)
    log = "".join(path.read_text() for path in (job_dir(run_dir) / "logs").glob("*_0_0.out"))
    assert "before the time limit" in log
    steps_done = [row["step"] for row in rows(run_dir)]
    assert steps_done == list(range(len(steps_done)))  # none twice, none left out
    slurm("scancel", job)
    wait("the job to leave the queue", lambda: not in_queue(job))
    assert "CANCELLED" in run("status", run_dir)[0]


def json_step(run_dir: Path) -> int:
    """Of the checkpoint the first job left."""
    (name,) = [
        path.name for path in (run_dir / "checkpoints").iterdir() if path.name.startswith("step-")
    ][:1]
    return int(name.removeprefix("step-"))


def test_cancel_leaves_no_process(recipe: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = launch(recipe, run_dir, "num_steps=1000")
    wait("a step", lambda: len(rows(run_dir)) > 1)
    assert set(ranks(run_dir)) == {"node1", "node2"}
    stdout, _ = run("cancel", run_dir)
    assert stdout == f"cancelled job {job}\n"
    assert not ranks(run_dir) and not in_queue(job)
    assert "CANCELLED" in run("status", run_dir)[0]
    assert run("cancel", run_dir)[0] == "no job of this run is in the queue\n"


def test_an_unfit_node_is_named_and_left_out(recipe: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    alone = ["student.layout={}", "teacher.layout={}", "cluster.nodes=1"]
    check = "cluster.node_check='echo one of its GPUs is lost >&2; [ $SLURMD_NODENAME = node2 ]'"
    first = launch(recipe, run_dir, *alone, check)
    wait("another job", lambda: len((job_dir(run_dir) / "job_id").read_text().split()) == 2)
    finish(run_dir)
    assert (job_dir(run_dir) / "excluded").read_text().split() == ["node1"]
    log = (job_dir(run_dir) / "logs" / f"{first}_0_0.out").read_text()
    assert "node1 is unfit: cluster.node_check failed: one of its GPUs is lost" in log
    assert "excluded nodes: node1" in run("status", run_dir)[0]


def test_two_jobs_on_the_same_nodes_do_not_meet(
    recipe: list[str], expected: Path, tmp_path: Path
) -> None:
    both = [tmp_path / "one", tmp_path / "two"]
    with ThreadPoolExecutor() as pool:
        list(pool.map(partial(launch, recipe), both))
    for run_dir in both:
        finish(run_dir)
        assert_same(run_dir, expected)
    begun = [(run_dir / "env.json").stat().st_mtime for run_dir in both]
    ended = [(run_dir / "report.html").stat().st_mtime for run_dir in both]
    assert max(begun) < min(ended)  # they ran at the same time


def test_a_job_is_launched_from_outside_over_ssh(recipe: list[str], tmp_path: Path) -> None:
    """The cluster's checkout is a folder of links to this one; what is launched from has no Slurm
    in its PATH."""
    there, here = tmp_path / "cluster", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    (there / ".venv").symlink_to(ROOT / ".venv")
    tools = [shutil.which(name) for name in ("bash", "sh", "ssh", "rsync", "mkdir")]
    for tool in filter(None, tools):
        (here / Path(tool).name).symlink_to(tool)
    key, port = CLUSTER / "ssh" / "key", 16822
    profile = tmp_path / "outside.yaml"
    login = f"host: 127.0.0.1, port: {port}, user: root, identity: {key}"
    tunnel = f"tunnel: {{{login}, directory: {there}}}\n"
    profile.write_text((ROOT / "slurm" / "cpu-test.yaml").read_text() + tunnel)
    command = ["launch", *recipe, "run_dir=runs/far", "num_steps=2", "--cluster", profile]

    _, stderr = run(*command, "cluster.partition=tset", code=2, PATH=str(here))
    assert "127.0.0.1: cluster.partition: tset is none of this cluster's: test" in stderr
    _, stderr = run(*command, "cluster.tunnel.port=1", code=2, PATH=str(here))
    assert stderr.splitlines()[-1].startswith(
        "megatron-opd: error: 127.0.0.1: ssh: connect to host 127.0.0.1 port 1"
    )
    assert not (there / "runs").exists()
    script, _ = run(*command, "--dry-run", PATH=str(here))
    assert f"{there}/runs/far.job" in script
    stdout, _ = run(*command, PATH=str(here))
    first, status, *_ = stdout.splitlines()
    assert first.endswith("processes, into runs/far")
    shown = subprocess.run(["bash", "-c", status], capture_output=True, text=True, timeout=120)
    assert shown.stdout.startswith(first.split(":")[0]), shown
    finish(there / "runs" / "far")
    assert rows(there / "runs" / "far")[-1]["step"] == 2


def test_nemo_runs_script_has_what_ours_has(recipe: list[str], tmp_path: Path) -> None:
    """In a container, with a variable whose name has small letters, and a longer wait than
    nemo-run's own."""
    container = "cluster.container={image: registry#image, mounts: ['/data:/data']}"
    where = [
        f"run_dir={tmp_path / 'run'}",
        container,
        "cluster.environment.small_letters=two words",
    ]
    shown, _ = run("launch", *recipe, *where, "--cluster", "cpu-test", "--dry-run")
    (srun,) = [line for line in shown.splitlines() if line.startswith("srun ")]
    assert [each for each in srun.split() if each.startswith("--wait=")][-1] == "--wait=1800"
    names = "OMP_NUM_THREADS,SRUN_CPUS_PER_TASK,PYTHONUNBUFFERED,small_letters"
    assert (
        f"--container-image registry#image --container-mounts /data:/data,{tmp_path}/run.job/"
        in srun
    )
    assert f"--container-env {names} " in srun and "\nexport small_letters='two words'\n" in shown
    assert srun.endswith(f"python -m megatron_opd.cluster.rank {tmp_path}/run.job")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_submitted_is_one_line(recipe: list[str], tmp_path: Path) -> None:
    def refused(*overrides: str, cluster: object = "cpu-test", **environment: str) -> str:
        run_dir = f"run_dir={tmp_path / 'run'}"
        _, stderr = run(
            "launch", *recipe, run_dir, *overrides, "--cluster", cluster, code=2, **environment
        )
        line = stderr.strip().splitlines()[-1]
        assert line.startswith("megatron-opd: error: ") and stderr.count("error:") == 1, stderr
        return line.removeprefix("megatron-opd: error: ")

    assert refused("cluster.partition=tset").startswith(
        "cluster.partition: tset is none of this cluster's: test"
    )
    assert refused("cluster.account=nobody").startswith(
        "cluster.account: nobody is none of yours: megatron-opd"
    )
    too_long = "cluster.time: 02:00:00 is more than the 1:00:00 of partition test"
    assert refused("cluster.time=02:00:00") == too_long
    too_many = "cluster.nodes: 4 are more than the 2 of partition test"
    assert refused("cluster.partition=''", "cluster.nodes=4") == too_many
    assert refused(f"student.path={tmp_path / 'absent'}").startswith(
        f"{tmp_path / 'absent'}: no such model directory"
    )
    profile = tmp_path / "container.yaml"
    text = (ROOT / "slurm" / "cpu-test.yaml").read_text()
    profile.write_text(text + f"container: {{image: {tmp_path / 'image.sqsh'}}}\n")
    assert (
        refused(cluster=profile)
        == f"cluster.container.image: {tmp_path / 'image.sqsh'} does not exist"
    )
    bare = tmp_path / "bin"
    bare.mkdir()
    (bare / "bash").symlink_to(shutil.which("bash") or "")
    assert refused(PATH=str(bare)) == (
        "sinfo: not found; this is no machine of a Slurm cluster, go to its login node"
    )  # fmt: skip
    assert not (tmp_path / "run").exists() and not slurm("squeue", "-h")
