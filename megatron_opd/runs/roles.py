"""The roles of processes.

Most processes run the algorithm on their share of the student; some may hold the teacher alone, or
an engine. Each role is a world of its own: the default process group, and so every collective over
the world, is of the processes of one role.
"""

from collections.abc import Callable
from functools import partial

from megatron_opd.recipe.keys import RunConfig
from megatron_opd.rollout import remote as remote_engine
from megatron_opd.rollout.open import start_engine
from megatron_opd.runs.models import load_teacher
from megatron_opd.teacher import remote as remote_teacher
from megatron_opd.world import processes
from megatron_opd.world.channel import Channel
from megatron_opd.world.stop import StopRequest

_SERVE: dict[str, Callable[[Channel], None]] = {
    "rollout": lambda channel: remote_engine.serve(channel, partial(start_engine, sleeps=False)),
    "teacher": lambda channel: remote_teacher.serve(channel, load_teacher),
}


def run_in_role(config: RunConfig, work: Callable[[], None]) -> None:
    """Joins the process groups, and does `work` or serves the processes that do.

    Every process of a run calls this; a process that is set aside for a role serves.
    """
    processes.start(apart=config.processes_apart)
    try:
        role = processes.own_role()
        channel = processes.channel(role) if role else None
        if role and channel:
            # Ctrl-C is for the other processes, which need this one until the step is done.
            stop = StopRequest()
            try:
                _SERVE[role](channel)
            finally:
                stop.restore()
        else:
            work()
    finally:
        processes.stop()
