#!/usr/bin/env bash
# One machine with one or more GPUs, with the environment at hand or in a container.
#
#   launch/gpu.sh [--dry_run] [OPTION VALUE …] [COMMAND] ARGUMENTS…
#
#   --devices 0,1           the GPUs to use (default: all)
#   --compile_cache DIR     what was compiled once (default: ~/.cache/safetydpo_jax)
#   --image IMAGE           run in this container, made by
#                           docker build -f launch/Dockerfile.cuda -t IMAGE .
#                           It sees this folder alone: the model must lie in it
#
# example:
#   launch/gpu.sh --config configs/hate.py:sd15 --workdir runs/hate \
#     --config.cache=cache

set -euo pipefail
options='devices compile_cache image'
devices='' image=''
compile_cache=$HOME/.cache/safetydpo_jax
# shellcheck source=launch/arguments.sh
source "$(dirname "$0")/arguments.sh"
read_arguments "$@"

variables=("JAX_COMPILATION_CACHE_DIR=$compile_cache")
[[ -z $devices ]] || variables+=("CUDA_VISIBLE_DEVICES=$devices")

if [[ -z $image ]]; then
  step env "${variables[@]}" "${words[@]}"
else
  # HF_TOKEN goes by its name: its value stays out of command lines.
  step mkdir -p "$compile_cache"
  step docker run --rm --init --gpus all --user "$(id -u):$(id -g)" \
    --volume "$PWD:/data" --workdir /data --volume "$compile_cache:$compile_cache" \
    --env HOME=/tmp --env PYTHONPATH=/app --env HF_TOKEN \
    "${variables[@]/#/--env=}" "$image" "${words[@]}"
fi
