#!/usr/bin/env bash
# A cluster over ssh, measured: started once, it answers the same questions under each strategy.
#     scripts/run_jetson_eval.sh HOSTS.yaml FOLDER MODEL [options of flowspec serve] \
#         [-- options of flowspec bench, such as --datasets prompts.jsonl --strategies ar,streaming]
# The hosts are started as run_jetson.sh does it, and ended with the last answer. FOLDER gets the
# token, status.json and the samples; the same command goes on where it ended. Exit codes are those
# of `flowspec bench`: 1 where an answer has not the tokens of the cluster's plain decoding; 3 also
# where the cluster is not healthy after FLOWSPEC_START_S seconds (600 unless set).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -gt 2 ] || { echo "usage: run_jetson_eval.sh HOSTS.yaml FOLDER MODEL [options of flowspec serve] [-- options of flowspec bench]" >&2; exit 2; }
hosts="$1" folder="$2"
shift 2
serve=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do serve+=("$1"); shift; done
[ $# -eq 0 ] || shift # the --
start_s="${FLOWSPEC_START_S:-600}" say_s=30
[[ "$start_s" =~ ^[0-9]{1,6}$ ]] || { echo "error: FLOWSPEC_START_S takes whole seconds, not $start_s" >&2; exit 2; }
start_s=$((10#$start_s)) # 08 is no octal number here
own='*' # the head runs here, at all addresses unless the options say which
for ((k = 0; k < ${#serve[@]}; k++)); do
    case "${serve[k]}" in
        --host) own="${serve[k + 1]:-$own}" ;;
        --host=*) own="${serve[k]#--host=}" ;;
    esac
done
python="$(bash scripts/find_python.sh)"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
read_address='import sys
from pathlib import Path
from flowspec.cluster.hosts import read_hosts
from flowspec.cluster.network import own_host
from flowspec.system.address import Address, parse_host
try:
    port = read_hosts(Path(sys.argv[1])).port
    print(Address(own_host(parse_host(sys.argv[2]), port), port))
except (ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)'
address="$("$python" -c "$read_address" "$hosts" "$own")"
mkdir -p "$folder"
token=(--token-file "$folder/token")
bash run_jetson.sh "$hosts" "${serve[@]}" "${token[@]}" --no-prompt --no-mdns </dev/null &
head=$!
end_head() { # it finishes what is open, its hosts end after it; one that hangs is killed
    kill "$head" 2>/dev/null || true
    for ((k = 0; k < 600; k++)); do kill -0 "$head" 2>/dev/null || break; sleep 0.1; done
    kill -9 "$head" 2>/dev/null || true
    wait "$head" || true
}
trap end_head EXIT
read_why='import json, sys
print(json.load(open(sys.argv[1]))["why"])'
why() { # what the last look at the cluster has said
    local text
    text="$(tail -n 1 "$folder/status.err")"
    [ -n "$text" ] || text="$("$python" -c "$read_why" "$folder/status.json" 2>/dev/null)" || true
    echo "${text:-it does not say why}"
}
began=$SECONDS said=$SECONDS
until "$python" -m flowspec status "$address" "${token[@]}" --json >"$folder/status.json" 2>"$folder/status.err"; do
    kill -0 "$head" 2>/dev/null || { wait "$head"; exit 3; } # it has said why
    if ((SECONDS - began >= start_s)); then
        echo "error: the cluster is not healthy after $start_s s: $(why)" >&2
        exit 3
    fi
    if ((SECONDS - said >= say_s)); then
        echo "waiting for the cluster: $(why)" >&2
        said=$SECONDS
    fi
    sleep 1
done
"$python" -m flowspec bench --real --head "$address" "${token[@]}" --out "$folder" "$@"
