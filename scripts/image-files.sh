#!/usr/bin/env bash
# What the image adds to its base: scripts/image-files.sh BINARY DIR. Fails above 75 MB.
set -euo pipefail
binary=$1 root=$2
limit=$((75 * 1000 * 1000))
install -D -m 755 "$binary" "$root/usr/local/bin/brightrun"
install -D -m 644 /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
install -d -m 1777 "$root/scratch"
install -D -m 644 LICENSE-MIT "$root/usr/share/doc/brightrun/LICENSE-MIT"
install -D -m 644 LICENSE-APACHE "$root/usr/share/doc/brightrun/LICENSE-APACHE"
size=$(find "$root" -type f -printf '%s\n' | awk '{sum += $1} END {print sum}')
printf 'the image adds %s bytes to its base (limit %s)\n' "$size" "$limit"
test "$size" -le "$limit"
