#!/usr/bin/env bash
# Trains over a Slurm allocation: starts Ray on its nodes, runs a command on the first one, and stops Ray.
#
#   sbatch --nodes 2 --gpus-per-node 4 deploy/slurm.sh slrnet train --recipe voc_wsss --data /SHARED/voc \
#       --storage /SHARED/runs --num-workers 8 --name NAME --max-failures 3
#
# Submit it from the project's folder, which all nodes must see, as they must see data, runs and .venv (or PATH has
# `slrnet` and `ray`). sbatch's options add to those below and replace them. One task a node: Ray uses all its GPUs.
# Five minutes before the time limit Slurm sends SIGTERM, and the training saves; the same job with `--resume NAME`
# instead of `--recipe ... --name NAME` goes on. SLRNET_RAY_PORT (6379) must be free on the first node.
#
#SBATCH --job-name=slrnet
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --output=slrnet-%j.log
set -euo pipefail

if [ $# -eq 0 ]; then
    echo "usage: sbatch [OPTIONS] deploy/slurm.sh COMMAND, such as: slrnet train --recipe voc_wsss --data DIR" >&2
    exit 2
fi
if [ -z "${SLURM_JOB_NODELIST:-}" ]; then
    echo "deploy/slurm.sh runs inside a Slurm allocation; submit it with sbatch" >&2
    exit 2
fi
[ ! -d .venv/bin ] || PATH="$PWD/.venv/bin:$PATH"
for program in ray scontrol srun; do
    command -v "$program" > /dev/null || { echo "$program is not in PATH; run make, or load your site's module" >&2; exit 2; }
done

port=${SLRNET_RAY_PORT:-6379}
nodes=$SLURM_JOB_NUM_NODES
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
# The address of the network that the nodes share; a host name can lead to another one on each node.
address=$(srun --overlap --nodes 1 --ntasks 1 --nodelist "$head" hostname --ip-address | awk '{print $1; exit}')

# Ray's processes ask each other for this token, so other users of the nodes cannot run code in this job.
umask 077
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_ADDRESS="$address:$port"
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=${RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S:-60}
files=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/ray-$SLURM_JOB_ID # of this job; sockets need a short path on the node itself

# --block: Ray ends with its step, so nothing is left on the nodes.
srun --overlap --nodes 1 --ntasks 1 --nodelist "$head" \
    ray start --head --block --node-ip-address "$address" --port "$port" --temp-dir "$files" &
if [ "$nodes" -gt 1 ]; then
    # shellcheck disable=SC2016 # expands on the node
    srun --overlap --nodes $((nodes - 1)) --ntasks $((nodes - 1)) --ntasks-per-node 1 --exclude "$head" \
        bash -c 'for try in $(seq 60); do ray health-check --address "$RAY_ADDRESS" && break; sleep 5; done
            exec ray start --block --address "$RAY_ADDRESS" --temp-dir "$0"' "$files" &
fi
python - "$nodes" <<'WAIT'
import sys
import time

import ray

nodes, deadline = int(sys.argv[1]), time.monotonic() + 600
while True:
    try:
        ray.init(logging_level="ERROR")
        break
    except ConnectionError:
        if time.monotonic() > deadline:
            sys.exit("Ray does not start on the first node; the log above says why")
        time.sleep(5)
while (alive := sum(node["Alive"] for node in ray.nodes())) < nodes:
    if time.monotonic() > deadline:
        sys.exit(f"only {alive} of {nodes} nodes joined within ten minutes; the log above says why")
    time.sleep(2)
WAIT

echo "Ray runs on $nodes node(s), the first is $head ($RAY_ADDRESS); starting: $*"
"$@" &
command=$!
# Slurm's signal comes to this script alone (B:), and goes on to the command, which saves while Ray still runs.
trap 'kill -TERM "$command"' TERM
status=0
wait "$command" || status=$?
while kill -0 "$command" 2> /dev/null; do # the signal ended the wait, not the command
    status=0
    wait "$command" || status=$?
done
exit "$status"
