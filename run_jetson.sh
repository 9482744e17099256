#!/usr/bin/env bash
# A head here and one stage on each host of a file, over ssh with keys (no password is kept):
#     run_jetson.sh my-hosts.yaml MODEL --draft HEAD     all options of `flowspec serve` work
# config/hosts.example.yaml says what the file holds; each host needs the project with its .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
[ $# -gt 0 ] || { echo "usage: run_jetson.sh HOSTS.yaml MODEL [options of flowspec serve]" >&2; exit 2; }
python="$(bash scripts/find_python.sh)"
exec "$python" -m flowspec serve --hosts "$@"
