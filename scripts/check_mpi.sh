#!/usr/bin/env bash
# Models over MPI between two hosts that are network namespaces, joined by a pair of virtual
# Ethernet devices. As root, with iproute2 and `pip install graph-runtime[mpi]` of MPICH:
#     scripts/check_mpi.sh [MODEL]
# Logits must be the bits of one process with two devices, and a killed process must end all.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
a=runtime-a-$$ b=runtime-b-$$
one=10.231.7.1 two=10.231.7.2

cleanup() {
    ip netns del "$a" 2>/dev/null || true
    ip netns del "$b" 2>/dev/null || true
    rm -rf "$work"
}
trap cleanup EXIT

ip netns add "$a"
ip netns add "$b"
ip link add veth0 netns "$a" type veth peer name veth0 netns "$b"
for pair in "$a $one" "$b $two"; do
    read -r name address <<<"$pair"
    ip -n "$name" addr add "$address/24" dev veth0
    ip -n "$name" link set veth0 up
    ip -n "$name" link set lo up
done
for name in "$a" "$b"; do  # a link is said to be up only after a moment
    until ip -n "$name" -br link show veth0 | grep -q ' UP '; do sleep 0.1; done
done

# In place of ssh: options, a host and a command; the host is a namespace. (`-launcher fork` with
# several hosts would start everything here.)
cat >"$work/nssh" <<EOF
#!/usr/bin/env bash
while [[ \$1 == -* ]]; do shift; done
[[ \$1 == $two ]] && name=$b || name=$a
shift
exec ip netns exec \$name bash -c "\$*"
EOF
chmod +x "$work/nssh"

cat >"$work/logits.py" <<'EOF'
import os, sys, time
import numpy as np
import runtime
from functools import partial
from runtime.backends.meta import parts, tensor

# devices of one process that sum as those of several do
tensor.TensorBackend = partial(tensor.TensorBackend, split=parts.inferred)
out, path, devices = sys.argv[1], sys.argv[2] or None, sys.argv[3]
started = time.monotonic()
with runtime.load(path, devices=devices, threads=len(devices.split(",")), kv_type="f32") as model:
    ids = [n % 50 + 3 for n in range(40)]
    with model.session() as session:
        found = [session.eval(ids)]
        for _ in range(24):
            found.append(session.eval([int(found[-1][-1].argmax())]))
np.savez(out, *found)
print(f"{devices}: {time.monotonic() - started:.1f} s; network namespace",
      os.readlink("/proc/self/ns/net"))
EOF

# The two are one machine, whose memory they would exchange by.
over_hosts() {
    ip netns exec "$a" env PYTHONPATH="$here" UCX_TLS=tcp,self \
        timeout 120 mpiexec -launcher-exec "$work/nssh" \
        -hosts "$one,$two" -n 2 -ppn 1 "$@"
}

python=$(command -v python)
over_hosts "$python" "$work/logits.py" "$work/mpi.npz" "${1-}" "tensor(mpi)" </dev/null
PYTHONPATH=$here "$python" "$work/logits.py" "$work/one.npz" "${1-}" "tensor(cpu:0,cpu:1)"
"$python" - "$work/mpi.npz" "$work/one.npz" <<'EOF'
import sys
import numpy as np

mpi, one = map(np.load, sys.argv[1:])
assert list(mpi) == list(one) and all(np.array_equal(mpi[n], one[n]) for n in mpi)
print(f"{len(list(one))} steps: the same bits")
EOF

sent() { ip netns exec "$a" cat /sys/class/net/veth0/statistics/tx_bytes; }
echo "sent by the first host: $(sent) bytes"

for killed in 1 0; do
    over_hosts "$python" -m runtime run ${1:+"$1"} -dev "tensor(mpi)" -t 1 --raw -p Once -n -1 \
        --ignore-eos -c 8192 </dev/null >"$work/said" 2>&1 &
    run=$!
    for _ in $(seq 200); do grep -q continuing "$work/said" && break; sleep 0.1; done
    sleep 1
    name=$([[ $killed == 0 ]] && echo "$a" || echo "$b")
    for pid in $(ip netns pids "$name"); do
        tr '\0' '\n' <"/proc/$pid/environ" 2>/dev/null | grep -qx "PMI_RANK=$killed" && kill -9 "$pid"
    done
    started=$(date +%s%N)
    code=0; wait "$run" || code=$?
    # mpiexec may be gone a moment before the last process is; 10 s are what all have
    for _ in $(seq 100); do
        left=$(cat <(ip netns pids "$a") <(ip netns pids "$b") | wc -l)
        [[ $left == 0 ]] && break
        sleep 0.1
    done
    echo "process $killed killed: all ended after $((($(date +%s%N) - started) / 1000000)) ms," \
        "exit status $code, $left left:"
    grep -a -e "has ended" -e "Killed" -e "BAD TERM" "$work/said" | head -3 || true
    [[ $code != 0 && $left == 0 ]]
done
