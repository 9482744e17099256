#!/usr/bin/env bash
# The published tables on the emulated reference testbed; options go to `flowspec bench`.
#   bash scripts/run_eval.sh table --data-dir QUESTIONS       every strategy, six sets, T = 0 and 1
#   bash scripts/run_eval.sh bandwidth --data-dir QUESTIONS   the same at T = 0 over link rates
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -gt 0 ] || { echo "usage: run_eval.sh table|bandwidth [options of flowspec bench]" >&2; exit 2; }
what="$1"; shift
python="$(bash scripts/setup.sh requirements.txt)"
out="${EVAL_OUT:-out/eval}"; mkdir -p "$out"
run() { "$python" -m flowspec bench --questions 30:50 --out "$out" --json "$out/$1.json" "${@:2}"; }
case "$what" in
  table) run table --temperatures 0,1 --seeds 1,2,3 --bound "$@" ;;
  bandwidth)
    for cluster in jetson-5-125mbit jetson-5-250mbit jetson-5-500mbit jetson-5; do
      run "bandwidth-$cluster" --cluster "$cluster" "$@"
    done ;;
  *) echo "error: $what is neither table nor bandwidth" >&2; exit 2 ;;
esac
