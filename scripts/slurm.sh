#!/bin/bash
# Two machines of eight GPUs each. Queued again and again, the job goes on where it stopped:
# sbatch scripts/slurm.sh experiment=ddpo_vpscore_sdxl reward.checkpoint=FOLDER
#SBATCH --job-name=vp_rl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=SIGUSR1@300
# 300 s before the time limit every process gets SIGUSR1; callbacks.checkpoint.grace must be less.

# One folder for all processes, and for the job when it is started again: Hydra's own has the time in its name.
srun --kill-on-bad-exit=1 python train.py trainer=slurm resume=auto callbacks.checkpoint.grace=240 \
    hydra.run.dir="outputs/slurm-$SLURM_JOB_ID" "$@"
