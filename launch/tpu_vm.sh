#!/usr/bin/env bash
# A TPU slice as VMs: asks for it, installs this checkout on every host, runs a command.
#
#   launch/tpu_vm.sh [--dry_run] [OPTION VALUE …] [COMMAND] ARGUMENTS…
#
#   --name NAME             of the slice (default: safetydpo)
#   --project P, --zone Z   of Google Cloud (default: what gcloud is set to)
#   --type TYPE             of the slice (default: v5litepod-16)
#   --runtime VERSION       of the VMs (default: v2-alpha-tpuv5-lite, for v5e)
#   --provision HOW         spot, or on_demand (default), as far as there is quota
#   --network NET           default: default
#   --do STEPS              of create,install,run,delete (default: create,install,run)
#
# Arguments with gs://BUCKET/… are read and written through a mount of the bucket on
# every host; the slice's service account needs to be allowed to. A run that was stopped
# goes on with --do run. A spot slice that was taken away keeps its name: --do delete, then
# the same command. The run ends with this terminal: start it in tmux, on a machine that
# stays. gcloud reaches all hosts through ssh-agent: ssh-add ~/.ssh/google_compute_engine
#
# example:
#   launch/tpu_vm.sh --zone us-west4-a --config configs/hate.py:sd15 \
#     --workdir gs://bucket/runs/hate --config.cache=gs://bucket/cache \
#     --config.accumulation=1

set -euo pipefail
options='name project zone type runtime provision network do'
name=safetydpo project='' zone='' type=v5litepod-16 runtime=v2-alpha-tpuv5-lite
provision=on_demand network=default do=create,install,run
# shellcheck source=launch/arguments.sh
source "$(dirname "$0")/arguments.sh"
read_arguments "$@"

[[ $provision == spot || $provision == on_demand ]] ||
  fail "--provision is $provision; expected spot or on_demand"
for one in ${do//,/ }; do
  [[ " create install run delete " == *" $one "* ]] ||
    fail "--do has $one; expected some of create,install,run,delete"
done
does() { [[ ,$do, == *,$1,* ]]; }

place=()
[[ -z $project ]] || place+=(--project "$project")
[[ -z $zone ]] || place+=(--zone "$zone")
tpus=(gcloud compute tpus)
on_hosts() {
  step "${tpus[@]}" tpu-vm ssh "$name" "${place[@]}" --worker all --command "$1"
}

if does create; then
  asked=()
  [[ $provision != spot ]] || asked+=(--spot)
  step "${tpus[@]}" queued-resources create "$name" --node-id "$name" "${place[@]}" \
    --accelerator-type "$type" --runtime-version "$runtime" --network "$network" \
    --scopes https://www.googleapis.com/auth/cloud-platform "${asked[@]}"
  look=("${tpus[@]}" queued-resources describe "$name" "${place[@]}"
    --format 'value(state.state)')
  if [[ -n $dry_run ]]; then
    step "${look[@]}"
  else
    silent=0
    while :; do
      state=$("${look[@]}") && silent=0 || silent=$((silent + 1))
      [[ $state != ACTIVE ]] || break
      printf '%s: %s\n' "$name" "${state:-gcloud says nothing of it}" >&2
      [[ $state != FAILED && $state != SUSPENDED ]] ||
        fail "$name is $state: delete it (--do delete) and ask again, in another zone" \
          "or for another --type"
      ((silent < 5)) ||
        fail "gcloud says nothing of $name, which may still be waited for and cost" \
          "money: --do delete, or --do install,run when it is there"
      sleep "${WAIT_SECONDS:-30}"
    done
  fi
fi

if does install; then
  archive=${TMPDIR:-/tmp}/$name-checkout.tar.gz
  step git archive --format tar.gz --output "$archive" HEAD
  step "${tpus[@]}" tpu-vm scp "$archive" "$name:checkout.tar.gz" "${place[@]}" --worker all
  # The VMs' own Python is too old; uv brings one.
  on_hosts 'set -e
    mkdir -p checkout && tar -xzf checkout.tar.gz -C checkout && cd checkout
    python3 -m pip install --quiet --user uv
    ~/.local/bin/uv venv --quiet --allow-existing --python 3.11 ~/environment
    ~/.local/bin/uv pip install --quiet --python ~/environment/bin/python \
      --constraint constraints/py311.txt --editable . "jax[tpu]"'
fi

if does run; then
  mapfile -t buckets < <(printf '%s\n' "${words[@]}" | grep -o 'gs://[^/ ]*' | sort -u)
  for bucket in "${buckets[@]#gs://}"; do
    [[ $bucket =~ ^[a-z0-9._-]+$ ]] || fail "gs://$bucket is no bucket"
    # Checkpoints are renamed when they are complete: a folder of many objects. And no
    # host may believe for a minute that what another has just written is not there.
    on_hosts "set -e
    where=$mount_point/$bucket
    command -v gcsfuse >/dev/null || {
      echo \"deb https://packages.cloud.google.com/apt gcsfuse-\$(lsb_release -cs) main\" |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
      curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg |
        sudo tee /etc/apt/trusted.gpg.d/gcsfuse.asc >/dev/null
      sudo apt-get -qq update
      sudo apt-get -qq -o DPkg::Lock::Timeout=300 install -y gcsfuse
    }
    sudo mkdir -p \$where && sudo chown \$USER \$where
    mountpoint -q \$where ||
      gcsfuse --implicit-dirs --rename-dir-limit 100000 --metadata-cache-ttl-secs 0 \
        $bucket \$where"
  done
  mounted
  cache=.cache/jax  # of each host, in its checkout
  ((${#buckets[@]} == 0)) || cache=$mount_point/${buckets[0]#gs://}/jax-cache
  remote=$(quoted env "JAX_COMPILATION_CACHE_DIR=$cache" "PYTHONUNBUFFERED=1")
  on_hosts "cd checkout && $remote ~/environment/bin/python $(quoted "${words[@]:1}")"
fi

if does delete; then
  step "${tpus[@]}" queued-resources delete "$name" "${place[@]}" --force --quiet
fi
