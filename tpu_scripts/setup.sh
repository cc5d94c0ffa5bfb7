#!/usr/bin/env bash
# Copies this checkout (as it is on disk, without what git ignores) to all workers, into a folder of its own for each
# version (~/jaxrl-VERSION; ~/jaxrl_current points to the newest), and installs it there with the extra [tpu]. Nothing is
# deleted: a job that runs keeps its code, and what others left there stays. Copies --fetch folders (model weights, data) to ~/data and --env-file to the workers.
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

# Listed by git so that new files go along but ignored ones do not, and never the file with keys; tar would stop at files
# deleted on disk.
run bash -c 'set -o pipefail; cd "$1"; git ls-files -z --cached --others --exclude-standard |
  while IFS= read -r -d "" f; do if [[ -e "$f" && ! "$f" -ef "$3" ]]; then printf "%s\0" "$f"; fi; done |
  tar --null --files-from=- -czf "$2"' pack "$root" "$package" "${ENV_FILE:+$(realpath "$ENV_FILE")}"
version=dry-run
((DRY_RUN)) || version="$(cksum <"$package" | cut -d ' ' -f 1)"
copy_to_workers "$package" jaxrl.tar.gz
if [[ -n "$ENV_FILE" ]]; then
  # Made private before the content arrives: it may hold keys.
  on_workers all 'umask 077 && : > jaxrl.env'
  copy_to_workers "$ENV_FILE" jaxrl.env
fi
read -ra folders <<<"$FETCH"
printf -v quoted ' %q' "${folders[@]}"
on_workers all "mkdir -p jaxrl-$version && tar -xzf jaxrl.tar.gz -C jaxrl-$version && \
ln -sfn jaxrl-$version jaxrl_current && bash jaxrl_current/tpu_scripts/worker.sh install"
((${#folders[@]} == 0)) || on_workers all "bash jaxrl_current/tpu_scripts/worker.sh fetch$quoted"
