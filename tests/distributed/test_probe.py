"""Nodes that reach each other, or do not: real all-reduces of processes that are told their place
as Slurm does it."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_opd.cluster import probe
from megatron_opd.cluster.job import Job, directory_of
from megatron_opd.cluster.profile import ClusterConfig
from tests.unit.tiny_model_files import write_recipe

NODES = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
ABSENT = {"GLOO_SOCKET_IFNAME": "absent0"}  # a network card that is not there
ONE_NODE = """\
import sys
from pathlib import Path
from megatron_opd.cluster import probe
from megatron_opd.cluster.place import Place
place = Place.from_slurm()
print(probe.unreachable(place, place.node, Path(sys.argv[1]), float(sys.argv[2])))
"""


def variables(index: int, per_node: int, nodes: list[str], **more: str) -> dict[str, str]:
    own = {
        "SLURM_PROCID": index,
        "SLURM_NTASKS": per_node * len(nodes),
        "SLURM_LOCALID": index % per_node,
        "SLURMD_NODENAME": nodes[index // per_node],
        "SLURM_JOB_NODELIST": ",".join(nodes),
        "SLURM_JOB_ID": 1,
    }
    return os.environ | {name: str(value) for name, value in own.items()} | more


def probes(
    path: Path,
    seconds: float,
    bad: dict[int, dict[str, str]],
    nodes: list[str] = NODES,
    per_node: int = 1,
) -> list[tuple[str, str]]:
    """What each rank printed and complained of. `bad`: node -> variables that it alone has."""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_NODE, str(path), str(seconds)],
            env=variables(index, per_node, nodes, **bad.get(index // per_node, {})),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(len(nodes) * per_node)
    ]  # fmt: skip
    return [each.communicate(timeout=300) for each in running]


def test_sound_nodes_need_one_round(tmp_path: Path) -> None:
    assert [out for out, _ in probes(tmp_path, 60, {}, NODES[:2], per_node=2)] == ["{}\n"] * 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["probe-0"]


@pytest.mark.slow
@pytest.mark.alone
def test_a_node_that_hangs_among_others_is_named_by_all(tmp_path: Path) -> None:
    """The middle one's all-reduces with others are stopped as soon as they appear."""
    stop = threading.Event()

    def hang() -> None:
        while not stop.wait(0.02):
            for entry in Path("/proc").glob("[0-9]*"):
                try:
                    argv, own = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
                except OSError:
                    continue
                is_probe = (
                    b"megatron_opd.cluster.probe\0" in argv and str(tmp_path).encode() in argv
                )
                if b"/probe-1/" in argv:  # alone
                    continue
                if is_probe and f"SLURMD_NODENAME={NODES[1]}\0".encode() in own:
                    os.kill(int(entry.name), signal.SIGSTOP)

    thread = threading.Thread(target=hang)
    thread.start()
    try:
        said = probes(tmp_path, 10, {})
    finally:
        stop.set()
        thread.join()
    problem = "no all-reduce with its neighbours comes through: it hung"
    assert [out for out, _ in said] == [str({NODES[1]: problem}) + "\n"] * 3
    assert not _left(tmp_path)


def _left(path: Path) -> list[str]:
    found = subprocess.run(["pgrep", "-f", str(path)], capture_output=True, text=True)
    return found.stdout.split()


def test_a_node_without_its_network_is_left_out_of_the_next_job(tmp_path: Path) -> None:
    """Whole ranks of a job: the verdict and the excluded node are what the batch script reads."""
    run_dir = tmp_path / "run"
    cluster = ClusterConfig(gpu="cpu", processes_per_node=1, nodes=3, start_minutes=1)
    job = Job("tiny", str(run_dir), str(tmp_path), sys.executable, cluster)
    job.directory.mkdir()
    job.write()
    (job.directory / "recipe.yaml").write_text(write_recipe(tmp_path).read_text())
    running = [
        subprocess.Popen(
            job.command(),
            env=variables(index, 1, NODES, **(ABSENT if index == 2 else {})),
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(3)
    ]
    said = [each.communicate(timeout=200)[1] for each in running]
    assert [each.returncode for each in running] == [3, 0, 0], said
    assert f"{NODES[2]} is unfit: " in said[0] and "absent0" in said[0]
    assert (directory_of(run_dir) / "verdict").read_text() == "exclude"
    assert (directory_of(run_dir) / "excluded").read_text().split() == [NODES[2]]
    assert json.loads((directory_of(run_dir) / "heartbeat.json").read_text())["state"] == "exclude"


def test_two_nodes_of_which_one_fails_alone_are_told_apart(tmp_path: Path) -> None:
    said = probes(tmp_path, 60, {0: ABSENT}, NODES[:2])
    assert all(
        out.startswith(f"{{'{NODES[0]}': ") and NODES[1] not in out and "absent0" in out
        for out, _ in said
    )


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 7, 8])
def test_every_neighbour_is_tried_and_no_node_is_in_two_pairs_at_once(nodes: int) -> None:
    found = list(probe.rounds(nodes))
    assert sorted(pair for groups in found for pair in groups) == sorted(probe.ring(nodes))
    for groups in found:
        inside = [node for pair in groups for node in pair]
        assert len(inside) == len(set(inside))
    assert len(found) <= 3
    assert len(probe.ring(nodes)) == {1: 0, 2: 1}.get(nodes, nodes)


def test_who_is_at_fault() -> None:
    assert probe.at_fault({(0, 1): "a", (1, 2): "b"}, 4) == {
        1: "no all-reduce with its neighbours comes through: a"
    }
    assert probe.at_fault({(0, 1): "a"}, 4) == {}
    assert set(probe.at_fault({(0, 1): "a"}, 2)) == {0, 1}  # nobody can say which
    assert probe.at_fault({}, 1) == {}
