#!/usr/bin/env bash
# TPU slices of a GKE cluster, as a JobSet that xpk writes.
#
#   launch/gke_xpk.sh [--dry_run] [OPTION VALUE …] [COMMAND] ARGUMENTS…
#
#   --cluster NAME          made by xpk cluster create (needed)
#   --image IMAGE           in a registry the cluster reads from (needed)
#   --project P, --zone Z   of Google Cloud (default: what gcloud is set to)
#   --name NAME             of the workload, free again after --do delete (default:
#                           safetydpo)
#   --type TYPE             of a slice (default: v5litepod-16)
#   --slices N              default: 1
#   --restarts N            of the whole job, when a host is lost (default: 10)
#   --do STEPS              of build,attach,run,delete (default: build,attach,run)
#
# Arguments with gs://BUCKET/… are read and written through GKE's mount of the bucket.
# A run that is told to stop saves and ends with 143, one that broke on a host, or lost
# one, with 134: xpk starts all hosts again, and they go on from what was saved.
#
# example:
#   launch/gke_xpk.sh --cluster tpus --image REGISTRY/safetydpo \
#     --config configs/hate.py:sd15 --workdir gs://bucket/runs/hate \
#     --config.cache=gs://bucket/cache --config.accumulation=1

set -euo pipefail
options='cluster image project zone name type slices restarts do'
cluster='' image='' project='' zone='' name=safetydpo type=v5litepod-16
slices=1 restarts=10 do=build,attach,run
# shellcheck source=launch/arguments.sh
source "$(dirname "$0")/arguments.sh"
read_arguments "$@"

[[ -n $cluster ]] || fail "--cluster is missing: the name of a cluster made by xpk"
[[ -n $image ]] || fail "--image is missing: where the container is pushed to"
for one in ${do//,/ }; do
  [[ " build attach run delete " == *" $one "* ]] ||
    fail "--do has $one; expected some of build,attach,run,delete"
done
does() { [[ ,$do, == *,$1,* ]]; }

place=(--cluster "$cluster")
[[ -z $project ]] || place+=(--project "$project")
[[ -z $zone ]] || place+=(--zone "$zone")
# The image's user; a mount is root's and closed to others unless it is told.
owner=implicit-dirs,uid=1000,gid=1000,file-mode=664,dir-mode=775
owner+=,rename-dir-limit=100000,metadata-cache-ttl-secs=0
mapfile -t buckets < <(printf '%s\n' "${words[@]}" | grep -o 'gs://[^/ ]*' | sort -u)

if does build; then
  step docker build --file launch/Dockerfile.tpu --tag "$image" .
  step docker push "$image"
fi

if does attach; then
  for bucket in "${buckets[@]#gs://}"; do
    step xpk storage attach "${bucket//[._]/-}" "${place[@]}" --type gcsfuse \
      --bucket "$bucket" --mount-point "$mount_point/$bucket" --size 1 \
      --readonly false --auto-mount true --mount-options "$owner"
  done
fi

# xpk passes SIGTERM to the shell of --command, so that shell must become the run.
if does run; then
  mounted
  variables=(PYTHONUNBUFFERED=1)
  ((${#buckets[@]} == 0)) ||
    variables+=("JAX_COMPILATION_CACHE_DIR=$mount_point/${buckets[0]#gs://}/jax-cache")
  step xpk workload create --workload "$name" "${place[@]}" --tpu-type "$type" \
    --num-slices "$slices" --max-restarts "$restarts" --docker-image "$image" \
    --command "cd /app && exec $(quoted env "${variables[@]}" "${words[@]}")"
fi

if does delete; then
  step xpk workload delete --workload "$name" "${place[@]}"
fi
