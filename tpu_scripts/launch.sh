#!/usr/bin/env bash
# Starts the same training command on all workers, in the background, and returns. A job still running
# there is stopped first (it saves a checkpoint). With a --run-dir used before, training resumes.
#
#   tpu_scripts/launch.sh --project=P --zone=Z --name=N --config=configs/pods/lspo_qwen25_math_7b.py \
#       --run-dir=gs://bucket/runs/first [--config.steps=100 ...]
#
# Next: tpu_scripts/logs.sh (follow it), tpu_scripts/status.sh, or tpu_scripts/resume.sh instead of this
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse_flags "$@"
[[ -n "$CONFIG" ]] || die "no config: pass --config=FILE"
[[ "$RUN_DIR" == gs://* ]] || die "--run-dir must be a gs:// folder, which outlives the slice (got '$RUN_DIR')"

printf -v arguments ' %q' "--config=$CONFIG" "--config.run_dir=$RUN_DIR" --config.distributed=True "${TRAIN_ARGS[@]}"
on_workers all "bash jaxrl_current/tpu_scripts/worker.sh start$arguments"
