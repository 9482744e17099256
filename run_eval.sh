#!/usr/bin/env bash
# The evaluation of every strategy, on real processes of this machine as config/run_config.py says, or
# with --emulate first the published experiments on emulated clusters:
#     run_eval.sh [options of flowspec bench]
#     run_eval.sh --emulate table --data-dir QUESTIONS     (--emulate --help lists the experiments)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
if [ "${1:-}" = --emulate ]; then shift && exec bash scripts/run_eval.sh "$@"; fi
exec bash run_pipe_eval.sh --strategies all "$@"
