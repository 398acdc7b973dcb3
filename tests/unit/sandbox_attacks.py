"""Programs that a model could write, and the world around them that they must not touch.

    python sandbox_attacks.py REPOSITORY LAYERS

runs them all with the layers "all", "landlock" or "bubblewrap", as the user that it is run as, and
prints as JSON what became of them and of the world. It needs nothing but the standard library.
"""

import contextlib
import ctypes
import json
import os
import queue
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

MIB = 2**20
SECRET = "hf_the_users_token"
THREADS = 4

PRELUDE = """
import ctypes, errno, os, resource, signal, socket, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def tried(function, *arguments):
    try:
        print("did", function(*arguments))
    except (OSError, ValueError) as error:
        print("refused", errno.errorcode.get(getattr(error, "errno", 0), error))
def on(x86_64, aarch64):
    return x86_64 if os.uname().machine == "x86_64" else aarch64
def called(number, *arguments):
    done = libc.syscall(number, *arguments) >= 0
    print("did" if done else "refused " + errno.errorcode[ctypes.get_errno()], number)
"""


@dataclass(frozen=True)
class Attack:
    source: str
    limits: dict[str, Any] = field(default_factory=dict)
    stdin: bytes = b""
    machine: str = ""  # the only one that it is for


SHORT = {"cpu_seconds": 0.4}
PATIENT = {"wall_seconds": 0.5}

ATTACKS: dict[str, Attack] = {
    # ---------------------------------------------------------------------- processes and threads
    "fork bomb": Attack("tried(os.fork)\ntried(os.fork)"),
    "vfork": Attack("called(58)", machine="x86_64"),
    "clone": Attack("called(on(56, 220), 17, 0, 0, 0, 0)"),
    "clone3": Attack("called(435, ctypes.create_string_buffer(88), 88)"),
    "spawn": Attack("tried(os.posix_spawn, '/bin/true', ['true'], {})"),
    "shell": Attack("tried(os.execv, '/bin/sh', ['sh', '-c', 'echo did > %s/shell' % W['home']])"),
    "daemon": Attack(
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    time.sleep(0.2)\n"
        "    open(W['home'] + '/daemon', 'w').write('late')"
    ),
    "thread bomb": Attack(
        "import threading\n"
        "while True:\n"
        "    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
        {"memory_bytes": 512 * MIB, **SHORT},
    ),
    "many threads": Attack(
        "import threading\n"
        "threading.stack_size(1 << 15)\n"
        "while True:\n"
        "    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
    ),
    # ------------------------------------------------------------------------------------- memory
    "memory bomb": Attack(
        "held = []\nwhile True:\n    held.append(bytes(16 << 20))\n    print(16 * len(held))\n",
        {"memory_bytes": 256 * MIB},
    ),
    "memfd": Attack("tried(os.memfd_create, 'more')"),
    "shared memory": Attack("called(on(29, 194), 77, 4096, 0o1600)"),
    "mlock": Attack("called(on(151, 230), 1)"),
    # ------------------------------------------------------------------------------------ network
    "tcp": Attack("tried(socket.create_connection, ('127.0.0.1', W['tcp']), 0.2)"),
    "udp": Attack(
        "tried(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)"
        ".sendto(b'x', ('127.0.0.1', W['udp'])))"
    ),
    "unix socket": Attack("tried(lambda: socket.socket(socket.AF_UNIX).connect(W['unix']))"),
    "abstract socket": Attack(
        "tried(lambda: socket.socket(socket.AF_UNIX).connect('\\0' + W['abstract']))"
    ),
    "netlink": Attack("tried(socket.socket, socket.AF_NETLINK, socket.SOCK_RAW)"),
    # -------------------------------------------------------------------------------------- files
    "write outside": Attack("tried(open, W['home'] + '/new', 'w')"),
    "write into tmp": Attack("tried(open, W['tmp'] + '/megatron-opd-attack-' + W['tag'], 'w')"),
    "overwrite the victim": Attack("tried(open, W['secret'], 'w')"),
    "append to the victim": Attack("tried(open, W['secret'], 'a')"),
    "cut the victim": Attack("tried(os.truncate, W['secret'], 0)"),
    "cut while reading": Attack("tried(os.open, W['secret'], os.O_RDONLY | os.O_TRUNC)"),
    "open for ioctl alone": Attack(
        "tried(os.open, W['secret'], os.O_ACCMODE)\n"
        "tried(os.open, W['secret'], os.O_ACCMODE | os.O_TRUNC)"
    ),
    "cut the library": Attack("tried(os.open, W['library'], os.O_RDONLY | os.O_TRUNC)"),
    "remove the victim": Attack("tried(os.unlink, W['secret'])"),
    "rename the victim": Attack("tried(os.rename, W['secret'], W['secret'] + '2')"),
    "mode of the victim": Attack("tried(os.chmod, W['secret'], 0o777)"),
    "owner of the victim": Attack("tried(os.chown, W['secret'], 1234, 1234)"),
    "time of the victim": Attack("tried(os.utime, W['secret'], (0, 0))"),
    "link to the victim": Attack(
        "tried(os.link, W['secret'], 'link')\ntried(open, 'link')", {"files": 4}
    ),
    "symbolic link": Attack(
        "tried(os.symlink, W['secret'], 'link')\ntried(lambda: open('link').read())", {"files": 4}
    ),
    "device": Attack("tried(os.mknod, 'disk', 0o60600, os.makedev(254, 0))", {"files": 4}),
    "own program": Attack("tried(open, __file__, 'w')"),
    "own folder": Attack(
        "tried(os.rename, os.getcwd(), '../other')\n"
        "tried(os.symlink, W['home'], '../work')\n"
        "tried(os.unlink, '../program.py')\n"
        "tried(os.symlink, W['secret'], '../program.py')"
    ),
    "read passwd": Attack("tried(lambda: open('/etc/passwd').read())"),
    "read the home": Attack("tried(lambda: open(W['secret']).read())"),
    "list the home": Attack("tried(os.listdir, W['home'])"),
    "list the root": Attack("tried(os.listdir, '/root')"),
    "fill the disk": Attack(
        "with open('big', 'wb') as file:\n"
        "    while True:\n"
        "        file.write(bytes(1 << 20))\n"
        "        file.flush()\n"
        "        print(file.tell(), flush=True)",
        {"files": 4, "file_bytes": 2 * MIB},
    ),
    "a file though none is allowed": Attack("tried(open, 'file', 'w')\ntime.sleep(0.1)"),
    "many files": Attack(
        "for number in range(1000000):\n    open(f'{number}', 'w').close()", {"files": 16, **SHORT}
    ),
    "deep folders": Attack(
        "while True:\n    os.mkdir('a')\n    os.chdir('a')", {"files": 16, **SHORT}
    ),
    "folders without rights": Attack(
        "os.mkdir('b')\nos.umask(0o777)\nos.mkdir('a')\nos.mkdir('b/c')\nprint(os.listdir('.'))",
        {"files": 16},
    ),
    # -------------------------------------------------------------------------------------- output
    "endless stdout": Attack("while True:\n    print('x' * 10000)", {"output_bytes": MIB}),
    "endless descriptor": Attack("while True:\n    os.write(3, bytes(10000))"),
    "endless stderr": Attack("while True:\n    os.write(2, bytes(10000))", SHORT),
    # ------------------------------------------------------------------------------ other processes
    "kill the parent": Attack("tried(os.kill, os.getppid(), signal.SIGKILL)"),
    "kill the victim": Attack("tried(os.kill, W['victim'], signal.SIGKILL)"),
    "kill everybody": Attack("tried(os.kill, -1, signal.SIGKILL)\ntried(os.killpg, 0, 9)"),
    "queue a signal": Attack(
        "called(on(129, 138), W['victim'], 9, ctypes.create_string_buffer(128))"
    ),
    "signal by a descriptor": Attack(
        "import fcntl\n"
        "read, write = os.pipe()\n"
        "fcntl.fcntl(read, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)\n"
        "tried(fcntl.fcntl, read, fcntl.F_SETSIG, signal.SIGKILL)\n"
        "tried(fcntl.fcntl, read, fcntl.F_SETOWN, W['victim'])\n"
        "tried(fcntl.fcntl, read, 15, bytes([1, 0, 0, 0]) + W['victim'].to_bytes(4, 'little'))\n"
        "os.write(write, b'x')"
    ),
    "pidfd": Attack("tried(os.pidfd_open, W['victim'])"),
    "ptrace": Attack("called(on(101, 117), 16, W['victim'], 0, 0)"),
    "limits of the victim": Attack(
        "tried(resource.prlimit, W['victim'], resource.RLIMIT_CPU, (1, 1))"
    ),
    "environment of others": Attack(
        "for pid in [os.getppid(), W['victim'], W['driver'], 1]:\n"
        "    tried(lambda: open(f'/proc/{pid}/environ').read())"
    ),
    "memory of others": Attack(
        "for pid in [os.getppid(), W['victim'], W['driver'], 1]:\n"
        "    tried(open, f'/proc/{pid}/mem', 'r+b', 0)"
    ),
    "own environment": Attack("print(sorted(os.environ))"),
    "descriptors": Attack(
        "for number in range(4, 1024):\n"
        "    try:\n        os.fstat(number)\n    except OSError:\n        continue\n"
        "    print('open', number)"
    ),
    # ------------------------------------------------------------------------ limits and privileges
    "raise a limit": Attack(
        "tried(resource.setrlimit, resource.RLIMIT_AS, (-1, -1))\n"
        "tried(resource.setrlimit, resource.RLIMIT_CPU, (99, 99))"
    ),
    "unshare": Attack("called(on(272, 97), 0x10000000)"),
    "mount": Attack("print(libc.mount(b'none', b'/', b'tmpfs', 0, None))"),
    "chroot": Attack("tried(os.chroot, '.')"),
    "another user": Attack("tried(os.setuid, 1)"),
    "a better place": Attack("tried(os.setpriority, os.PRIO_PROCESS, 0, -20)"),
    "kernel programs": Attack(
        "for number in (425, 426, 427):\n    called(number, 0, 0, 0)\n"
        "for pair in ((321, 280), (298, 241), (323, 282), (250, 219), (317, 277)):\n"
        "    called(on(*pair), 0, 0, 0)"
    ),
    "a call of the future": Attack("called(500, 0)"),
    "calls of x32": Attack("called(0x40000000 + 39)", machine="x86_64"),
    "calls of 32 bits": Attack(
        "import mmap\n"
        "code = mmap.mmap(-1, 4096, prot=7)\n"
        "code.write(bytes([0xb8, 20, 0, 0, 0, 0xcd, 0x80, 0xc3]))\n"
        "address = ctypes.addressof(ctypes.c_char.from_buffer(code))\n"
        "print('did', ctypes.CFUNCTYPE(ctypes.c_int)(address)())",
        machine="x86_64",
    ),
    # ---------------------------------------------------------------------------------------- time
    "endless loop": Attack("while True:\n    pass", SHORT),
    "sleep, deaf to signals": Attack(
        "for number in range(1, 65):\n"
        "    try:\n        signal.signal(number, signal.SIG_IGN)\n"
        "    except (OSError, ValueError):\n        pass\n"
        "time.sleep(60)",
        PATIENT,
    ),
    "sleep, all closed": Attack("os.closerange(0, 64)\ntime.sleep(60)", PATIENT),
    "endless loop in C": Attack("sum(range(10 ** 13))", SHORT),
    "wrong address": Attack("ctypes.string_at(1)"),
}

ORDINARY: dict[str, Attack] = {
    "reads and prints": Attack("print(sum(map(int, input().split())))", stdin=b"3 4 5\n"),
    "reads through /dev/stdin": Attack("print(open(0).read().upper())", stdin=b"words"),
    "does not read": Attack("print('done')", stdin=bytes(MIB)),
    "exits": Attack("sys.exit(3)"),
    "raises": Attack("raise KeyError('lost')"),
    "threads": Attack(
        "import threading\n"
        "threading.stack_size(1 << 26)\n"
        "heard = []\n"
        "thread = threading.Thread(target=lambda: heard.append(7))\n"
        "thread.start()\nthread.join()\nprint(heard)"
    ),
    "imports": Attack(
        "import asyncio, bisect, collections, copy, ctypes, datetime, decimal, fractions, "
        "functools, heapq, itertools, json, math, multiprocessing, operator, queue, random, re,"
        " sqlite3, statistics, string, typing, unittest\nprint(decimal.Decimal(1) / 3)"
    ),
    "recursion": Attack(
        "sys.setrecursionlimit(60000)\n"
        "def depth(n):\n    return 0 if n == 0 else 1 + depth(n - 1)\n"
        "print(depth(50000))"
    ),
    "recursion in C": Attack(
        "import functools\nsys.setrecursionlimit(60000)\n"
        "@functools.cache\ndef depth(n):\n    return 0 if n == 0 else 1 + depth(n - 1)\n"
        "print(depth(50000))"
    ),
    "files of its own": Attack(
        "open('a', 'w').write('kept')\nos.mkdir('b')\nos.rename('a', 'b/a')\n"
        "print(open('b/a').read(), os.listdir('.'))",
        {"files": 4},
    ),
    "hands back": Attack("print('seen')\nos.write(3, b'kept apart')"),
    "ends itself": Attack("os.abort()"),
    "words": Attack("print(input())", stdin="Größe ∑\n".encode()),
}


class World:
    """What a program must not touch: a home with a secret, a process, and four listeners."""

    def __init__(self) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="megatron-opd-home-"))
        secret = self.home / "secret"
        secret.write_text(SECRET)
        os.utime(secret, (1e9, 1e9))
        self.secret = secret
        self.victim = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=-1)
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.unix = socket.socket(socket.AF_UNIX)
        self.unix.bind(str(self.home / "socket"))
        self.unix.listen()
        self.abstract = socket.socket(socket.AF_UNIX)
        self.abstract.bind(f"\0megatron-opd-{os.getpid()}")
        self.abstract.listen()
        self.tag = f"{os.getpid()}"
        for listener in (self.tcp, self.udp, self.unix, self.abstract):
            listener.setblocking(False)

    def names(self) -> dict[str, Any]:
        return {
            "home": str(self.home),
            "secret": str(self.secret),
            "library": os.__file__,
            "tmp": tempfile.gettempdir(),
            "tag": self.tag,
            "victim": self.victim.pid,
            "driver": os.getpid(),
            "tcp": self.tcp.getsockname()[1],
            "udp": self.udp.getsockname()[1],
            "unix": str(self.home / "socket"),
            "abstract": f"megatron-opd-{os.getpid()}",
        }

    def state(self) -> dict[str, Any]:
        """Seen from outside, after the programs."""
        about = self.secret.stat()
        return {
            "files": sorted(os.listdir(self.home)),
            "tmp": list(Path(tempfile.gettempdir()).glob(f"megatron-opd-attack-{self.tag}")),
            "secret": [self.secret.read_text(), about.st_mode & 0o777, about.st_mtime],
            "owner": about.st_uid == os.getuid(),
            "library": os.path.getsize(os.__file__) > 0,
            "victim alive": self.victim.poll() is None,
            "victim's limit": resource.prlimit(self.victim.pid, resource.RLIMIT_CPU)[0],
            "heard": [name for name in ("tcp", "unix", "abstract") if self._heard(name)]
            + (["udp"] if self._heard_words() else []),
            "shared memory": " 77 " in Path("/proc/sysvipc/shm").read_text().replace("\n", " "),
        }

    def _heard(self, name: str) -> bool:
        with contextlib.suppress(BlockingIOError):
            getattr(self, name).accept()
            return True
        return False

    def _heard_words(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            self.udp.recv(10)
            return True
        return False

    def end(self) -> None:
        self.victim.kill()
        self.victim.wait()
        shutil.rmtree(self.home)


def run_all(kind: str) -> dict[str, Any]:
    from megatron_opd.sandbox.layers import layers
    from megatron_opd.sandbox.limits import Limits
    from megatron_opd.sandbox.run import Sandbox

    there = layers()
    if kind == "landlock":
        there = replace(there, command=[])
    if kind == "bubblewrap":
        there = replace(there, landlock="left out by the test")
    if kind != "landlock" and there.bubblewrap:
        return {"skip": there.bubblewrap}
    if kind != "bubblewrap" and there.landlock:
        return {"skip": there.landlock}
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # orphans become this process's children
    world = World()
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    programs = ATTACKS | ORDINARY
    for name in programs:
        waiting.put(name)
    outcomes: dict[str, Any] = {}
    servers: list[int] = []
    replaced: list[int] = []

    def work() -> None:
        with Sandbox(there) as sandbox:
            sandbox.run("")
            server = sandbox._server
            assert server is not None
            with contextlib.suppress(queue.Empty):
                while True:
                    name = waiting.get_nowait()
                    program = programs[name]
                    source = f"{PRELUDE}\nW = {world.names()!r}\n{program.source}\n"
                    limits = Limits(**program.limits)
                    outcomes[name] = vars(sandbox.run(source, program.stdin, limits))
            servers.append(memory_kib(server.pid))
            scratch.append(sandbox._scratch)
            if sandbox._server is not server:
                replaced.append(server.pid)

    scratch: list[str] = []
    before = memory_kib(os.getpid())
    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    time.sleep(0.3)  # for those who wait until nobody looks
    report = {
        "outcomes": outcomes,
        "world": world.state(),
        "left": [folder for folder in scratch if os.path.exists(folder)],
        "memory grew by KiB": memory_kib(os.getpid()) - before,
        "servers' KiB": max(servers),
        "servers lost": replaced,
    }
    world.end()
    try:
        report["orphans"] = str(os.waitpid(-1, os.WNOHANG))
    except ChildProcessError:
        report["orphans"] = ""
    return report


def memory_kib(pid: int) -> int:
    """The most that a process has had in memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    os.environ["HF_TOKEN"] = SECRET
    print(json.dumps(run_all(sys.argv[2]), default=lambda value: value.decode(errors="replace")))
