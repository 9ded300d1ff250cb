#!/usr/bin/env bash
# The row's types on a real PostgreSQL: what a worker sent for two jobs is executed there as PostgREST would, and what the simulator
# refuses is refused there. Needs Debian's `postgresql`, python3 with venv, and network for pip; the server lives in a temporary folder,
# on a unix socket, as a user that is not root. About a minute after the build.
#
#     scripts/peers/postgres/run.sh [DIR]        (DIR: brightrun and brightrun-sim; built where it is not given)
set -euo pipefail
cd "$(dirname "$0")/../../.."
binaries=${1:-}
if [ -z "$binaries" ]; then
    cargo build --quiet --locked --bin brightrun --bin brightrun-sim
    binaries=$(cargo metadata --format-version 1 --no-deps | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')/debug
fi
server=$(find /usr/lib/postgresql -maxdepth 2 -name bin | sort -V | tail -1)
[ -n "$server" ] || { echo "no PostgreSQL below /usr/lib/postgresql; install Debian's package postgresql" >&2; exit 1; }

work=$(mktemp -d)
postmaster=
stop() { [ -z "$postmaster" ] || { kill -INT "$postmaster" 2>/dev/null && wait "$postmaster"; } || true; }
trap 'stop; rm -rf "$work"' EXIT
as=()
mkdir "$work/server"
if [ "$(id -u)" = 0 ]; then
    chmod 711 "$work"
    chown nobody "$work/server"
    as=(setpriv --reuid=nobody --regid=nogroup --clear-groups)
fi
(cd "$work/server" && "${as[@]}" "$server/initdb" -D data -U owner -A trust -E UTF8 --locale=C.UTF-8 --no-sync >/dev/null)
(cd "$work/server" && exec "${as[@]}" "$server/postgres" -D data -k "$work/server" -c listen_addresses= -c fsync=off -c timezone=UTC 2>log) &
postmaster=$!
for _ in $(seq 100); do "$server/pg_isready" -q -h "$work/server" -U owner && break; sleep 0.1; done

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'psycopg[binary]==3.2.13'
"$work/venv/bin/python" scripts/peers/postgres/check_rows.py "$binaries" "host=$work/server user=owner dbname=postgres" "$work"
