#!/usr/bin/env bash
# Follows the training log: of worker 0, or of --worker=N, or of --worker=all. Ctrl-C stops following, not training.
#
#   tpu_scripts/logs.sh --project=P --zone=Z --name=N [--worker=all] [--lines-back=1000]
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse_flags "$@"
[[ "$LINES_BACK" =~ ^[0-9]+$ ]] || die "--lines-back must be a whole number (got '$LINES_BACK')"

on_workers "${WORKER:-0}" "bash jaxrl_current/tpu_scripts/worker.sh logs $LINES_BACK"
