#!/usr/bin/env bash
# A cluster over ssh, measured: started once, it answers the same questions under each strategy.
#     scripts/run_jetson_eval.sh HOSTS.yaml FOLDER MODEL [options of flowspec serve] \
#         [-- options of flowspec bench, such as --datasets prompts.jsonl --strategies ar,streaming]
# The hosts are started as run_jetson.sh does it, and ended with the last answer. FOLDER gets the
# token, status.json and the samples; the same command goes on where it ended. Exit codes are those
# of `flowspec bench`: 1 where an answer has not the tokens of the cluster's plain decoding.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -gt 2 ] || { echo "usage: run_jetson_eval.sh HOSTS.yaml FOLDER MODEL [options of flowspec serve] [-- options of flowspec bench]" >&2; exit 2; }
hosts="$1" folder="$2"
shift 2
serve=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do serve+=("$1"); shift; done
[ $# -eq 0 ] || shift # the --
python="${FLOWSPEC_PYTHON:-.venv/bin/python}"
[ -x "$python" ] || python="$(bash scripts/setup.sh requirements.txt)"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
read_address='import sys
from pathlib import Path
from flowspec.cluster.hosts import read_hosts
try:
    file = read_hosts(Path(sys.argv[1]))
except (ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
print(f"{file.head}:{file.port}")'
address="$("$python" -c "$read_address" "$hosts")"
mkdir -p "$folder"
token=(--token-file "$folder/token")
bash run_jetson.sh "$hosts" "${serve[@]}" "${token[@]}" --no-prompt --no-mdns </dev/null &
head=$!
trap 'kill "$head" 2>/dev/null || true; wait "$head" || true' EXIT
until "$python" -m flowspec status "$address" "${token[@]}" --json >"$folder/status.json" 2>/dev/null; do
    kill -0 "$head" 2>/dev/null || { wait "$head"; exit 3; } # it has said why
    sleep 1
done
"$python" -m flowspec bench --real --head "$address" "${token[@]}" --out "$folder" "$@"
