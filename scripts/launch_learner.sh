#!/usr/bin/env bash
# The learner of a run:   scripts/launch_learner.sh configs/x.toml [--run-id ID] [--resume] [--set section.key=value]...
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ $# -eq 0 ]; then
  sed -n 's/^# //p' "$0" >&2
  exit 2
fi
exec "${LAMBDAPO_VENV:-$root/.venv}/bin/python" -m learner "$@"
