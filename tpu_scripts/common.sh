# shellcheck shell=bash
# Sourced by every script here: settings (flag, else environment, else default), logging, dry run, gcloud calls.

PROJECT="${PROJECT:-}"
ZONE="${ZONE:-}"
NAME="${NAME:-jaxrl}"
ACCELERATOR_TYPE="${ACCELERATOR_TYPE:-v6e-8}"         # one machine of eight chips: takes most configs
RUNTIME_VERSION="${RUNTIME_VERSION:-}"      # empty: chosen from ACCELERATOR_TYPE
SPOT="${SPOT:-1}"                           # 1: spot (cheap, can be taken away), 0: on-demand
SERVICE_ACCOUNT="${SERVICE_ACCOUNT:-}"      # empty: the project's default
CREATE_FLAGS="${CREATE_FLAGS:-}"            # more flags for queued-resources create, space separated
SSH_FLAGS="${SSH_FLAGS:-}"                  # more flags for tpu-vm ssh and scp, such as --tunnel-through-iap
CONFIG="${CONFIG:-}"
RUN_DIR="${RUN_DIR:-}"                      # gs://... : it must outlive the slice
FETCH="${FETCH:-}"                          # gs://... folders (space separated) copied to ~/data on every worker
ENV_FILE="${ENV_FILE:-}"                    # local file of KEY=VALUE lines for training (W&B key, ...)
POLL_SECONDS="${POLL_SECONDS:-60}"
WAIT_MINUTES="${WAIT_MINUTES:-1440}"        # how long wait.sh waits for capacity
MAX_RESTARTS="${MAX_RESTARTS:-100}"
WORKER="${WORKER:-}"
LINES_BACK="${LINES_BACK:-100}"
YES="${YES:-0}"
DRY_RUN="${DRY_RUN:-0}"
TRAIN_ARGS=()                               # --config.key=value flags, handed to jaxrl.train untouched

SETTINGS=(PROJECT ZONE NAME ACCELERATOR_TYPE RUNTIME_VERSION SERVICE_ACCOUNT CREATE_FLAGS SSH_FLAGS CONFIG RUN_DIR
          FETCH ENV_FILE POLL_SECONDS WAIT_MINUTES MAX_RESTARTS WORKER LINES_BACK)

log() { echo "[tpu] $*" >&2; }

die() {
  log "error: $*"
  exit 2
}

show_help() {
  # The comment block at the top of the calling script, then the settings all scripts share.
  awk 'NR > 1 && /^#/ { sub(/^# ?/, ""); print; next } NR > 1 { exit }' "$0"
  cat <<'TEXT'

Settings: each is a flag and an environment variable (--zone=Z is ZONE=Z); the flag wins.
  --project, --zone          Google Cloud project and zone (required)
  --name                     name of the slice and of its queued resource (jaxrl)
  --accelerator-type         v6e-8 (default), v5litepod-8, v5p-8, ... (v5p counts cores: v5p-8 is 4 chips)
  --runtime-version          TPU software version (chosen from the accelerator type)
  --spot | --on-demand       kind of capacity (SPOT=1 or SPOT=0; spot)
  --service-account          account the workers act as (the project's default)
  --create-flags, --ssh-flags  more flags for gcloud's create, ssh and scp
  --config, --run-dir        what to train and the gs:// folder that keeps it
  --config.KEY=VALUE         handed to jaxrl.train untouched
  --fetch                    gs:// folders, space separated, copied to ~/data on every worker by setup.sh
  --env-file                 local file of KEY=VALUE lines set for training
  --worker                   which workers to read logs from: a number or all
  --lines-back               log lines to show before following
  --poll-seconds, --wait-minutes, --max-restarts   patience of wait.sh and resume.sh
  --yes                      do not ask before deleting
  --dry-run                  print every command, run none
  --help                     this text
TEXT
}

# parse_flags "$@": sets the variables above, TRAIN_ARGS and DRY_RUN.
parse_flags() {
  local flag key value name known
  while (($#)); do
    flag="$1"
    shift
    case "$flag" in
      --help | -h) show_help; exit 0 ;;
      --dry-run | --dry_run) DRY_RUN=1; continue ;;
      --yes) YES=1; continue ;;
      --spot) SPOT=1; continue ;;
      --on-demand | --on_demand) SPOT=0; continue ;;
      --config.run_dir=* | --config.distributed=*) die "$flag: use --run-dir; launch.sh sets config.distributed" ;;
      --config.*=*) TRAIN_ARGS+=("$flag"); continue ;;
      --*=*) key="${flag%%=*}" value="${flag#*=}" ;;
      --*)
        (($#)) || die "$flag needs a value (see --help)"
        key="$flag" value="$1"
        shift
        ;;
      *) die "unexpected argument '$flag' (see --help)" ;;
    esac
    key="${key#--}"
    key="${key//-/_}"
    key="${key^^}"
    known=0
    for name in "${SETTINGS[@]}"; do [[ "$name" == "$key" ]] && known=1; done
    ((known)) || die "unknown flag '$flag' (see --help)"
    printf -v "$key" '%s' "$value"
  done
  [[ -n "$PROJECT" ]] || die "no project: pass --project=ID or export PROJECT"
  [[ -n "$ZONE" ]] || die "no zone: pass --zone=ZONE or export ZONE"
}

# Every flag that this process was given or found in its environment, for calling a sibling script.
shared_flags() {
  local name
  for name in "${SETTINGS[@]}"; do
    [[ -n "${!name}" ]] && printf '%s\0' "--${name,,}=${!name}"
  done
  if ((SPOT)); then printf '%s\0' --spot; else printf '%s\0' --on-demand; fi
  ((DRY_RUN)) && printf '%s\0' --dry-run
  ((YES)) && printf '%s\0' --yes
  ((${#TRAIN_ARGS[@]})) && printf '%s\0' "${TRAIN_ARGS[@]}"
  return 0
}

# run COMMAND...: print it, and run it unless this is a dry run.
run() {
  local text
  printf -v text '%q ' "$@"
  if ((DRY_RUN)); then
    echo "${text% }"
  else
    log "+ ${text% }"
    "$@"
  fi
}

runtime_version() {
  if [[ -n "$RUNTIME_VERSION" ]]; then echo "$RUNTIME_VERSION"; return; fi
  case "$ACCELERATOR_TYPE" in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) die "accelerator type '$ACCELERATOR_TYPE' has no known software version: pass --runtime-version" ;;
  esac
}

# The queued resource's state (ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, ...), MISSING if there is none, UNKNOWN if
# Google could not be asked just now. In a dry run the slice is always there.
slice_state() {
  local state errors
  local command=(gcloud compute tpus queued-resources describe "$NAME" --project="$PROJECT" --zone="$ZONE"
                 "--format=value(state.state)")
  if ((DRY_RUN)); then
    run "${command[@]}" >&2
    echo ACTIVE
    return
  fi
  errors="$(mktemp)"
  if state="$("${command[@]}" 2>"$errors")"; then
    echo "${state:-UNKNOWN}"
  elif grep -qi "not.found" "$errors"; then
    echo MISSING
  else
    log "cannot ask for the state of $NAME: $(tail -n 1 "$errors")"
    echo UNKNOWN
  fi
  rm -f "$errors"
}

# on_workers WORKERS COMMAND: run one shell command line on "all" workers, or on one by number.
on_workers() {
  local more
  read -ra more <<<"$SSH_FLAGS"
  run gcloud compute tpus tpu-vm ssh "$NAME" --project="$PROJECT" --zone="$ZONE" --quiet --worker="$1" \
    "${more[@]}" --command="$2"
}

# copy_to_workers FILE NAME: copy a local file into every worker's home directory.
copy_to_workers() {
  local more
  read -ra more <<<"$SSH_FLAGS"
  run gcloud compute tpus tpu-vm scp "$1" "$NAME:$2" --project="$PROJECT" --zone="$ZONE" --quiet --worker=all \
    "${more[@]}"
}
