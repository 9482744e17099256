#!/usr/bin/env bash
# Answers of a cluster over ssh to a file of prompts, one JSON line each with tokens and times:
#     scripts/run_jetson_eval.sh my-hosts.yaml prompts.jsonl out.jsonl MODEL --draft HEAD
# The hosts are started as run_jetson.sh does it, and ended with the last answer.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -gt 3 ] || { echo "usage: run_jetson_eval.sh HOSTS.yaml PROMPTS OUT.jsonl MODEL [options of flowspec serve]" >&2; exit 2; }
hosts="$1" prompts="$2" out="$3"
shift 3
python="${FLOWSPEC_PYTHON:-.venv/bin/python}"
[ -x "$python" ] || python="$(bash scripts/setup.sh requirements.txt)"
FLOWSPEC_TOKEN="$("$python" -c 'from flowspec.cluster.token import new_token; print(str(new_token()))')"
port="$("$python" -c 'import sys; from pathlib import Path; from flowspec.cluster.hosts import read_hosts; print(read_hosts(Path(sys.argv[1])).port)' "$hosts")"
export FLOWSPEC_TOKEN
bash run_jetson.sh "$hosts" "$@" --no-prompt --no-mdns </dev/null &
head=$!
trap 'kill "$head" 2>/dev/null; wait "$head" || true' EXIT
until "$python" -m flowspec status "127.0.0.1:$port" >/dev/null 2>&1; do
    kill -0 "$head" || exit 1
    sleep 2
done
"$python" -m flowspec generate --prompts "$prompts" --head "127.0.0.1:$port" --json >"$out"
"$python" -m flowspec status "127.0.0.1:$port" --json >"${out%.jsonl}.status.json"
