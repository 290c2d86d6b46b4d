#!/usr/bin/env bash
# Trains the four autoencoders by which events are judged, then goes on with the one on events alone, and its denoiser: madiff-events.
#     training/recipes/madiff-events/train.sh CLIPS ALEXNET_FEATURES OUTPUT
# CLIPS is a folder of video files; ALEXNET_FEATURES a safetensors file with torchvision's ImageNet AlexNet. Each stage takes one CPU core, and goes on
# where it was stopped. The tables beside this file are the summary.csv that each left in OUTPUT. The image-to-event generator is that of madiff-compact.
set -eu
[ $# = 3 ] || { sed -n 2,5p "$0" | cut -c3- >&2; exit 2; }
recipe=$(cd "$(dirname "$0")" && pwd)
clips=$(realpath "$1") features=$(realpath "$2") out=$(realpath -m "$3")
cd "$recipe/../../.."
export OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true
i2e=madiff_diffusers/checkpoints/madiff-compact/i2e

stage() { # stage NAME MODULE FLAG …
    python -m "training.$2" --output_dir "$out/$1" --data "$clips" --dataloader_num_workers 0 "${@:3}"
}

# 1. Equal seeds, samples and sizes: flow, flow and events, flow and the events of a generator that nothing has trained, events alone.
[ -d "$out/untrained" ] || python - "$recipe/events.yaml" "$out/untrained" <<'PYTHON'
import sys

import torch
import yaml

from madiff_diffusers import EventGANModel

torch.manual_seed(0)
EventGANModel(**yaml.safe_load(open(sys.argv[1]))["i2e"]).save_pretrained(sys.argv[2])
PYTHON
same=(--lpips_backbone "$features" --seed 3)
stage flow train_vq_magan --config "$recipe/flow.yaml" "${same[@]}"
stage both train_vq_magan --config "$recipe/both.yaml" --i2e "$i2e" "${same[@]}"
stage control train_vq_magan --config "$recipe/both.yaml" --i2e "$out/untrained" "${same[@]}"
stage events train_vq_magan --config "$recipe/events.yaml" --i2e "$i2e" "${same[@]}"
