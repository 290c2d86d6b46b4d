#!/bin/bash
# Four nodes of eight GPUs; the arguments are the module and its options:
#
#     sbatch training/accelerate/slurm.sh training.train_vq_magan --config paper --data … --i2e … --output_dir …
#
# Two minutes before its time is over, and when it is preempted, the job gets SIGTERM and saves, for which its launchers leave it
# 30 seconds; it is then queued again, and the same command resumes.
#SBATCH --job-name=madiff
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.log
set -u
MAIN_PROCESS_IP=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MAIN_PROCESS_IP
GPUS=$((SLURM_NNODES * SLURM_GPUS_ON_NODE))
export GPUS
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
LOG="${SLURM_JOB_NAME}_${SLURM_JOB_ID}.log"
BEFORE=$(stat -c %s "$LOG" 2>/dev/null || echo 0)
srun bash -c 'exec accelerate launch --config_file training/accelerate/multi_node.yaml --num_machines "$SLURM_NNODES" \
    --num_processes "$GPUS" --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN_PROCESS_IP" -m "$@"' madiff "$@"
status=$?
# Interrupted, not failed: launchers report a child's 143 as 1, so that what this start has logged decides.
if [ "$status" -ne 0 ] && tail -c "+$((BEFORE + 1))" "$LOG" | grep -q "^stopped by SIGTERM"; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
