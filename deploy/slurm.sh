#!/bin/bash
#SBATCH --job-name=headwater
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=4
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#
# A training of 8 workers on 4 servers: sbatch deploy/slurm.sh train.py
#
# The batch script's own node runs the coordinator, so a requeued job has another address. It begins as a new
# cluster from the last checkpoint (HEADWATER_RESUME), without a journal. Ports must be open between the nodes;
# servers take free ones. The token is a file that you alone can read.
set -euo pipefail

script=${1:?which script? sbatch deploy/slurm.sh train.py}
workers=${WORKERS:-8} servers=${SERVERS:-4} port=${PORT:-7000}
export HEADWATER_COORDINATOR="tcp:$(hostname):$port"
export HEADWATER_TOKEN_FILE=${HEADWATER_TOKEN_FILE:-$HOME/headwater.token}
export HEADWATER_CHECKPOINT=${HEADWATER_CHECKPOINT:-${SCRATCH:-$PWD}/runs} HEADWATER_RESUME=1

headwater serve coordinator --bind "0.0.0.0:$port" --workers "$workers" --servers "$servers" &
coordinator=$!
trap 'kill -TERM $coordinator' TERM # before the time limit: a last checkpoint

# A node that has lost its place ends with 75 and is started again; any other end is one.
srun --overlap --ntasks="$servers" --kill-on-bad-exit=0 bash -c '
    until headwater serve server --bind 0.0.0.0; do code=$?; [ $code = 75 ] || exit $code; done' &
srun --overlap --ntasks="$workers" --kill-on-bad-exit=0 bash -c '
    until headwater serve worker "$0" --rank "$SLURM_PROCID"; do code=$?; [ $code = 75 ] || exit $code; done
    ' "$script" &

# A signal ends the first wait, and the coordinator then writes its checkpoint.
wait $coordinator && code=0 || code=$?
if kill -0 $coordinator 2>/dev/null; then wait $coordinator && code=0 || code=$?; fi
exit "$code"
