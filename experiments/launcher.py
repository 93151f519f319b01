"""The processes of a run, from flags or from what the launcher left in the environment."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The other processes of a run. Slurm (srun), Open MPI and TPU pods say all of it."""

    coordinator: str = ""
    """HOST:PORT of process 0, any free port; count and index go with it."""
    count: int | None = None
    """Processes; 1: this one alone, whatever the environment says."""
    index: int | None = None
    """Which of them this is, from 0."""
    detect: bool = False
    """Ask JAX where the others are, for a cluster that shows nothing in the environment."""
    timeout: int = 300
    """Seconds to wait for the others to start."""
    silence: int = 60
    """Seconds after which a process that is not heard of counts as dead, and the run ends."""

    def __post_init__(self):
        for name, least in {"count": 1, "index": 0, "timeout": 1, "silence": 1}.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"hosts.{name}={value}; it must be at least {least}")
        host, _, port = self.coordinator.rpartition(":")
        if self.coordinator and not (host and port.isascii() and port.isdigit()):
            raise ValueError(f"hosts.coordinator={self.coordinator!r} is not HOST:PORT")
        if not self.coordinator and ((self.count or 1) > 1 or self.index):
            raise ValueError(
                f"hosts.count={self.count} and hosts.index={self.index} without hosts.coordinator"
            )
        if self.count is not None and (self.index or 0) >= self.count:
            raise ValueError(f"hosts.index={self.index} is not one of hosts.count={self.count}")


def launcher(environment: Mapping[str, str]) -> str:
    """What started more than one process, as the environment shows it: slurm, ompi, tpu or ""."""
    # a batch script has SLURM_NTASKS too, and is alone; only srun's tasks have a node list
    if "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1:
        return "slurm"
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "ompi"
    names = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    if "," in names or int(environment.get("MEGASCALE_NUM_SLICES") or 1) > 1:
        return "tpu"
    return ""


RANKS = {
    "slurm": ("SLURM_NTASKS", "SLURM_PROCID"),
    "ompi": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
}


def arguments(hosts: Hosts, environment: Mapping[str, str]) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` is given; None for a run of one process."""
    by = launcher(environment)
    if hosts.count == 1 or not (by or hosts.coordinator or hosts.detect):
        return None
    given: dict[str, Any] = {}
    if hosts.coordinator:
        names = RANKS.get(by, ("", ""))
        ranks = [hosts.count, hosts.index]
        for i, name in enumerate(names):
            if ranks[i] is None and name in environment:
                ranks[i] = int(environment[name])
        if None in ranks:
            raise ValueError(
                f"hosts.coordinator={hosts.coordinator!r} needs hosts.count and hosts.index"
            )
        given = {"coordinator_address": hosts.coordinator}
        given |= {"num_processes": ranks[0], "process_id": ranks[1]}
        if by not in RANKS:  # those two also say which GPU is this process's
            given["cluster_detection_method"] = "deactivate"
    elif by == "ompi" and "OMPI_MCA_orte_hnp_uri" not in environment:
        raise ValueError("this Open MPI does not say where process 0 is: give --hosts.coordinator")
    return given
