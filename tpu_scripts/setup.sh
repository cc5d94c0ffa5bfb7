#!/usr/bin/env bash
# Copies this checkout (as it is on disk, without what git ignores) to all workers and installs it there with the
# extra [tpu]; copies --fetch folders (model weights, data) to ~/data and --env-file to the workers.
#
#   tpu_scripts/setup.sh --project=P --zone=Z --name=N --fetch=gs://bucket/models/Qwen2.5-Math-7B
#
# Next: tpu_scripts/launch.sh
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse_flags "$@"
[[ -z "$ENV_FILE" || -f "$ENV_FILE" ]] || die "no such file: --env-file=$ENV_FILE"

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
package="$(mktemp -d)/jaxrl.tar.gz"
trap 'rm -rf "$(dirname "$package")"' EXIT

# Listed by git so that new files go along but ignored ones do not; tar would stop at files deleted on disk.
run bash -c 'set -o pipefail; cd "$1"; git ls-files -z --cached --others --exclude-standard |
  while IFS= read -r -d "" f; do if [[ -e "$f" ]]; then printf "%s\0" "$f"; fi; done |
  tar --null --files-from=- -czf "$2"' pack "$root" "$package"
copy_to_workers "$package" jaxrl.tar.gz
if [[ -n "$ENV_FILE" ]]; then
  # Made private before the content arrives: it may hold keys.
  on_workers all 'umask 077 && : > jaxrl.env'
  copy_to_workers "$ENV_FILE" jaxrl.env
fi
read -ra folders <<<"$FETCH"
printf -v quoted ' %q' "${folders[@]}"
on_workers all "rm -rf jaxrl && mkdir jaxrl && tar -xzf jaxrl.tar.gz -C jaxrl && bash jaxrl/tpu_scripts/worker.sh install"
((${#folders[@]} == 0)) || on_workers all "bash jaxrl/tpu_scripts/worker.sh fetch$quoted"
