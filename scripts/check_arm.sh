#!/usr/bin/env bash
# Runs this checkout on emulated 64-bit Arm: which instruction set is chosen, the demo, logits of
# models bit for bit as on this machine with avx2, and the tests of kernels.
#
#   scripts/check_arm.sh [-d FOLDER] [-q] [CPU...]
#
#   -d FOLDER   keep what is fetched and compiled in FOLDER and use it again (a stopped run goes on)
#   -q          quick: the demo, two models and the tests of how a processor is recognised
#   CPU         of: max (arm_i8mm), cortex-a76 (arm_dotprod), cortex-a53 (generic); default: all
#
# Environment:
#   PYTHON      the Python of this machine that has this package's dependencies and pytest
#               (default: .venv/bin/python of the checkout if there is one, else python3)
#   ARM_APT     a line for apt with an arm64 mirror, "deb ...", where the system's has no arm64
#   GOLDEN      folder of further models, FOLDER/NAME/model-KIND.gguf (default: ../shared/golden)
#
# For Debian and Ubuntu on x86-64 with avx2, outside CI. It needs no root, no chroot, no mounts and
# no binfmt: apt and dpkg-deb unpack qemu and an arm64 Python into the folder, pip the wheels, and
# one program there, `python-arm`, stands for the machine. Kernels are compiled on this machine.
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
work='' quick=''
usage() { sed -n '2,/^set /p' "$0" | sed '/^set /d;s/^# \{0,1\}//'; }
die() { echo "check_arm: $*" >&2; exit 2; }

while getopts 'd:qh' option; do
  case $option in
    d) work=$OPTARG ;;
    q) quick=yes ;;
    h) usage; exit 0 ;;
    *) usage >&2; exit 2 ;;
  esac
done
shift $((OPTIND - 1))
[ $# -gt 0 ] || set -- max cortex-a76 cortex-a53

isa_of() {
  case $1 in
    max) echo arm_i8mm ;;
    cortex-a76) echo arm_dotprod ;;
    cortex-a53) echo generic ;;
    *) die "unknown processor $1: give max, cortex-a76 or cortex-a53" ;;
  esac
}
for cpu in "$@"; do isa_of "$cpu" > /dev/null; done

# ---- what this machine must have --------------------------------------------------------

[ "$(uname -sm)" = "Linux x86_64" ] || die "this is $(uname -sm): a Linux x86-64 machine is needed"
for program in apt-get dpkg-deb tar; do
  command -v $program > /dev/null || die "$program is missing: a Debian or Ubuntu system is needed"
done
grep -qw avx2 /proc/cpuinfo || die "this processor has no avx2, with which Arm is compared"
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x "$here/.venv/bin/python" ] && PYTHON=$here/.venv/bin/python
fi
pins=$("$PYTHON" "$here/scripts/arm_pins.py") ||
  die "set PYTHON to a Python with this package's dependencies: pip install '.[test]' in $here"

if [ -z "$work" ]; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
fi
mkdir -p "$work"
work=$(cd "$work" && pwd)
root=$work/root
arm=$root/usr/bin/python-arm

# ---- the machine ------------------------------------------------------------------------

apt() { # apt-get with lists, packages and a (blank) state of its own: nothing is installed here
  apt-get -q -o Dir::State::lists="$work/apt/lists" -o Dir::State::status="$work/apt/status" \
    -o Dir::Cache="$work/apt/cache" -o APT::Architecture=arm64 -o APT::Architectures::=arm64 \
    -o APT::Architectures::=amd64 -o APT::Sandbox::User="$(id -un)" -o Debug::NoLocking=1 \
    ${ARM_APT:+-o Dir::Etc::sourcelist="$work/apt/sources.list"} "$@"
}

stage() { # stage NAME: whether it is still to be done; `finished NAME` says that it is
  [ ! -e "$work/.$1" ] || return 1
  echo "fetching: $1"
}
finished() { touch "$work/.$1"; }

unpack() { # unpack DEB FOLDER
  dpkg-deb --fsys-tarfile "$1" | tar -x -C "$2" --keep-directory-symlink
}

if stage lists; then
  mkdir -p "$work/apt/lists/partial" "$work/apt/cache/archives/partial"
  : > "$work/apt/status"
  if [ -n "${ARM_APT:-}" ]; then
    { cat /etc/apt/sources.list 2> /dev/null || true; echo "$ARM_APT"; } > "$work/apt/sources.list"
  fi
  # A foreign source without arm64 is no failure: what is missing shows below.
  apt update > "$work/apt/log" 2>&1 || true
  finished lists
fi
if stage root; then
  apt install -y --no-install-recommends --download-only python3 libstdc++6 libgomp1 zlib1g \
    >> "$work/apt/log" 2>&1 || die "apt finds no arm64 Python ($(tail -n 1 "$work/apt/log")): \
remove $work/.lists and set ARM_APT to a line with an arm64 mirror (Ubuntu's is its ports mirror)"
  mkdir -p "$root"
  for deb in "$work"/apt/cache/archives/*.deb; do unpack "$deb" "$root"; done
  finished root
fi
if stage qemu; then
  mkdir -p "$work/qemu"
  # Debian 13 moved the static programs into qemu-user and left qemu-user-static empty.
  for package in qemu-user-static qemu-user; do
    (cd "$work/qemu" && apt download "$package:amd64" >> "$work/apt/log" 2>&1) || continue
    unpack "$work/qemu/$package"_*.deb "$work/qemu"
  done
  finished qemu
fi
qemu=
for program in "$work"/qemu/usr/bin/qemu-aarch64{-static,}; do
  if "$program" --version > /dev/null 2>&1; then qemu=$program; fi
done
[ -n "$qemu" ] || die "apt has no qemu-user that runs here ($(tail -n 1 "$work/apt/log"))"
guest=$(ls "$root/usr/bin" | grep -E '^python3\.[0-9]+$' | head -n 1)
[ -n "$guest" ] || die "no Python in $root: remove $work and try again"

if stage wheels; then
  "$PYTHON" -m pip install -q --disable-pip-version-check --upgrade \
    --target "$root/usr/lib/python3/dist-packages" --only-binary :all: --implementation cp \
    --python-version "${guest#python}" $(printf -- '--platform manylinux_2_%s_aarch64 ' 17 26 27 28) \
    --platform manylinux2014_aarch64 $pins > "$work/pip.log" 2>&1 ||
    die "pip finds no aarch64 wheels ($(tail -n 1 "$work/pip.log")) of: $pins"
  finished wheels
fi

cat > "$arm" << END
#!/bin/sh
# Python of the emulated machine; its compile processes are those of this one.
case "\$2" in
*"import serve"*) unset PYTHONPATH; exec "$PYTHON" "$here/scripts/arm_cross.py" "\$4" ;;
esac
exec "$qemu" -0 "\$0" -L "$root" "$root/usr/bin/$guest" "\$@"
END
chmod +x "$arm"

# ---- the checks -------------------------------------------------------------------------

failures=0
report() { # report STATUS WHAT: a line, and the end of the log where the check failed
  local word=ok
  if [ "$1" != 0 ]; then
    word=FAILED failures=$((failures + 1))
    tail -n 15 "$log" >&2
  fi
  printf '%-6s  %-11s %-11s %s, %d s\n' "$word" "$cpu" "$isa" "$2" $((SECONDS - began))
}
emulated() { QEMU_CPU=$cpu PYTHONPATH=$here:$here/scripts "$arm" "$@"; }
devices() { emulated -m runtime.cli devices --json | tr -d ' \n'; }

models=("demo=$here/runtime/data/demo.gguf")
golden=${GOLDEN:-$here/../shared/golden}
for path in "$golden"/*/model-*.gguf; do
  [ -e "$path" ] || continue
  name=$(basename "$(dirname "$path")") kind=$(basename "$path" .gguf)
  models+=("$name-${kind#model-}=$path")
done
[ ${#models[@]} -gt 1 ] || echo "no models in $golden: the demo is compared alone"
[ -z "$quick" ] || models=("${models[@]:0:3}")

tests=(features)
[ -n "$quick" ] || tests=(tile odd_tiles odd_sizes arm_code features instruction_sets simd \
  float_kernels elementwise_kernels attention_kernel cache_kernels delta_kernels moe_kernels \
  weight_packing gated_packs fused_attention fused_ffn executor quantising)

export RUNTIME_CACHE_DIR=$work/kernels
unset RUNTIME_CPU_ISA DEBUG VALIDATE PYTHONHOME
mkdir -p "$work/x86"
cpu=host isa=avx2 began=$SECONDS log=$work/x86.log status=0
RUNTIME_CPU_ISA=avx2 PYTHONPATH=$here "$PYTHON" "$here/scripts/arm_logits.py" "$work/x86" \
  "${models[@]}" > "$log" 2>&1 || status=$?
report $status "logits of ${#models[@]} models, to compare with"

for cpu in "$@"; do
  isa=$(isa_of "$cpu") log=$work/$cpu.log

  began=$SECONDS status=0
  devices > "$log" 2>&1 || status=$?
  grep -q "\"isa_selected\":\"$isa\"" "$log" || status=1
  report $status "chosen by itself"

  began=$SECONDS status=0
  for forced in arm_i8mm arm_dotprod generic; do
    wanted=cannot
    grep -q "\"isa_available\":\[[^]]*\"$forced\"" "$log" && wanted="\"isa_selected\":\"$forced\""
    RUNTIME_CPU_ISA=$forced devices > "$log.$forced" 2>&1 || true
    grep -q "${wanted}" "$log.$forced" || { status=1; cp "$log.$forced" "$log"; }
  done
  report $status "forced sets run, or name what is missing"

  began=$SECONDS status=0
  emulated -m runtime.cli run -n 40 --temp 0 > "$work/$cpu.story" 2> "$log" || status=$?
  [ -s "$work/$cpu.story" ] || status=1
  report $status "the demo tells its story"

  began=$SECONDS status=0
  rm -rf "${work:?}/$cpu" && mkdir "$work/$cpu"
  emulated "$here/scripts/arm_logits.py" "$work/$cpu" "${models[@]}" > "$log" 2>&1 || status=$?
  report $status "logits of ${#models[@]} models: threads and pieces change no bit"
  for named in "${models[@]}"; do
    for kind in int8 f32; do
      file=${named%%=*}-$kind began=$SECONDS status=0
      cmp "$work/x86/$file.npy" "$work/$cpu/$file.npy" > "$log" 2>&1 || status=$?
      report $status "$file: the bits of avx2"
    done
  done

  for name in "${tests[@]}"; do
    began=$SECONDS status=0 log=$work/$cpu-$name.log
    (cd "$here" && emulated -m pytest -p arm_plugin -p no:cacheprovider -o timeout=1800 \
      "tests/test_$name.py") > "$log" 2>&1 || status=$?
    report $status "test_$name: $(grep -E '(passed|failed|error|skipped)' "$log" | tail -n 1)"
  done
done

[ $failures = 0 ] || { echo "$failures checks failed; logs are in $work (kept with -d)"; exit 1; }
echo "all checks passed"
