#!/usr/bin/env bash
# The image's runtime stage without a container engine, and a job in it: scripts/image-root.sh BINARY ROOT [SIMULATOR]
#
# ROOT becomes Debian 12 (debootstrap, minbase) with what scripts/image-files.sh adds to it; an existing one is used again. Then, in a chroot
# as user 10001, root read-only, /scratch a tmpfs, in namespaces of its own for mounts, processes and network (loopback alone), the worker
# trains the demo on the CPU; data set, row and bucket are SIMULATOR's (brightrun-sim beside BINARY). Wants root, debootstrap, iproute2,
# curl, python3.
set -euo pipefail
cd "$(dirname "$0")/.."
suite=bookworm
user=10001
job=00000000-0000-4000-8000-000000000001
fail() { echo "image-root: $*" >&2; exit 1; }
bytes() { du -sb --one-file-system "$1" | cut -f1; }

make_root() {
    local binary=$1 root=$2 base=$2.base stage
    if [ ! -e "$root/etc/debian_version" ]; then
        debootstrap --variant=minbase "$suite" "$root" >"$root.log" || fail "debootstrap failed; its log is $root.log"
        rm -rf "$root.log" "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
        bytes "$root" >"$base"
    fi
    stage=$(mktemp -d)
    # As the Dockerfile does it.
    strip -o "$stage/brightrun" "$binary"
    scripts/image-files.sh "$stage/brightrun" "$stage/image"
    cp -a --no-preserve=ownership "$stage/image/." "$root/"
    rm -rf "$stage"
    echo "binary: $(stat -c %s "$root/usr/local/bin/brightrun") bytes"
    echo "base: Debian $(cat "$root/etc/debian_version"), $(cat "$base") bytes; whole root: $(bytes "$root") bytes"
}

# In the image's environment, as its user.
in_image() {
    env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/scratch SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
        BRIGHTRUN_VOLUMES=/scratch/volume BRIGHTRUN_ALLOW_PRIVATE_URLS=1 BRIGHTRUN_REPORT_S=0.5 RAYON_NUM_THREADS=2 "${environment[@]}" \
        chroot --userspec=$user:$user "$root" "$@"
}

mount_root() {
    mount --make-rprivate /
    mount --bind "$root" "$root"
    mount -t proc proc "$root/proc"
    for node in null zero full random urandom; do
        [ -e "$root/dev/$node" ] || touch "$root/dev/$node"
        mount --bind "/dev/$node" "$root/dev/$node"
    done
    mount -t tmpfs -o mode=1777,nosuid,nodev,noexec scratch "$root/scratch"
    mkdir -p "$root/scratch/volume/models/brightrun"
    cp -r examples/demo/model "$root/scratch/volume/models/brightrun/demo"
    chown -R $user:$user "$root/scratch/volume"
    mount -o remount,bind,ro "$root"
    ip link set lo up
}

check_surroundings() {
    in_image /bin/sh -c ': > /usr/probe' 2>/dev/null && fail "the root can be written"
    in_image /bin/sh -c ': > /scratch/probe' || fail "/scratch cannot be written"
    in_image /bin/sh -c 'command -v python3 nvcc' && fail "there is a python3 or an nvcc"
    echo "in the image: user $(in_image /usr/bin/id -u), root read-only, no python3, no nvcc, needs" \
        $(in_image /usr/bin/ldd /usr/local/bin/brightrun | awk '{print $1}')
    in_image /usr/local/bin/brightrun --version
}

start_simulator() {
    echo "{\"id\": \"$job\", \"status\": \"initializing\"}" >"$work/row.json"
    "$simulator" --port 0 --files examples/demo --row "$work/row.json" --data "$work/objects" >"$work/simulator.log" 2>&1 &
    simulator_pid=$!
    for _ in $(seq 100); do grep -q '^# files' "$work/simulator.log" && break; sleep 0.1; done
    url=$(sed -n "s/^export SUPABASE_URL='\(.*\)'/\1/p" "$work/simulator.log")
    mapfile -t environment < <(sed -n "s/^export \(.*\)='\(.*\)'/\1=\2/p" "$work/simulator.log")
}

run_job() {
    local seconds input
    input="{\"input\": {\"job_id\": \"$job\", \"dataset_url\": \"$url/files/pairs.jsonl\", \"hyperparameters\": {\"base_model\": \"brightrun/demo\",
        \"learning_rate\": 0.005, \"batch_size\": 8, \"epochs\": 3, \"rank\": 8, \"alpha\": 16, \"dropout\": 0.05}, \"config\": {\"sequence_len\": 512}}}"
    environment+=(BRIGHTRUN_DEVICE=cpu RUNPOD_LOG_LEVEL=INFO)
    seconds=$SECONDS
    in_image /usr/local/bin/brightrun worker --test_input "$input" >"$work/worker.log" 2>&1 || { cat "$work/worker.log"; fail "the worker failed"; }
    seconds=$((SECONDS - seconds))
    # The answer is the last object that was printed.
    sed -n '/^{$/,/^}$/p' "$work/worker.log" >"$work/answer.json"
    python3 - "$work/answer.json" >"$work/url" <<'PYTHON' || { cat "$work/worker.log"; fail "the answer is not that of a finished job"; }
import json, sys
output = json.load(open(sys.argv[1]))["output"]
assert output["status"] == "completed", output
assert "adapter_model.safetensors" in output["model_files"], output
print(output["adapter_download_url"])
PYTHON
    curl -sSf -o "$work/adapter.tar.gz" "$(cat "$work/url")"
    tar -tzf "$work/adapter.tar.gz" >"$work/entries"
    grep -qx adapter/adapter_model.safetensors "$work/entries" || fail "the archive has no weights: $(cat "$work/entries")"
    curl -sSf "$url/rest/v1/pipeline_training_jobs?select=status,progress&id=eq.$job" -H 'apikey: service-key' -H 'Authorization: Bearer service-key' >"$work/row"
    grep -q '"status":"completed"' "$work/row" || fail "the row says $(cat "$work/row")"
    echo "job: completed in $seconds s; archive of $(stat -c %s "$work/adapter.tar.gz") bytes with $(wc -l <"$work/entries") files; row $(cat "$work/row")"
}

# As the image has it, with a queue and no GPU: it must say why it does not start.
check_without_gpu() {
    environment+=(BRIGHTRUN_DEVICE=cuda)
    in_image /usr/local/bin/brightrun worker >"$work/cuda.log" 2>&1 && fail "a worker without a GPU started"
    echo "BRIGHTRUN_DEVICE=cuda without a GPU: $(grep ERROR "$work/cuda.log" | tail -1)"
}

if [ "${1:-}" = --inside ]; then
    root=$2 simulator=$3
    work=$(mktemp -d)
    simulator_pid= environment=()
    trap '[ -z "$simulator_pid" ] || kill "$simulator_pid"; rm -rf "$work"' EXIT
    mount_root
    check_surroundings
    start_simulator
    run_job
    check_without_gpu
    exit
fi
[ $# -ge 2 ] || fail "expected BINARY ROOT [SIMULATOR]"
[ "$(id -u)" = 0 ] || fail "debootstrap, chroot and mounts want root"
mkdir -p "$2"
root=$(realpath "$2")
make_root "$1" "$root"
unshare --mount --net --pid --fork --kill-child "$BASH" scripts/image-root.sh --inside "$root" "$(realpath "${3:-$(dirname "$1")/brightrun-sim}")"
