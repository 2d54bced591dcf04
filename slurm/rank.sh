#!/bin/bash
# Started by srun once per rank: names the rank the way torch.distributed expects, then becomes the command.
# MASTER_ADDR comes from the batch script, which alone can ask Slurm for a node's address.
set -eu
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
export LOCAL_WORLD_SIZE=${SLURM_STEP_TASKS_PER_NODE%%(*} # such as 8(x2)
# Job ids are unique among running jobs and array tasks, step ids within a job, so two jobs on a node meet only if
# their ids differ by a multiple of 1250. Below 32768, where Linux starts to hand out ports to anybody.
export MASTER_PORT=$((12000 + (SLURM_JOB_ID * 16 + SLURM_STEP_ID % 16) % 20000))
# Through a pipe Python would keep its last lines to itself when it is killed. Not srun --unbuffered: it mixes the lines
# of different ranks.
export PYTHONUNBUFFERED=1
exec "$@"
