#!/usr/bin/env bash
# A cluster over ssh, measured: each strategy answers the same prompts, then a table of their speeds.
#     scripts/run_jetson_eval.sh [--strategies ar,flowspec,streaming] HOSTS.yaml PROMPTS FOLDER \
#         MODEL [options of flowspec serve] [-- options of flowspec generate]
# The hosts are started as run_jetson.sh does it, once for each strategy, and ended with its last
# answer. FOLDER gets STRATEGY.jsonl (a line per answer, with tokens and times) and
# STRATEGY.status.json. Speed-ups are over the first strategy. Exit code 1 where an answer of one
# strategy has not the same tokens as the first one's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
strategies=ar,flowspec,streaming
if [ "${1:-}" = --strategies ] && [ $# -gt 1 ]; then strategies="$2"; shift 2; fi
[ $# -gt 3 ] || { echo "usage: run_jetson_eval.sh [--strategies A,B] HOSTS.yaml PROMPTS FOLDER MODEL [options of flowspec serve] [-- options of flowspec generate]" >&2; exit 2; }
hosts="$1" prompts="$2" folder="$3"
shift 3
serve=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do serve+=("$1"); shift; done
[ $# -eq 0 ] || shift # the --
python="${FLOWSPEC_PYTHON:-.venv/bin/python}"
[ -x "$python" ] || python="$(bash scripts/setup.sh requirements.txt)"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# before the first hour of answers, not after it
settings="$("$python" scripts/compare_answers.py --prepare "$hosts" "$prompts" "$strategies")"
read -r port FLOWSPEC_TOKEN <<<"$settings"
export FLOWSPEC_TOKEN
mkdir -p "$folder"
head=""
end_head() { [ -z "$head" ] || { kill "$head" 2>/dev/null || true; wait "$head" || true; head=""; }; }
trap end_head EXIT
files=()
for strategy in ${strategies//,/ }; do
    echo "$strategy" >&2
    bash run_jetson.sh "$hosts" "${serve[@]}" --strategy "$strategy" --no-prompt --no-mdns </dev/null &
    head=$!
    until "$python" -m flowspec status "127.0.0.1:$port" >/dev/null 2>&1; do
        kill -0 "$head" 2>/dev/null || { wait "$head"; exit 3; } # it has said why
        sleep 1
    done
    files+=("$folder/$strategy.jsonl")
    "$python" -m flowspec generate --prompts "$prompts" --head "127.0.0.1:$port" --json "$@" >"${files[-1]}"
    "$python" -m flowspec status "127.0.0.1:$port" --json >"$folder/$strategy.status.json"
    end_head
done
"$python" scripts/compare_answers.py "${files[@]}"
