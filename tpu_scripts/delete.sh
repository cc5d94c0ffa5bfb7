#!/usr/bin/env bash
# Tears the slice down and takes its request out of the queue. The run directory on gs:// stays.
# Asks first, unless --yes.
#
#   tpu_scripts/delete.sh --project=P --zone=Z --name=N [--yes]
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse_flags "$@"

quiet=()
((YES)) && quiet=(--quiet)
run gcloud compute tpus queued-resources delete "$NAME" --project="$PROJECT" --zone="$ZONE" --force "${quiet[@]}"
