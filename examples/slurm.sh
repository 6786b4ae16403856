#!/usr/bin/env bash
# Trains on the nodes of a Slurm allocation, one torchrun per node:
#   sbatch --nodes=4 --gpus-per-node=8 examples/slurm.sh run.toml --mesh.ep=8
# If a rank dies, all start again from the last good checkpoint, up to three times. Slurm's SIGTERM
# reaches the ranks two minutes before the time is up; they save, and the same command continues.
#SBATCH --job-name=expertmesh
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=%x-%j.out
set -euo pipefail

if [ $# -eq 0 ]; then
  echo "usage: sbatch [options] examples/slurm.sh RUN.toml [--section.key=value ...]" >&2
  exit 2
fi

# The first node is where all meet. The port differs between jobs that share nodes.
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export RDZV_HOST=${nodes%%$'\n'*}
export RDZV_PORT=$((20000 + SLURM_JOB_ID % 20000))
export NPROC=${SLURM_GPUS_ON_NODE:-1}

# The inner quotes are opened on each node, where SLURM_NODEID is that node's number.
# shellcheck disable=SC2016
srun --ntasks-per-node=1 --kill-on-bad-exit=1 --output="%x-%j-node%n.out" bash -c '
  exec torchrun \
    --nnodes="$SLURM_NNODES" \
    --nproc-per-node="$NPROC" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$RDZV_HOST:$RDZV_PORT" \
    --rdzv-conf="is_host=$((SLURM_NODEID == 0))" \
    --rdzv-id="$SLURM_JOB_ID" \
    --max-restarts=3 \
    --tee=3 \
    -m expertmesh train "$@"
' torchrun "$@"
