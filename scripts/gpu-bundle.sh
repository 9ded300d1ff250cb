#!/usr/bin/env bash
# Makes a folder to carry to a machine with a GPU: stripped binaries and run.sh, nothing else needed there but the NVIDIA driver.
#
#     scripts/gpu-bundle.sh [DIR]        (default: target/gpu-bundle)
#
# Checks what it promises: below 60 MB, no GLIBC symbol newer than 2.35, no library but those of glibc and gcc's runtime, no instructions
# beyond the baseline asked of a compiler.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-target/gpu-bundle}
max_bytes=60000000
newest_glibc=2.35
binaries=(brightrun brightrun-bench)

fail() { echo "gpu-bundle: $*" >&2; exit 1; }

for flags in "${RUSTFLAGS:-}" "${CFLAGS:-}" "${CXXFLAGS:-}"; do
    case $flags in
        *target-cpu* | *target-feature* | *-march* | *-mavx*)
            fail "built with \`$flags\` it would not run on every x86-64; unset it" ;;
    esac
done

BRIGHTRUN_KERNELS=require BRIGHTRUN_COMMIT=$(git describe --always --dirty) cargo build --release --locked --bins
rm -rf "$out"
mkdir -p "$out"
for binary in "${binaries[@]}"; do
    strip --strip-all -o "$out/$binary" "target/release/$binary"
    needed=$(objdump -p "$out/$binary" | awk '$1 == "NEEDED" { print $2 }')
    for library in $needed; do
        case $library in
            libc.so.6 | libm.so.6 | libgcc_s.so.1 | ld-linux-x86-64.so.2) ;;
            *) fail "$binary needs $library" ;;
        esac
    done
    glibc=$(objdump -T "$out/$binary" | grep -o 'GLIBC_[0-9.]*' | sort -Vu | tail -1)
    newest=$(printf '%s\nGLIBC_%s\n' "$glibc" "$newest_glibc" | sort -V | tail -1)
    [ "$newest" = "GLIBC_$newest_glibc" ] || fail "$binary needs $glibc, GLIBC_$newest_glibc is promised"
    echo "$binary: $(stat -c %s "$out/$binary") bytes, newest symbol $glibc, needs" $needed
done
cp scripts/gpu-bundle/run.sh "$out/run.sh"
git describe --always --dirty > "$out/COMMIT"
total=$(du -sb "$out" | cut -f1)
[ "$total" -le "$max_bytes" ] || fail "$out has $total bytes, $max_bytes are promised"
echo "$out: $total bytes"
