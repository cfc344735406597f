#!/bin/bash
# Reconstruct one focal series on several machines of a Slurm cluster:
#
#     sbatch slurm.sh STACK CONFIG.toml DIR [more options of depthprob reconstruct]
#
# One process a machine, since each holds the field; with GPUs one process for each of them, for instance
# --ntasks-per-node=4 --gpus-per-node=4. All must see the same files and the same version of everything.
# The first process alone writes: DIR, the state of NUTS beside it, and libraries in the cache. If one is lost, all end with an
# error; submitted again, sampling and library builds go on where they stopped.

#SBATCH --job-name=depthprob
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=02:00:00

set -euo pipefail
export DEPTHPROB_CACHE="${DEPTHPROB_CACHE:-$SLURM_SUBMIT_DIR/depthprob-cache}"
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY # processes of one cluster meet without them

srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    depthprob reconstruct "$1" --config "$2" -o "$3" --quiet --distributed "${@:4}"
