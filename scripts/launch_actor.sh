#!/usr/bin/env bash
# One actor, joining a run:   scripts/launch_actor.sh redis://host:6379 RUN_ID [--set actor.key=value]...
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ $# -lt 2 ]; then
  sed -n 's/^# //p' "$0" >&2
  exit 2
fi
url=$1 run_id=$2
shift 2
exec "${LAMBDAPO_VENV:-$root/.venv}/bin/python" -m actors --redis-url "$url" --run-id "$run_id" "$@"
