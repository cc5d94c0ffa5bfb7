#!/usr/bin/env bash
# Asks Google Cloud for a TPU slice through the queue (spot or on-demand) and returns at once.
#
#   tpu_scripts/create.sh --project=P --zone=us-west4-a --accelerator-type=v6e-8 [--on-demand]
#
# Next: tpu_scripts/wait.sh
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse_flags "$@"

version="$(runtime_version)"
read -ra flags <<<"$CREATE_FLAGS"
((SPOT)) && flags+=(--spot)
[[ -n "$SERVICE_ACCOUNT" ]] && flags+=("--service-account=$SERVICE_ACCOUNT")

run gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --project="$PROJECT" --zone="$ZONE" \
  --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$version" "${flags[@]}"
