#!/usr/bin/env bash
# Trains the four autoencoders by which events are judged, goes on with the one on events alone, then trains madiff-events, whose pipeline is
# OUTPUT/unet/pipeline, and goes on with the autoencoder that ships from other start hints, without the changes of its schedule (training/EXPERIMENTS.md, "Events, beside flow and alone" and what follows it):
#     training/recipes/events/train.sh CLIPS ALEXNET_FEATURES OUTPUT
# CLIPS is a folder of video files; ALEXNET_FEATURES a safetensors file with torchvision's ImageNet AlexNet. The first four take one CPU core each, the
# others two; all go on where they were stopped. The tables beside this file are the summary.csv that each left in OUTPUT. The image-to-event generator
# is that of madiff-compact.
set -eu
[ $# = 3 ] || { sed -n 2,7p "$0" | cut -c3- >&2; exit 2; }
recipe=$(cd "$(dirname "$0")" && pwd)
clips=$(realpath "$1") features=$(realpath "$2") out=$(realpath -m "$3")
cd "$recipe/../../.."
export OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true
i2e=madiff_diffusers/checkpoints/madiff-compact/i2e

launch="python -m"

stage() { # stage NAME FLAG …
    $launch training.train_vq_magan --output_dir "$out/$1" --data "$clips" --lpips_backbone "$features" --seed 3 --dataloader_num_workers 0 "${@:2}"
}

# Equal seeds, samples and sizes: flow, flow and events, flow and the events of a generator that nothing has trained, events alone.
[ -d "$out/untrained" ] || python - "$recipe/events.yaml" "$out/untrained" <<'PYTHON'
import sys

import torch
import yaml

from madiff_diffusers import EventGANModel

torch.manual_seed(0)
EventGANModel(**yaml.safe_load(open(sys.argv[1]))["i2e"]).save_pretrained(sys.argv[2])
PYTHON
stage flow --config "$recipe/flow.yaml"
stage both --config "$recipe/both.yaml" --i2e "$i2e"
stage control --config "$recipe/both.yaml" --i2e "$out/untrained"
stage events --config "$recipe/events.yaml" --i2e "$i2e"

# Events alone on true hints that are never dropped, then on some from guesses, by two processes.
only=(--config "$recipe/events.yaml" --i2e "$i2e" --learning_rate 8e-4 --flow_weight 1 --flow_weight_end 0.3 --lpips_start 0
    --begin_codes true)
stage events_true "${only[@]}" --init "$out/events/vqvae" --seed 4 --max_train_steps 700 --hint_probability 1 --guess_share 0 --lpips_weight 0.3
launch="torchrun --nproc_per_node 2 -m"
stage events_guess "${only[@]}" --init "$out/events_true/vqvae" --seed 5 --max_train_steps 520 --hint_probability 0.9 --guess_share 0.3 --lpips_weight 0.5 \
    --lr_warmup_steps 30

# madiff-events, from nothing, by two processes: its autoencoder, then its denoiser and the pipeline.
stage vqvae --config "$recipe/madiff-events.yaml" --i2e "$i2e" --seed 6
$launch training.train_denoiser --output_dir "$out/unet" --data "$clips" --seed 9 --dataloader_num_workers 0 --config "$recipe/madiff-events.yaml" \
    --i2e "$i2e" --vqvae "$out/vqvae/vqvae"

# The autoencoder that ships, with start hints from the neighbours.
stage between --config "$recipe/madiff-events-between.yaml" --i2e "$i2e" --seed 10 --init "$recipe/madiff-events/vqvae" --begin_codes true
