#!/usr/bin/env bash
# One command: set up, split the bundled model, start head and stages here, answer a prompt.
# config/run_config.py says what runs; all options of `flowspec run` work and win:
#     run_pipe.sh --prompt "..." --strategy pipedec --stages 2
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
python="${FLOWSPEC_PYTHON:-$(bash scripts/setup.sh requirements.txt)}"
exec "$python" -m flowspec run --run-config config/run_config.py "$@"
