#!/usr/bin/env bash
# Keeps one training run alive until it is done, from any machine that stays on (a laptop, a small VM):
# makes the slice if there is none, sets it up, launches, watches, and starts again after a preemption
# (training ended with 75, or the slice was taken away), a last save that failed (74), a hang (76) or the loss of one host
# (134). Every start uses the same --run-dir, so training goes on from its last checkpoint. Any other failure ends the loop with that exit code and the log's end.
# The slice is deleted when training is done; after a failure it is left for a look (delete.sh removes it).
# Started a second time, it takes up a running job instead of restarting it.
#
#   tpu_scripts/resume.sh --project=P --zone=Z --name=N --accelerator-type=v6e-8 \
#       --config=configs/pods/lspo_qwen25_math_7b.py --run-dir=gs://bucket/runs/first \
#       [--fetch=gs://bucket/models/M] [--config.steps=100 ...]
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=tpu_scripts/common.sh
source "$here/common.sh"
parse_flags "$@"
[[ -n "$CONFIG" ]] || die "no config: pass --config=FILE"
[[ "$RUN_DIR" == gs://* ]] || die "--run-dir must be a gs:// folder, which outlives the slice (got '$RUN_DIR')"
YES=1
EXIT_PREEMPTED=75   # jaxrl.train was told to stop (SIGTERM) and has saved a checkpoint
EXIT_UNSAVED=74     # jaxrl.train ended, but its last save failed: the store stayed away
EXIT_WATCHDOG=76    # jaxrl.train saw no progress for too long and gave up
EXIT_ABORTED=134    # SIGABRT: another host of the job fell silent
mapfile -d '' -t flags < <(shared_flags)

sibling() { "$here/$1.sh" "${flags[@]}"; }

# Prints one word for the whole job: running, done, absent, preempted, ending, hung, unreachable, or failed:CODE.
# One worker's 75, and any failure of its own, decides over the others' 134: they have lost their peer and abort. While
# one still runs behind such a 134 (it may be saving), the job is ending, and why is not known yet.
job_status() {
  local text words codes own
  text="$(on_workers all "bash jaxrl_current/tpu_scripts/worker.sh status")" || true
  words="$(awk '$1 == "jaxrl-worker" { print $3 }' <<<"$text" | sort -u)"
  codes="$(grep -vx -e running -e absent -e 0 <<<"$words" || true)"
  own="$(grep -vx "$EXIT_ABORTED" <<<"$codes" || true)"
  if [[ -z "$words" ]]; then
    echo unreachable
  elif grep -qx "$EXIT_PREEMPTED" <<<"$codes"; then
    echo preempted
  elif [[ -n "$codes" && -z "$own" ]] && grep -qx running <<<"$words"; then
    echo ending
  elif grep -qx -e "$EXIT_WATCHDOG" -e "$EXIT_UNSAVED" <<<"$codes" || [[ -n "$codes" && -z "$own" ]]; then
    echo hung
  elif [[ -n "$codes" ]]; then
    echo "failed:$(head -n 1 <<<"$own")"
  elif [[ "$words" == 0 ]]; then
    echo "done"
  elif [[ "$words" == absent ]]; then
    echo absent
  else
    echo running
  fi
}

# Watches a launched job and prints how it ended: done, preempted, hung or failed:CODE.
watch_job() {
  local status state suspicious=0 ending=0
  while true; do
    sleep "$POLL_SECONDS"
    state="$(slice_state)"
    case "$state" in
      ACTIVE | UNKNOWN) ;;
      *) log "$NAME is $state"; echo preempted; return ;;
    esac
    status="$(job_status)"
    log "$NAME: $status"
    case "$status" in
      running) suspicious=0 ending=0 ;;
      ending) if ((++ending >= 5)); then echo hung; return; fi ;;
      done | preempted | hung) echo "$status"; return ;;
      *)
        # A slice on its way out also looks like this: believe it only when it stays so while the slice is up.
        suspicious=$((suspicious + 1))
        if ((suspicious >= 3)); then
          if [[ "$status" == failed:* ]]; then echo "$status"; else echo preempted; fi
          return
        fi
        ;;
    esac
  done
}

if ((DRY_RUN)); then
  log "dry run: one round from nothing to done; after exit code $EXIT_PREEMPTED or $EXIT_WATCHDOG it starts over at 'delete'"
  for step in create wait setup launch status delete; do sibling "$step"; done
  exit 0
fi

recreate=0
hangs=0
for ((start = 0; start <= MAX_RESTARTS; start++)); do
  log "start $start of at most $MAX_RESTARTS restarts"
  state="$(slice_state)"
  case "$state" in
    MISSING) sibling create ;;
    FAILED | SUSPENDING | SUSPENDED | DELETING) recreate=1 ;;
  esac
  if ((recreate)); then
    sibling delete || log "delete failed; trying to create anyway"
    sibling create
    recreate=0
  fi
  sibling wait || continue

  # A job that an earlier resume.sh launched is watched, not restarted; every later start follows an end.
  status=absent
  if ((start == 0)) && [[ "$state" == ACTIVE || "$state" == UNKNOWN ]]; then status="$(job_status)"; fi
  if [[ "$status" != running && "$status" != "done" ]]; then
    # A slice can be taken away while it is being set up, too.
    if ! { sibling setup && sibling launch; }; then
      log "set-up or launch failed"
      [[ "$(slice_state)" == ACTIVE ]] && die "set-up failed on a healthy slice: see above"
      continue
    fi
  fi

  ended="$(watch_job)"
  log "training ended: $ended"
  case "$ended" in
    done)
      sibling delete
      exit 0
      ;;
    preempted)
      recreate=1
      hangs=0
      ;;
    hung)
      # Once may be a lost message: try the same machines again. Twice in a row may be a broken chip.
      hangs=$((hangs + 1))
      ((hangs >= 2)) && recreate=1 && hangs=0
      ;;
    failed:*)
      on_workers all "bash jaxrl_current/tpu_scripts/worker.sh tail $LINES_BACK" || true
      code="${ended#failed:}"
      [[ "$code" =~ ^[0-9]+$ ]] || code=1
      exit "$code"
      ;;
  esac
done
die "gave up after $MAX_RESTARTS restarts"
