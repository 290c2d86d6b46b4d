#!/usr/bin/env bash
# Trains the networks of motion news on from where they stand, or goes on where it was stopped:
#     training/recipes/motion/train.sh CLIPS ALEXNET_FEATURES RIFE OUTPUT [FLAG …]
# CLIPS is a folder of video files, or crops:FOLDER of training.crop_cache (with --resolution 128); ALEXNET_FEATURES a
# safetensors file with torchvision's ImageNet AlexNet; RIFE what `madiff convert-rife` made of the published weights.
# `start` beside this file holds the weights that summary.csv ended with, but the hint model went on alone
# (summary_hints.csv: --hints_until 1), and the others on crops with OpenCV's hints (summary_crops.csv, summary_fine.csv;
# summary_flow.csv went on with plain flow, and was not kept), then on crops with flow by search (summary_search.csv:
# crop_cache --hint_source search), the denoiser's last layer from zero; then with latents at a sixteenth of the sides, first
# without a denoiser (summary_f16.csv: --latent_shares "[0,0.25,0.75]" --latent_weight 0), then with one, begun anew
# (summary_f16_denoiser.csv), beside a control without (summary_f16_control.csv). The former went on, by two processes
# (torchrun --nproc_per_node 2), on the same crops, their flow smoothed at its end (summary_smooth.csv), then with a fifth of them
# composed (summary_composed.csv; crop_cache --composed_share 0.2), then 12,800 samples more (summary_further.csv). At last, frames
# sampled by cubic convolution, the two finest scales and the last warp alone (summary_cubic.csv: --trained
# vqvae.decoder.warps.2,vqvae.decoder.warps.3,vqvae.decoder.head), the mean of before and after; and from that, the same parts
# with LPIPS of both networks (summary_both.csv: --lpips_weight 1.5 --lpips_vgg_weight 1.05 --easiness_power 0.35
# --latent_shares "[0,0.02,0.98]" --latent_weight 0 --flow_weight 0 --flow_weight_end 0; its lpips is AlexNet's and .7 of VGG's),
# the mean of before and after once more, which is madiff-fast's.
# Flags are those of training.train_sampler: on a GPU, --mixed_precision bf16 --train_batch_size 160 --learning_rate 1.2e-3.
set -eu
[ $# -ge 4 ] || { sed -n 2,19p "$0" | cut -c3- >&2; exit 2; }
recipe=$(cd "$(dirname "$0")" && pwd)
case $1 in
    crops:*) data=crops:$(realpath "${1#crops:}") ;;
    *) data=videos:$(realpath "$1") ;;
esac
features=$(realpath "$2") teacher=$(realpath "$3") out=$(realpath -m "$4")
cd "$recipe/../../.."
exec python -m training.train_sampler --config motion --data "$data" --output_dir "$out" --init "$recipe/start" \
    --teacher "$teacher" --lpips_backbone "$features" --lpips_from 0 --denoised_from 0 --two_steps_from 0 --begin_codes true "${@:5}"
