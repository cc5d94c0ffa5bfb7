#!/usr/bin/env bash
# Runs on each TPU worker, called by the other scripts over ssh; not meant to be called by hand.
#
#   worker.sh install | fetch GS_FOLDER... | start TRAIN_ARGS... | status | logs LINES | tail LINES | stop
#
# State is kept in ~/jaxrl_job: train.log, pid (of the process group) and, once training has ended, exit_code.
set -euo pipefail
source_dir="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"   # ~/jaxrl-VERSION, also while a newer one is set up
venv="$HOME/jaxrl_venv"
job="$HOME/jaxrl_job"
STOP_SECONDS="${STOP_SECONDS:-310}"   # training ends itself, saved or not, after config.watchdog.grace: 300 seconds

alive() { [[ -f "$job/pid" ]] && kill -0 -- "-$(cat "$job/pid")" 2>/dev/null; }

install() {
  # The TPU images come with an older Python than jaxrl needs; uv brings its own.
  python3 -m pip install --user --quiet --upgrade uv
  [[ -d "$venv" ]] || python3 -m uv venv --quiet --python 3.12 "$venv"
  python3 -m uv pip install --quiet --python "$venv/bin/python" --editable "${source_dir}[tpu]"
  # The TPU runtime starts and stops much faster with these; not worth failing over.
  sudo sh -c 'echo always > /sys/kernel/mm/transparent_hugepage/enabled' || true
  "$venv/bin/python" -c 'import jax, jaxrl; print("jaxrl ready, jax", jax.__version__)'
}

fetch() {
  local folder
  for folder in "$@"; do
    mkdir -p "$HOME/data/$(basename "$folder")"
    gcloud storage rsync --recursive "$folder" "$HOME/data/$(basename "$folder")"
  done
}

stop() {
  local second
  alive || return 0
  kill -TERM -- "-$(cat "$job/pid")" || true
  for ((second = 0; second < STOP_SECONDS; second++)); do
    alive || return 0
    sleep 1
  done
  kill -KILL -- "-$(cat "$job/pid")" || true
}

start() {
  stop
  mkdir -p "$job"
  rm -f "$job/exit_code" "$job/pid"
  # setsid: its own process group, which outlives this ssh connection and can be stopped as one.
  setsid bash "$source_dir/tpu_scripts/worker.sh" job "$@" >>"$job/train.log" 2>&1 </dev/null &
  echo $! >"$job/pid"
  echo "started on $(hostname)"
}

# The detached process of start: runs training and leaves its exit code behind.
job() {
  local code=0
  trap : TERM INT   # training gets the signal too and saves; this shell stays to record how it ended
  cd "$source_dir"
  if [[ -f "$HOME/jaxrl.env" ]]; then
    local line value
    while IFS= read -r line || [[ -n "$line" ]]; do  # KEY=VALUE or KEY='VALUE'; a shell would also read $ and ` in it
      value="${line#*=}"
      if [[ "$value" == \'*\' || "$value" == \"*\" ]]; then value="${value:1:-1}"; fi
      if [[ "$line" == [A-Za-z_]*=* ]]; then export "${line%%=*}=$value"; fi
    done <"$HOME/jaxrl.env"
  fi
  echo "=== $(date -u +%FT%TZ) $(hostname): python -m jaxrl.train $*"
  "$venv/bin/python" -m jaxrl.train "$@" || code=$?
  echo "=== $(date -u +%FT%TZ) ended with exit code $code"
  echo "$code" >"$job/exit_code.new"
  mv "$job/exit_code.new" "$job/exit_code"
}

status() {
  local word=absent
  if [[ -f "$job/exit_code" ]]; then
    word="$(cat "$job/exit_code")"
  elif alive; then
    word=running
  elif [[ -f "$job/pid" ]]; then
    word=lost
  fi
  echo "jaxrl-worker $(hostname) $word"
}

command="${1:-}"
(($#)) && shift
case "$command" in
  install | fetch | start | job | status | stop) "$command" "$@" ;;
  logs) exec tail -n "$1" -F "$job/train.log" ;;
  tail) tail -n "$1" "$job/train.log" | sed "s/^/$(hostname): /" ;;
  *) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
esac
