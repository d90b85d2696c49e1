#!/bin/bash
# Trains on 4 nodes of 8 GPUs with SLURM, one process a GPU: sbatch slurm.sh MODEL DATA OUTPUT
# MODEL and OUTPUT must be on a file system that all nodes see. Submit the same line again to resume.
#SBATCH --job-name=tptt
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
# Five minutes before the end, time for a last checkpoint.
#SBATCH --signal=TERM@300

# JAX finds coordinator, processes and devices in SLURM's variables. A process that waits for a
# proxy never finds the others.
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY

srun --kill-on-bad-exit=1 python -m experiments.finetune --distributed \
    --mesh data=4,fsdp=8 --batch-size 64 --dtype bfloat16 \
    --model "$1" --data "$2" --data.streaming --steps 10000 --checkpoint-every 200 --output "$3"
