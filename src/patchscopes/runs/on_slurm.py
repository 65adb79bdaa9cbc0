"""The parts of a run as jobs of a Slurm cluster, an array of them. Nobody waits for them: `show` tells how far they are, and `resume` does
what they have left. A job that is preempted or runs out of time asks for another turn, and goes on where it was.

The run folder must be shared by all nodes, on a file system whose locks reach across them (NFS 4, Lustre with flock).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from patchscopes.core.errors import InputError, NotAvailableError
from patchscopes.runs.folder import open_run
from patchscopes.runs.parts import work_part


@dataclass(frozen=True)
class Part:
    """A part of a run as a job."""

    folder: str
    k: int
    n: int
    device: str | None = None
    threads: int | None = None
    failed: bool = False

    def __call__(self) -> dict[str, int]:
        """Work; the counts of the run as it is then."""
        return work_part(self.folder, self.k, self.n, device=self.device, threads=self.threads, failed=self.failed).counts

    def checkpoint(self) -> Any:
        """What to do after the time is up: the rest. Cells that have failed again are left."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(replace(self, failed=False))


def submit(
    which: str | Path,
    n: int,
    *,
    runs: str | Path = "runs",
    gpus: int = 0,
    cpus: int = 1,
    time: int = 60,
    partition: str | None = None,
    memory: float | None = None,
    failed: bool = False,
    more: Mapping[str, Any] | None = None,
    cluster: str = "slurm",
) -> list[str]:
    """Submit what is left of a run as N jobs; their ids. The files of the jobs are in the run folder, below slurm/.

    gpus, cpus  of each job
    time        of each, in minutes
    memory      of each, in GB
    more        further settings of sbatch: {"account": …, "qos": …}
    cluster     "slurm"; or "local", which starts the jobs on this machine

    NotAvailableError without submitit, or without Slurm; InputError if Slurm refuses.
    """
    if n < 1:
        raise InputError(f"found {n} jobs; expected 1 or more")
    try:
        import submitit
        from submitit.core.utils import FailedJobError
    except ImportError as e:
        raise NotAvailableError("submitit is not installed. Get it with: pip install 'patchscopes[slurm]'") from e
    run = open_run(which, runs=runs)
    try:
        executor = submitit.AutoExecutor(folder=run.path / "slurm", cluster=cluster)
    except RuntimeError as e:
        raise NotAvailableError(
            f"there is no Slurm on this machine: {e}. Other schedulers start the lines of --executor command"
        ) from e
    executor.update_parameters(name=f"patchscopes-{run.id}", timeout_min=time, cpus_per_task=cpus, gpus_per_node=gpus)
    if memory is not None:
        executor.update_parameters(mem_gb=memory)
    if cluster == "slurm":
        named = {f"slurm_{key}": value for key, value in (more or {}).items()}
        executor.update_parameters(**named, **({"slurm_partition": partition} if partition else {}))
    folder, device = str(run.path.absolute()), "cuda" if gpus else "cpu"
    try:
        with executor.batch():
            jobs = [executor.submit(Part(folder, k, n, device, cpus, failed)) for k in range(1, n + 1)]
    except FailedJobError as e:
        raise InputError(f"Slurm refused the jobs: {str(e).strip()}") from e
    return [job.job_id for job in jobs]
