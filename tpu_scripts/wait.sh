#!/usr/bin/env bash
# Waits until the slice that create.sh asked for is ready. Ends non-zero when it never will be, or when
# --wait-minutes have passed (the request then stays in the queue: run it again, or delete.sh).
#
#   tpu_scripts/wait.sh --project=P --zone=Z --name=N
#
# Next: tpu_scripts/setup.sh
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse_flags "$@"

deadline=$((SECONDS + WAIT_MINUTES * 60))
while true; do
  state="$(slice_state)"
  log "$NAME: $state"
  case "$state" in
    ACTIVE) exit 0 ;;
    FAILED | SUSPENDING | SUSPENDED | DELETING | MISSING)
      die "$NAME is $state and will not become ready: delete.sh, then create.sh" ;;
  esac
  ((SECONDS < deadline)) || die "$NAME was not ready after $WAIT_MINUTES minutes (last state $state)"
  sleep "$POLL_SECONDS"
done
