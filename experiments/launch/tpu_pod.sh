#!/bin/bash
# Trains on a TPU pod slice of 16 hosts with 4 chips each: tpu_pod.sh NAME ZONE MODEL DATA OUTPUT
# Every host has this package installed. MODEL, DATA and OUTPUT are on a file system that all hosts
# have mounted, such as Filestore. Run the same line again to resume.
set -eu

train="python -m experiments.finetune --distributed --mesh data=4,fsdp=16 --batch-size 64 \
    --dtype bfloat16 --model '$3' --data '$4' --data.streaming --steps 10000 \
    --checkpoint-every 200 --output '$5'"

# JAX finds coordinator, processes and chips in the metadata of the TPU.
gcloud compute tpus tpu-vm ssh "$1" --zone "$2" --worker=all --command "$train"
