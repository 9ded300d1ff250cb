#!/usr/bin/env bash
# Uploads a 40 MB file with the worker's client to the reference tus server, through cuts and a killed client, and
# compares the stored bytes. Needs node, npm (or its cache) and cargo; everything else lives in a temporary folder.
set -euo pipefail
cd "$(dirname "$0")/../../.."
here=scripts/peers/tus
size=40000000

work=$(mktemp -d)
server=
stop() { [ -z "$server" ] || { kill "$server" 2>/dev/null && wait "$server"; } || true; server=; }
trap 'stop; rm -rf "$work"' EXIT

cargo build --quiet --example tus_peer
target=$(cargo metadata --format-version 1 --no-deps | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
client=$target/debug/examples/tus_peer
cp $here/server.mjs "$work"
(cd "$work" && npm init -y >/dev/null && npm install --silent --no-audit --no-fund @tus/server@2.4.5 @tus/file-store@2.1.1 >/dev/null)
head -c $size /dev/urandom >"$work/file.bin"
echo "node $(node --version), @tus/server $(node -p "require('$work/node_modules/@tus/server/package.json').version")," \
  "@tus/file-store $(node -p "require('$work/node_modules/@tus/file-store/package.json').version")"

openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=peer -addext subjectAltName=IP:127.0.0.1 \
  -addext basicConstraints=CA:FALSE -keyout "$work/tls.key" -out "$work/tls.crt" 2>/dev/null

# NAME CUTS [STOP_AFTER_BYTES [TLS]]
round() {
  local name=$1 cuts=$2 stop_after=${3:-} tls=${4:-}
  mkdir "$work/$name"
  node "$work/server.mjs" "$work/$name" "$work/$name.port" "$cuts" "$tls" >"$work/$name.log" 2>&1 &
  server=$!
  for _ in $(seq 100); do [ -s "$work/$name.port" ] && break; sleep 0.1; done
  local url state
  url=http${tls:+s}://127.0.0.1:$(cat "$work/$name.port")
  state=$work/$name.state
  if [ -n "$stop_after" ]; then
    "$client" "$url" "$work/file.bin" "$state" "$stop_after" >"$work/$name.first" && exit 1
  fi
  "$client" "$url" "$work/file.bin" "$state" >"$work/$name.out"
  local stored
  stored=$(find "$work/$name" -type f -size "${size}c")
  stop
  echo "$name: $(wc -w <<<"$stored") stored object of $size bytes, $(tail -1 "$work/$name.out"), $(tail -1 "$work/$name.log")"
  cmp "$work/file.bin" "$(head -1 <<<"$stored")"
  [ ! -e "$state" ]
}

round plain ''
round cuts '9000000,3000000,700,4500000,a6300000,1,8000000,12345678,100000'
round killed '15000000,-' 20000000
SSL_CERT_FILE=$work/tls.crt round tls '9000000,3000000,700,4500000' '' "$work/tls"
echo "all stored bytes are the file's"
