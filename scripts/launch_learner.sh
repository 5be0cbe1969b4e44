#!/usr/bin/env bash
# The learner of a run:   scripts/launch_learner.sh configs/x.toml [--run-id ID] [--resume] [--set section.key=value]...
# On several GPUs of this machine: LAMBDAPO_RANKS=4 scripts/launch_learner.sh ...
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ $# -eq 0 ]; then
  sed -n 's/^# //p' "$0" >&2
  exit 2
fi
python="${LAMBDAPO_VENV:-$root/.venv}/bin/python"
[ -x "$python" ] || { echo "error: $python is missing: run scripts/setup first" >&2; exit 2; }
[[ ${LAMBDAPO_RANKS:-1} =~ ^[1-9][0-9]*$ ]] ||
  { echo "error: LAMBDAPO_RANKS=$LAMBDAPO_RANKS: give a number of GPUs, 1 or more" >&2; exit 2; }
if [ "${LAMBDAPO_RANKS:-1}" -gt 1 ]; then
  exec "$python" -m learner.launch "$LAMBDAPO_RANKS" "$@"
fi
exec "$python" -m learner "$@"
