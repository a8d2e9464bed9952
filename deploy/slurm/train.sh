#!/usr/bin/env bash
# A training run on Slurm: Ray on all nodes of the allocation, the driver on the first.
#
#   sbatch deploy/slurm/train.sh configs/finetune_gpt2_xl.py --data_dir=/shared/data --out_dir=/shared/runs/mine
#
# Submit from a clone on a file system that all nodes share, with the environment in .venv. Nodes that are taken away
# cost nothing while the first one stays; when that is gone, or the time is up, Slurm queues the job again, and the same
# command goes on.
#SBATCH --job-name=nanogpt
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=60G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
# SIGTERM to this script five minutes before the end, for the run to save itself:
#SBATCH --signal=B:TERM@300

set -euo pipefail
cd "${SLURM_SUBMIT_DIR}"
# shellcheck source=/dev/null
. .venv/bin/activate

mapfile -t hosts < <(scontrol show hostnames "${SLURM_JOB_NODELIST}")
address="${hosts[0]}:$((20000 + SLURM_JOB_ID % 10000))" # two jobs may share a node
# Whoever does not know the secret is turned away. It passes through the environment, not through a command line.
RAY_AUTH_TOKEN="$(python -c 'import secrets; print(secrets.token_hex(32))')"
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token
# A dead node is noticed in some 5 s instead of 20 s; shorter gives false alarms on busy nodes.
export RAY_health_check_initial_delay_ms=1000 RAY_health_check_period_ms=1000
export RAY_health_check_timeout_ms=2000 RAY_health_check_failure_threshold=3

log="ray-${SLURM_JOB_ID}.log"
each=(--num-cpus="${SLURM_CPUS_PER_TASK:-1}" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --object-store-memory=1000000000)
ray start --head --block --port="${address##*:}" --include-dashboard=false "${each[@]}" > "${log}" 2>&1 &
head=$!
for host in "${hosts[@]:1}"; do # one step each, so that a lost node ends no other
    srun --overlap --nodes=1 --ntasks=1 --nodelist="${host}" \
        ray start --block --address="${address}" "${each[@]}" >> "${log}" 2>&1 &
done
export RAY_ADDRESS="${address}"
python - "${#hosts[@]}" << 'END' # waits for all nodes, or for those that come within two minutes
import os, socket, sys, time
import ray

until, (host, port) = time.monotonic() + 120, os.environ["RAY_ADDRESS"].split(":")
while time.monotonic() < until:
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
        break
    except OSError:
        time.sleep(0.5)
ray.init(logging_level="ERROR")
while time.monotonic() < until and sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]):
    time.sleep(0.5)
END

python -m orchestrator train "$@" &
driver=$!
is_told=false
trap 'is_told=true; kill -TERM "${driver}"' TERM
code=0
wait "${driver}" || code=$?
while kill -0 "${driver}" 2> /dev/null; do # a signal ends `wait`, not the driver
    code=0
    wait "${driver}" || code=$?
done
kill -KILL "${head}" 2> /dev/null || true # its nodes end with it
# Stopped by Slurm, or the cluster is lost. Not by a mistake, such as GPUs that PyTorch cannot use: that is code 2.
if ${is_told} || [ "${code}" -eq 3 ]; then
    scontrol requeue "${SLURM_JOB_ID}"
fi
exit "${code}"
