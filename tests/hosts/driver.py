"""Launches any program on hosts, as ``expertmesh launch`` does training.

``python -m tests.hosts.driver SSH HOSTS LOG_DIR PATIENCE PROGRAM...``: two ranks on each host.
"""

import os
import shlex
import sys
from pathlib import Path

from expertmesh.launch.hosts import Host
from expertmesh.launch.job import Job, Rendezvous
from expertmesh.launch.logs import Logs
from expertmesh.launch.place import OverSSH
from expertmesh.launch.supervise import run_job


def main(ssh: str, names: str, log_dir: str, patience: str, *program: str) -> int:
    places = tuple(OverSSH(name, shlex.split(ssh)) for name in names.split(","))
    job = Job(
        program=program,
        hosts=tuple(Host(name=place.name, num_processes=2) for place in places),
        places=places,
        folder=os.getcwd(),
        rendezvous=Rendezvous(port=29500),
        patience=float(patience),
    )
    with Logs(Path(log_dir), sys.stdout) as logs:
        outcome = run_job(job, logs)
    for failure in outcome.failures:
        print(failure)
    return len(outcome.failures)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
