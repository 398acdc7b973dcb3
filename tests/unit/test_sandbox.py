"""Programs of a model, and what they cannot do; seen from outside, with every layer and user."""

import contextlib
import fcntl
import functools
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_opd.doctor import packages
from megatron_opd.doctor.finding import Finding
from megatron_opd.errors import RunError
from megatron_opd.sandbox import folder, landlock, seccomp, system_calls
from megatron_opd.sandbox.interpreter import base_python
from megatron_opd.sandbox.layers import Layers, layers
from megatron_opd.sandbox.limits import Limits
from megatron_opd.sandbox.run import Sandbox
from tests.unit.sandbox_attacks import ATTACKS, MIB, ORDINARY, SECRET

ROOT = Path(__file__).parents[2]
DRIVER = Path(__file__).with_name("sandbox_attacks.py")
NOBODY = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
WORLDS = [
    "this user, landlock",
    "nobody, landlock",
    "this user, bubblewrap",
    "nobody, bubblewrap",
    "this user, all",
]
Report = dict[str, Any]


# -------------------------------------------------------------------------------------- the attacks
@functools.cache
def reported(world: str) -> Report:
    """What the driver says of all programs, run as a user with some layers."""
    user, kind = world.split(", ")
    start = [base_python()]
    if user == "nobody":
        if os.getuid() != 0 or not shutil.which("setpriv"):
            return {"skip": "only root can be nobody, by setpriv"}
        start = next(filter(_starts, [[*NOBODY, base_python()], [*NOBODY, "/usr/bin/python3"]]), [])
    if not start:
        return {"skip": "nobody can read no interpreter here"}
    run = subprocess.run(
        [*start, "-S", "-B", str(DRIVER), str(ROOT), kind],
        capture_output=True,
        text=True,
        cwd="/",
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def _starts(command: list[str]) -> bool:
    run = subprocess.run([*command, "-S", "-c", f"open({str(DRIVER)!r})"], capture_output=True)
    return run.returncode == 0


@pytest.fixture(params=WORLDS)
def report(request: pytest.FixtureRequest) -> Report:
    found = reported(request.param)
    if "skip" in found:
        pytest.skip(found["skip"])
    return found


def test_the_world_is_as_it_was(report: Report) -> None:
    """After every attack: files, victims, listeners, memory; no process and no folder is left."""
    world = report["world"]
    assert world.pop("victim's limit") == -1
    assert world == {
        "files": ["secret", "socket"],
        "tmp": [],
        "secret": [SECRET, 0o644, 1e9],
        "owner": True,
        "library": True,
        "victim alive": True,
        "heard": [],
        "shared memory": False,
    }
    assert report["orphans"] == ""
    assert report["left"] == []
    assert report["servers lost"] == []
    assert report["memory grew by KiB"] < 64 * 1024
    assert report["servers' KiB"] < 64 * 1024


REASONS = {
    "memory bomb": ("memory",),
    "thread bomb": ("memory", "failed", "timeout"),
    "many threads": ("threads",),
    "daemon": ("failed",),
    "many files": ("files",),
    "deep folders": ("files",),
    "folders without rights": ("ok", "files"),  # to be counted by another user than root
    "fill the disk": ("failed",),
    "endless stdout": ("output",),
    "endless descriptor": ("output",),
    "endless stderr": ("timeout",),
    "endless loop": ("timeout",),
    "endless loop in C": ("timeout",),
    "sleep, deaf to signals": ("timeout",),
    "sleep, all closed": ("timeout",),
    "wrong address": ("crashed",),
    "calls of x32": ("crashed",),
    "calls of 32 bits": ("crashed",),
}
# What may have been done, and did no harm: within a folder or namespaces of the program's own.
HARMLESS = {
    "symbolic link",
    "list the root",
    "environment of others",
    "write into tmp",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_and_ended(report: Report, name: str) -> None:
    if ATTACKS[name].machine not in ("", platform.machine()):
        pytest.skip(f"for {ATTACKS[name].machine}")
    outcome = report["outcomes"][name]
    assert outcome["reason"] in REASONS.get(name, ("ok",)), outcome
    assert SECRET not in outcome["stdout"]
    assert name in HARMLESS or "did" not in outcome["stdout"], outcome["stdout"]
    assert len(outcome["stdout"]) <= MIB
    assert len(outcome["stderr"].encode()) <= 3 * 4096  # replaced characters
    assert outcome["wall_seconds"] < 20


def test_limits_are_what_they_are_called(report: Report) -> None:
    outcomes = report["outcomes"]
    assert outcomes["memory bomb"]["stdout"].split()[-1] in ("192", "208", "224", "240")
    assert outcomes["fill the disk"]["stdout"].split() == [f"{MIB}", f"{2 * MIB}"]
    assert outcomes["own environment"]["stdout"] in (
        "['LC_CTYPE', 'PYTHONHASHSEED']\n",
        "['PYTHONHASHSEED']\n",
    )
    assert outcomes["descriptors"]["stdout"] == ""
    assert 0.4 <= outcomes["endless loop"]["cpu_seconds"] < 2
    assert outcomes["sleep, all closed"]["wall_seconds"] >= 0.5


def test_ordinary_programs_are_not_disturbed(report: Report) -> None:
    outcomes = {name: report["outcomes"][name] for name in ORDINARY}
    said = {name: (each["reason"], each["stdout"]) for name, each in outcomes.items()}
    deep = said.pop("recursion in C")
    assert deep in (("ok", "50000\n"), ("failed", "")), outcomes["recursion in C"]
    assert said == {
        "reads and prints": ("ok", "12\n"),
        "reads through /dev/stdin": ("ok", "WORDS\n"),
        "does not read": ("ok", "done\n"),
        "exits": ("failed", ""),
        "raises": ("failed", ""),
        "threads": ("ok", "[7]\n"),
        "imports": ("ok", "0.3333333333333333333333333333\n"),
        "recursion": ("ok", "50000\n"),
        "files of its own": ("ok", "kept ['b']\n"),
        "hands back": ("ok", "seen\n"),
        "ends itself": ("crashed", ""),
        "words": ("ok", "Größe ∑\n"),
    }
    assert outcomes["hands back"]["handed_back"] == "kept apart"
    assert outcomes["exits"]["exit_code"] == 3
    assert "KeyError: 'lost'" in outcomes["raises"]["stderr"]


# ----------------------------------------------------------------------------- a sandbox's own life
@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(without_bubblewrap()) as opened:
        yield opened


@functools.cache
def without_bubblewrap() -> Layers:
    there = layers()
    if there.landlock:
        pytest.skip(there.landlock)
    return Layers(there.seccomp, "", "left out by the test", there.landlock_version)


def test_a_lost_server_is_replaced_and_its_program_ends(sandbox: Sandbox) -> None:
    sandbox.run("")
    server = sandbox._server
    assert server is not None
    threading.Timer(0.5, os.kill, (server.pid, signal.SIGKILL)).start()
    # asked once more of the next server, where it ends by itself
    finished = sandbox.run("import time; time.sleep(2.0); print('done')")
    assert (finished.reason, finished.stdout) == ("ok", b"done\n")
    assert sandbox._server is not server


def test_a_server_is_killed_before_the_trainer_and_a_program_that_did_not_begin_is_lost(
    sandbox: Sandbox,
) -> None:
    too_few = sandbox.run("print('ran')", limits=Limits(open_files=3))  # for Landlock's own
    assert (too_few.reason, too_few.stdout) == ("lost", b"")
    assert b"Too many open files" in too_few.stderr
    assert sandbox.run("print('ran')").stdout == b"ran\n"
    assert sandbox._server is not None
    assert Path(f"/proc/{sandbox._server.pid}/oom_score_adj").read_text() == "1000\n"


def test_a_program_finds_nothing_of_the_one_before_it() -> None:
    """Bubblewrap alone guards files here."""
    there = layers()
    if there.bubblewrap:
        pytest.skip(there.bubblewrap)
    looks = (
        "import os\n"
        "for folder in ('/dev/shm', '/dev', '/scratch', '/scratch/packages', '/scratch/work'):\n"
        "    path = folder + '/left'\n"
        "    try:\n"
        "        print(os.path.exists(path), open(path, 'w').close())\n"
        "    except OSError as error:\n"
        "        print(type(error).__name__)\n"
    )
    with Sandbox(replace(there, landlock="left out by the test")) as alone:
        assert alone._scratch == ""
        for files, own in ((4, "False None"), (0, "PermissionError"), (4, "False None")):
            finished = alone.run(looks, limits=Limits(files=files))
            first, *closed, last = finished.stdout.decode().splitlines()
            assert {first, *closed} <= {"OSError", "PermissionError"}, finished
            assert last == own


def test_an_interrupted_sandbox_ends_at_once_and_refuses_more(sandbox: Sandbox) -> None:
    sandbox.run("")
    threading.Timer(0.3, sandbox.interrupt).start()
    started = time.monotonic()
    with pytest.raises(RunError, match="closed"):
        sandbox.run("import time; time.sleep(60)")
    assert time.monotonic() - started < 10
    with pytest.raises(RunError, match="closed"):
        sandbox.run("")


def test_a_program_ends_with_its_caller(tmp_path: Path) -> None:
    """Killed by SIGKILL, a trainer leaves no process and no folder behind."""
    code = (
        "from megatron_opd.sandbox.run import Sandbox\n"
        "from megatron_opd.sandbox.layers import Layers\n"
        "sandbox = Sandbox(Layers('', '', 'left out'))\n"
        "sandbox.run('')\n"
        "print(sandbox._server.pid, flush=True)\n"
        "sandbox.run('import time; time.sleep(60)')\n"
    )
    without_bubblewrap()
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
    ) as caller:
        assert caller.stdout is not None
        server = int(caller.stdout.readline())
        program = _wait_for_child(server)
        caller.kill()
        caller.wait()
        deadline = time.monotonic() + 20
        while _alive(server) or _alive(program):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert list(tmp_path.iterdir()) == []


def _wait_for_child(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    deadline = time.monotonic() + 20
    while not children.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return int(children.read_text())


def _alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    return False


def test_folders_of_any_depth_and_mode_are_emptied(tmp_path: Path) -> None:
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        for _ in range(40):  # longer than a path may be
            os.mkdir("a" * 200)
            os.chdir("a" * 200)
        Path("b").touch()
        os.symlink("/", "c")
    finally:
        os.chdir(here)
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "0").touch()
    (tmp_path / "closed").chmod(0)
    assert folder.more_than(str(tmp_path), 100)
    folder.empty(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------- the layers
def test_without_a_filter_or_without_guarded_files_nothing_is_run() -> None:
    with pytest.raises(RunError, match="filter of system calls: no table"):
        Sandbox(Layers("no table for riscv64", "", ""), allow_weak=True)
    if missing := layers().seccomp:
        pytest.skip(missing)
    bare = Layers("", "not in this kernel", "bwrap is not on PATH")
    with pytest.raises(
        RunError, match=r"read the user's files: .*not in this kernel.*bwrap is not"
    ):
        Sandbox(bare)
    with Sandbox(bare, allow_weak=True) as weak:
        assert weak.run("print(1)").stdout == b"1\n"
        assert weak.run("import os; os.fork()").reason == "failed"
        writes = "open('a', 'w'); open('b', 'w'); import time; time.sleep(9)"
        assert weak.run(writes).reason == "failed"
        assert weak.run(writes, limits=Limits(files=1)).reason == "files"


def test_a_server_that_cannot_confine_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers are tried by a program before the first one of a model is run."""
    lying = Layers("", "", "", command=["/bin/false"])
    with Sandbox(lying) as sandbox, pytest.raises(RunError, match="does not start"):
        sandbox.run("print(1)")
    if landlock.version() == 0:
        with Sandbox(Layers("", "", "none")) as sandbox, pytest.raises(RunError, match="Landlock"):
            sandbox.run("print(1)")


def test_the_doctor_says_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "layers", without_bubblewrap)
    assert packages.CHECKS["sandbox"]("sandbox") == Finding(
        "ok",
        "sandbox",
        f"runs a program behind seccomp, landlock-{landlock.version()}; left out by the test",
    )
    monkeypatch.setattr(packages, "layers", lambda: Layers("no table for riscv64", "", ""))
    finding = packages.CHECKS["sandbox"]("sandbox")
    assert (finding.status, finding.text.endswith("no table for riscv64")) == ("warn", True)


HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}


@pytest.mark.parametrize("machine", system_calls.MACHINES)
def test_numbers_of_calls_are_those_of_the_headers(machine: str) -> None:
    if not HEADERS[machine].exists():
        pytest.skip("the kernel's headers are not installed")
    pattern = re.compile(r"#define __NR(?:3264)?_(\w+)\s+(\d+)")
    known = {name: int(value) for name, value in pattern.findall(HEADERS[machine].read_text())}
    ours = system_calls.DENIED | system_calls.UNKNOWN
    for name in ("CLONE", "KILL", "TGKILL", "PRLIMIT64", "FCNTL", "OPEN", "OPENAT"):
        ours[name.lower()] = getattr(system_calls, name)
    numbers = {name: system_calls.number(pair, machine) for name, pair in ours.items()}
    different = {n: v for n, v in numbers.items() if n in known and known[n] != v}
    assert not different
    # those that newer headers have, and those that the architecture has not
    assert sum(name in known for name in numbers) > 100
    assert not [name for name, value in numbers.items() if value is None and name in known]


@pytest.mark.parametrize("machine", system_calls.MACHINES)
def test_a_filter_is_what_the_kernel_takes_and_does_what_it_says(machine: str) -> None:
    program = seccomp.filter_of(machine, pid=77)
    arch = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]

    def answer(call: int | None, *arguments: int, arch: int = arch) -> str:
        assert call is not None
        return interpreted(program, call, arch, arguments)

    def number(pair: system_calls.Numbers) -> int | None:
        return system_calls.number(pair, machine)

    assert len(program) < 4096
    allowed = {"x86_64": (0, 1, 9, 59, 231), "aarch64": (63, 64, 222, 221, 94)}[machine]
    assert [answer(call) for call in allowed] == ["allow"] * 5
    for pair in system_calls.DENIED.values():
        if number(pair) is not None:
            assert answer(number(pair)) == "EPERM"
    assert answer(435) == answer(437) == answer(463) == answer(9999) == "ENOSYS"
    assert answer(0, arch=0x40000003) == answer(0x40000000 + 39) == "kill"
    assert answer(number(system_calls.CLONE), 17) == "EPERM"
    assert answer(number(system_calls.CLONE), 0x10000 | 17) == "allow"
    for pair in (system_calls.KILL, system_calls.TGKILL):
        assert answer(number(pair), 77, 9) == "allow"
        assert answer(number(pair), 78, 9) == answer(number(pair), 2**32 - 1, 9) == "EPERM"
    limit = number(system_calls.PRLIMIT64)
    assert answer(limit, 0, 7, 0, 2**40) == "allow"
    assert answer(limit, 0, 7, 16, 0) == answer(limit, 0, 7, 2**40, 0) == "EPERM"
    opened = number(system_calls.OPENAT)
    for flags in (os.O_RDONLY | os.O_TRUNC, os.O_ACCMODE, os.O_ACCMODE | os.O_TRUNC):
        assert answer(opened, 3, 0, flags | os.O_CLOEXEC) == "EPERM"
    assert answer(opened, 3, 0, os.O_WRONLY | os.O_TRUNC | os.O_CREAT) == "allow"
    assert answer(opened, 3, 0, os.O_RDONLY | os.O_CLOEXEC) == "allow"
    control = number(system_calls.FCNTL)
    for command in (fcntl.F_SETOWN, 15, fcntl.F_SETSIG, 2**32 + fcntl.F_SETOWN):
        assert answer(control, 3, command, 1) == "EPERM"
    for command in (fcntl.F_GETFL, fcntl.F_SETFL, fcntl.F_GETOWN, fcntl.F_DUPFD_CLOEXEC):
        assert answer(control, 3, command, 1) == "allow"


def interpreted(
    program: list[seccomp.Instruction], call: int, arch: int, arguments: tuple[int, ...]
) -> str:
    """What a filter answers to a call."""
    words = {0: call, 4: arch}
    for place in range(6):
        value = arguments[place] if place < len(arguments) else 0
        words[16 + 8 * place] = value & (2**32 - 1)
        words[20 + 8 * place] = value >> 32
    taken = 0
    place = 0
    while True:
        code, yes, no, operand = program[place]
        place += 1
        if code == 0x20:
            taken = words[operand]
        elif code == 0x54:
            taken &= operand
        elif code == 0x06:
            named = {0x7FFF0000: "allow", 0x50001: "EPERM", 0x50026: "ENOSYS"}
            return named.get(operand, "kill")
        else:
            tests = {0x15: taken == operand, 0x25: taken > operand, 0x35: taken >= operand}
            place += yes if tests.get(code, bool(taken & operand)) else no
