#!/usr/bin/env bash
# Trains OpenMoE on this machine with one of the run files beside this script.
#   bash examples/openmoe/train.sh                                        the test size, 4 ranks, on a CPU too
#   MODEL=8b PLUGIN=ep_zero RANKS=8 bash examples/openmoe/train.sh        OpenMoE-8B on 8 GPUs
# What follows the script's name are fields of the run file: --train.batch=32 --optim.lr=2e-5
# Several machines: expertmesh launch --hostfile HOSTS --nproc-per-node 8 -- train FILE.toml
set -euo pipefail

MODEL=${MODEL:-test}        # test, base, 8b
PLUGIN=${PLUGIN:-ep_zero}   # ep, ep_zero, hybrid
if [ "$MODEL" = test ]; then RANKS=${RANKS:-4}; else RANKS=${RANKS:-8}; fi
PYTHON=${PYTHON:-python3}

cd "$(dirname "$0")/../.."
RUN_FILE=examples/openmoe/$MODEL-$PLUGIN.toml
if [ ! -f "$RUN_FILE" ]; then
  echo "error: there is no $RUN_FILE; MODEL is test, base or 8b, PLUGIN ep, ep_zero or hybrid," \
    "got MODEL=$MODEL PLUGIN=$PLUGIN" >&2
  exit 2
fi
# A CPU is shared by all ranks.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [ "$MODEL" = test ]; then set -- --run.device=cpu "$@"; fi
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$RANKS" \
  -m expertmesh train "$RUN_FILE" "$@"
