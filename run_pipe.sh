#!/usr/bin/env bash
# One command: set up, split the bundled model, start head and stages here, answer a prompt.
# All options of `flowspec run` work: run_pipe.sh --prompt "..." --strategy pipedec --stages 2
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
python="$(bash scripts/setup.sh requirements.txt)"
exec "$python" -m flowspec run "$@"
