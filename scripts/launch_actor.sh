#!/usr/bin/env bash
# One actor, joining a run:   scripts/launch_actor.sh [redis://host:6379] RUN_ID [--set actor.key=value]...
# Without a URL it takes REDIS_URL, so that a password need not stand on the command line.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ ${1:-} == *://* ]]; then
  export REDIS_URL=$1
  shift
fi
if [ $# -lt 1 ] || [[ $1 == -* ]]; then
  sed -n 's/^# //p' "$0" >&2
  exit 2
fi
run_id=$1
shift
[[ $run_id != *:* ]] || { echo "error: what comes first is neither a run id nor a URL: begin a URL with redis://" >&2; exit 2; }
python="${LAMBDAPO_VENV:-$root/.venv}/bin/python"
[ -x "$python" ] || { echo "error: $python is missing: run scripts/setup first" >&2; exit 2; }
exec "$python" -m actors --run-id "$run_id" "$@"
