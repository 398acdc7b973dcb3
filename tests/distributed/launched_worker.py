"""What `test_launch` starts: every rank notes its pid and ends the way the first argument says."""

import os
import signal
import sys
import time
from pathlib import Path

from megatron_opd.world.torchrun import die_with_parent, record_outcome


def main(ending: str, folder: Path) -> int:
    die_with_parent(signal.SIGKILL)
    rank, stopped = os.environ["RANK"], []
    signal.signal(signal.SIGINT, lambda number, frame: stopped.append(number))
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    if ending == "ok":
        (folder / f"options{rank}").write_text(" ".join(sys.argv[3:]))
        return record_outcome(0, "")
    if ending == "rank1" and rank == "1":
        return record_outcome(2, "rank 1 cannot read its data")
    if ending == "crash" and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    while not stopped or ending == "stubborn":
        time.sleep(0.05)
    time.sleep(1.5 * int(rank))  # rank 1 is still saving when rank 0 has ended
    (folder / f"saved{rank}").write_text("")
    return record_outcome(130, "saved")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
