"""Workers as jobs of a SLURM cluster, by submitit.

A job is the same command as a worker of this machine, in as many tasks as a run has processes. At
its time limit, or when it is preempted, it saves a checkpoint and queues itself again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from reproduce.errors import UsageError
from reproduce.grid.lock import STARTED, WORKER
from reproduce.grid.workers import KILLED, Worker
from reproduce.recipe.schema import Recipe
from reproduce.records import Stage

if TYPE_CHECKING:
    import submitit

QUEUE_SECONDS = 5.0
"""Between two looks at the queue."""
WARNING = "USR1"
"""What SLURM warns with; a command that meets it directly stops in order too."""


def _submitit() -> Any:
    """The library, which reads when it is imported what SLURM warns with."""
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = WARNING
    import submitit.helpers

    return submitit


class Task:
    """What a job's task does: run the command, pass on signals. Pickled with the job.

    Args:
        command: of the worker.
        env: what its environment has beside the job's.
    """

    def __init__(self, command: Sequence[str], env: dict[str, str]) -> None:
        self.command, self.env = list(command), env
        self._child: subprocess.Popen[bytes] | None = None
        self._preempted = False

    def __call__(self) -> int:
        """The command's exit code; a signal's number is negative."""
        submitit = _submitit()
        job = submitit.JobEnvironment()
        job.paths.result_pickle.unlink(missing_ok=True)  # of an attempt that SLURM began again
        if job.num_tasks > 1:
            submitit.helpers.TorchDistributedEnvironment().export(
                set_cuda_visible_devices=False, overwrite=True
            )
        env = os.environ | self.env | {WORKER: job.job_id}
        # A session of its own: what SLURM sends to the task comes once, through here.
        self._child = subprocess.Popen(self.command, env=env, start_new_session=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._pass_on)
        code = self._child.wait()
        if self._preempted and job.global_rank == 0:
            _requeue(job.job_id)
        return code

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        """SIGINT is what :meth:`SlurmWorker.stop` sends; SIGTERM comes from SLURM."""
        assert self._child is not None
        self._preempted = self._preempted or number == signal.SIGTERM
        self._child.send_signal(number)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Called by submitit at the time limit: stop in order, and come back."""
        if self._child is not None:
            self._child.send_signal(signal.SIGTERM)
            # Popen.wait is what the signal interrupted: it shall find the exit code there
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOWAIT)
        again: submitit.helpers.DelayedSubmission = _submitit().helpers.DelayedSubmission(
            Task(self.command, self.env)
        )
        return again


def _requeue(job: str) -> None:
    """Queue a job again that was preempted; one that was cancelled doesn't run any more."""
    ask = ["squeue", "--noheader", "--format=%T", f"--jobs={job}"]
    told = subprocess.run(ask, check=False, capture_output=True, text=True)
    if told.stdout.strip() == "RUNNING":
        subprocess.run(["scontrol", "requeue", job], check=False)


class SlurmWorker:
    """A job."""

    def __init__(self, job: submitit.Job[int], fleet: SlurmFleet) -> None:
        self.name, self._fleet, self._job = job.job_id, fleet, job.task(0)
        self._asked_to_stop = False

    @property
    def log(self) -> Path:
        return self._job.paths.stdout

    def poll(self) -> int | None:
        """A job that left the queue without a word was killed."""
        if self.name in self._fleet.queue():
            return None
        if not self._job.paths.result_pickle.exists():
            return KILLED
        try:
            return self._job.result()
        except Exception:  # of submitit's kinds, or what a half-written file gives
            return 1

    def stop(self, number: int) -> None:
        """The first time it may save a checkpoint; the second time it is cancelled."""
        how = [[]] if self._asked_to_stop else [["--state=PENDING"], ["--signal=INT"]]
        for options in how:  # a job that isn't in that state any more is no error here
            subprocess.run(["scancel", *options, self.name], check=False, capture_output=True)
        self._asked_to_stop = True


class SlurmFleet:
    """Workers on a cluster: an array of jobs.

    Args:
        command: of a worker.
        logs: folder for what jobs say, seen by all machines.
        stage: names the jobs.
        recipe: its section ``cluster`` says what a job is, ``compute`` how many processes it has.

    Raises:
        UsageError: submitit isn't installed, or this is no machine of a cluster.
    """

    def __init__(self, command: Sequence[str], logs: Path, stage: Stage, recipe: Recipe) -> None:
        try:
            submitit = _submitit()
        except ImportError:
            raise UsageError(
                "submitit isn't installed",
                where="--cluster slurm",
                do="pip install submitit; w2vrep's extra cluster brings it",
            ) from None
        for program in ("sbatch", "srun", "squeue", "scancel"):
            if shutil.which(program) is None:
                raise UsageError(
                    f"no {program} here",
                    where="--cluster slurm",
                    do="run it on a machine that submits jobs to SLURM",
                )
        cluster, processes = recipe.cluster, recipe.compute.processes
        options = cluster.model_dump(exclude={"max_timeouts", "gpus_per_node"})
        tasks = processes // cluster.nodes
        gpus = cluster.gpus_per_node
        if gpus is None and recipe.compute.device != "cpu":
            gpus = tasks
        options |= {
            "name": f"w2vrep-{stage}",
            "tasks_per_node": tasks,
            "gpus_per_node": gpus or None,
            "stderr_to_stdout": True,
            "slurm_setup": [
                f"export SUBMITIT_PREEMPT_SIGNAL={WARNING}",
                f"export SRUN_CPUS_PER_TASK={cluster.cpus_per_task}",  # srun takes no other word
                *cluster.slurm_setup,
            ],
            "slurm_additional_parameters": {
                "requeue": True,
                **cluster.slurm_additional_parameters,
            },
        }
        self._executor = submitit.AutoExecutor(
            logs / "slurm", cluster="slurm", slurm_max_num_timeout=cluster.max_timeouts
        )
        self._executor.update_parameters(**options)
        env = {STARTED: repr(time.time()), "OMP_NUM_THREADS": str(cluster.cpus_per_task)}
        if "OMP_NUM_THREADS" in os.environ:
            env["OMP_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"]
        self._task = Task(command, env)
        self._queue: set[str] = set()
        self._asked = 0.0

    def start(self, count: int) -> list[SlurmWorker]:
        from submitit.core.utils import FailedJobError

        try:
            jobs = self._executor.submit_array([self._task] * count)
        except FailedJobError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UsageError(
                f"the cluster takes no job: {reason}",
                where="cluster",
                do="--set cluster.KEY=VALUE; w2vrep show RECIPE lists the keys",
            ) from error
        self._asked = 0.0
        return [SlurmWorker(job, self) for job in jobs]

    def again(self, dead: Worker) -> SlurmWorker:
        return self.start(1)[0]

    def queue(self) -> set[str]:
        """Jobs of this user that wait or run; as it was while SLURM doesn't answer."""
        if time.monotonic() - self._asked > QUEUE_SECONDS or not self._asked:
            command = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if done.returncode == 0:
                self._queue = set(done.stdout.split())
                self._asked = time.monotonic()
        return self._queue
