#!/usr/bin/env bash
# What this machine's GPU is, whether every op is right on it, and how fast: everything to one file, results.json.
#
#     ./run.sh [DIR]                     results go to DIR (default: results)
#
# BRIGHTRUN_BENCH_ARGS is put behind `brightrun-bench step`, such as "--layers 12 --tokens 8192".
# Exit code: that of the first part that failed.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-results}
mkdir -p "$out"
code=0
parts=()

# Runs a part: its output to a file and to the terminal, its exit code to the results.
part() {
    local name=$1
    shift
    echo "== $name: $*"
    local begun=$SECONDS
    "$@" 2>&1 | tee "$out/$name.txt"
    local status=${PIPESTATUS[0]}
    [ $code -ne 0 ] || code=$status
    local text
    text=$(json_string < "$out/$name.txt")
    local data=null
    # Whole only if the part ended well.
    if [ $status -eq 0 ] && [ -s "$out/$name.json" ]; then data=$(cat "$out/$name.json"); fi
    parts+=("\"$name\": {\"exit_code\": $status, \"seconds\": $((SECONDS - begun)), \"data\": $data, \"said\": $text}")
    return $status
}

# Standard input as a JSON string.
json_string() {
    printf '"'
    tr -d '\000-\010\013-\037' | sed -e 's/\\/\\\\/g' -e 's/"/\\"/g' -e 's/\t/\\t/g' -e 's/$/\\n/' | tr -d '\n'
    printf '"'
}

device() {
    uname -srm
    grep -m1 'model name' /proc/cpuinfo
    grep MemTotal /proc/meminfo
    if command -v nvidia-smi > /dev/null; then
        nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total,clocks.max.sm,power.limit --format=csv
    else
        echo "nvidia-smi is not there"
    fi
}

finish() {
    {
        echo "{"
        echo "\"commit\": \"$(cat "$here/COMMIT")\","
        echo "\"date\": \"$(date -u +%Y-%m-%dT%H:%M:%SZ)\","
        local last=$((${#parts[@]} - 1)) i
        for i in "${!parts[@]}"; do
            echo "${parts[$i]}$([ "$i" -eq $last ] || echo ,)"
        done
        echo "}"
    } > "$out/results.json"
    echo "results: $out/results.json, exit code $code"
    exit $code
}

part device device
# The first thing that needs the driver: one that is missing or too old is told in one line, and nothing else is tried.
part open "$here/brightrun" selftest --device cuda --op rms_norm || finish
part selftest "$here/brightrun" selftest --device cuda
for tool in memcheck racecheck synccheck; do
    # Slow: one op of each family.
    if command -v compute-sanitizer > /dev/null; then
        for op in rms_norm linear_forward moe_gate_up_forward attention_backward gated_delta_backward; do
            part "$tool-$op" timeout 300 compute-sanitizer --tool "$tool" --error-exitcode 1 \
                "$here/brightrun" selftest --device cuda --op "$op"
        done
    fi
done
part kernels "$here/brightrun-bench" kernels --device cuda --json "$out/kernels.json"
# shellcheck disable=SC2086 # words of it are arguments
part step "$here/brightrun-bench" step --device cuda --json "$out/step.json" ${BRIGHTRUN_BENCH_ARGS:-}
finish
