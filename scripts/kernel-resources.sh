#!/usr/bin/env bash
# What ptxas says of each kernel in the newest build: registers, shared memory, spills. Fails on any spill.
set -euo pipefail
cd "$(dirname "$0")/.."
report=$(find "${CARGO_TARGET_DIR:-target}" -name ptxas.txt -printf '%T@ %p\n' | sort -n | tail -1 | cut -d' ' -f2-)
[ -n "$report" ] || { echo "no build with nvcc found; run scripts/get-nvcc.sh, then build" >&2; exit 1; }
awk '
    BEGIN { printf "%-28s %-8s %9s %13s %11s\n", "kernel", "target", "registers", "shared bytes", "spill bytes" }
    /Compiling entry function/ { split($0, part, "\047"); kernel = part[2]; target = part[4] }
    /bytes spill stores/ { spill = $5 + $9 }
    /Used [0-9]+ registers/ {
        registers = shared = 0
        for (i = 1; i < NF; ++i) {
            if ($(i + 1) ~ /^registers/) registers = $i
            if ($(i + 1) == "bytes" && $(i + 2) ~ /^smem/) shared = $i
        }
        printf "%-28s %-8s %9d %13d %11d\n", kernel, target, registers, shared, spill
        if (spill > 0) { bad = 1; printf "%s spills %d bytes on %s\n", kernel, spill, target > "/dev/stderr" }
    }
    END { exit bad }
' "$report"
