"""What a process is for. Most run the algorithm on their share of the student; some may only hold the teacher.

Each role is a world of its own: the default process group, and so whatever is collective over the world, is of the
processes of one role.
"""

from collections.abc import Callable

from megatron_opd.config.schema import RunConfig
from megatron_opd.mcore import parallel as groups
from megatron_opd.models import load_teacher
from megatron_opd.run import StopRequest
from megatron_opd.teacher.remote import serve


def run_in_role(config: RunConfig, work: Callable[[], None]) -> None:
    """Joins the process groups and does `work`; a process of the teacher's serves it while the others work.

    Every process of a run calls this.
    """
    groups.start(teacher_processes=config.teacher_processes)
    try:
        bridge = groups.bridge()
        if bridge and bridge.serves:
            stop = StopRequest()  # Ctrl-C is for the others, who need the teacher until the step is done
            try:
                serve(bridge, load_teacher)
            finally:
                stop.restore()
        else:
            work()
    finally:
        groups.stop()
