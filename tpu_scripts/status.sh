#!/usr/bin/env bash
# Prints the state of the slice and, when it is up, of the training process on each worker:
# "running", the exit code it ended with, "lost" (died without one) or "absent" (never started).
#
#   tpu_scripts/status.sh --project=P --zone=Z --name=N
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse_flags "$@"

state="$(slice_state)"
echo "slice $NAME: $state"
[[ "$state" == ACTIVE ]] || exit 0
on_workers all "bash jaxrl_current/tpu_scripts/worker.sh status"
