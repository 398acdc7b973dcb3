"""Submits a job through nemo-run: the only program here that imports it, in an environment of its
own.

    NEMORUN_HOME=FOLDER .venv-launch/bin/python slurm/submit.py SPEC.json [--dry-run]

SPEC.json is what `megatron-opd launch` wrote (megatron_opd/cluster/submit.py). The batch script is
left in the folder; the job's number is the last line of the output.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import nemo_run
from nemo_run.core.execution.slurm import SlurmJobDetails


@dataclass(kw_only=True)
class Details(SlurmJobDetails):
    """Logs where `megatron-opd logs` looks for them: in `folder`."""

    @property
    def stdout(self) -> Path:
        return Path(str(self.folder)) / "batch_%j.out"

    @property
    def srun_stdout(self) -> Path:
        return Path(str(self.folder)) / "%j_${SLURM_RESTART_COUNT:-0}_%t.out"

    @property
    def ls_term(self) -> str:
        return str(Path(str(self.folder)) / "*.out")


def main() -> int:
    spec = json.loads(Path(sys.argv[1]).read_text())
    flags = {name.replace("-", "_"): value for name, value in spec["flags"].items()}
    container = spec["container"]
    python, _m, module, *arguments = spec["command"]
    executor = nemo_run.SlurmExecutor(
        account=flags.pop("account", None),
        container_image=container.get("image"),
        container_mounts=container.get("mounts", []),
        container_env=container.get("env"),
        srun_args=spec["srun"],
        setup_lines="\n".join(spec["setup"]),
        additional_parameters={"reservation": flags.pop("reservation")}
        if "reservation" in flags
        else None,
        job_name_prefix="opd.",
        job_details=Details(job_name=spec["name"], folder=spec["logs"]),
        tunnel=nemo_run.SSHTunnel(**spec["tunnel"])
        if spec["tunnel"]
        else nemo_run.LocalTunnel(job_dir=""),
        packager=nemo_run.Packager(),  # the code lies on the shared file system
        poll_estimated_start_time=False,
        **flags,
    )
    script = nemo_run.Script(path=module, entrypoint=python, m=True, args=arguments)
    with nemo_run.Experiment(
        spec["name"], executor=executor, enable_goodbye_message=False
    ) as experiment:
        experiment.add(script, name="train", tail_logs=False)
        if "--dry-run" in sys.argv:
            experiment.dryrun(delete_exp_dir=False)
            return 0
        experiment.run(detach=True)
    print(experiment.jobs[0].handle.rpartition("/")[2])
    return 0


if __name__ == "__main__":
    sys.exit(main())
