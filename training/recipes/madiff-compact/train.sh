#!/usr/bin/env bash
# Trains madiff-compact from nothing on two CPU cores, or goes on where it was stopped:
#     training/recipes/madiff-compact/train.sh CLIPS ALEXNET_FEATURES OUTPUT
# CLIPS is a folder of video files, those that clips.tsv names; ALEXNET_FEATURES a safetensors file with torchvision's ImageNet AlexNet. The tables
# beside this file are the summary.csv that each stage left in OUTPUT.
set -eu
[ $# = 3 ] || { sed -n 2,5p "$0" | cut -c3- >&2; exit 2; }
recipe=$(cd "$(dirname "$0")" && pwd)
clips=$(realpath "$1") features=$(realpath "$2") out=$(realpath -m "$3")
cd "$recipe/../../.."
export OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true

# stage PART: one process. A part that is there already was finished before.
stage() { [ -d "$out/$1" ] || python -m "${@:2}" --output_dir "$out/${1%%/*}" --data "$clips" --dataloader_num_workers 1; }
two() { # two processes, of which each has a core
    [ -d "$out/$1" ] || accelerate launch --multi_gpu --num_machines 1 --num_processes 2 --mixed_precision no --dynamo_backend no \
        -m "${@:2}" --output_dir "$out/${1%%/*}" --data "$clips" --dataloader_num_workers 1
}

# 1. Events.
stage i2e/i2e training.train_i2e --config "$recipe/base.yaml" --max_train_steps 3000 --squared_until 0.5 --adversarial_weight 0

# 2. The autoencoder on coarser flow, up to where this run was broken off: its schedule is that of 9000 steps.
stage vqvae_base/checkpoints/step_00007536 training.train_vq_magan --config "$recipe/base.yaml" --i2e "$out/i2e/i2e" \
    --lpips_backbone "$features" --max_train_steps 9000 --stop_step 7536 --lpips_start 2000 --hint_probability 0.7 --guess_share 0.8 --guess_rounds 3

# 3. The same on finer flow, with a last warp that sees both sides; broken off in the same way.
fine=(--i2e "$out/i2e/i2e" --lpips_backbone "$features" --train_batch_size 6 --resolution 160 --lpips_start 0 --hint_probability 0.7 --guess_share 1.0
    --guess_rounds 2 --flow_weight 0 --flow_weight_end 0 --ema_decay 0.999 --revive_every 200 --begin_codes true --checkpointing_steps 50 --log_steps 10)
two vqvae_fine/checkpoints/step_00000432 training.train_vq_magan --config "$recipe/fine.yaml" "${fine[@]}" --seed 1 \
    --init "$out/vqvae_base/checkpoints/step_00007536/vqvae" --max_train_steps 1100 --stop_step 432 --learning_rate 2.5e-4 --lr_warmup_steps 100 \
    --lpips_weight 0.3

# 4. Still pixels are kept as they are, which leaves room for a higher weight of LPIPS.
two vqvae/vqvae training.train_vq_magan --config compact "${fine[@]}" --seed 2 \
    --init "$out/vqvae_fine/checkpoints/step_00000432/vqvae" --max_train_steps 620 --learning_rate 2.2e-4 --lr_warmup_steps 30 --lpips_weight 0.5

# 5. The denoiser, and the pipeline: OUTPUT/unet/pipeline.
two unet/pipeline training.train_denoiser --config compact --i2e "$out/i2e/i2e" --vqvae "$out/vqvae/vqvae" --train_batch_size 4 \
    --guess_share 0 --max_train_steps 450 --log_steps 5
