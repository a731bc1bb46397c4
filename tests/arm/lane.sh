#!/usr/bin/env bash
# An ARM64 Python with numpy and onnxruntime that runs on this machine, emulated: no board, no container, no root file system.
#
#     tests/arm/lane.sh FOLDER [PYTHON]      makes FOLDER once (about 230 MB) and prints FOLDER/py
#     QEMU_CPU=cortex-a53 FOLDER/py -c '...'
#
# PYTHON (default python3) has the numpy and onnxruntime whose versions are taken.
# Needs Debian's qemu-user-static and mmdebstrap. How it works:
#   1. Debian's arm64 CPython is unpacked, not installed: no maintainer script runs, so nothing is emulated;
#   2. the aarch64 wheels are fetched and unpacked by this machine's pip;
#   3. byte code is compiled here: emulated, the imports alone would take a minute;
#   4. /proc/cpuinfo is an ARM one: older qemu shows the host's, on which onnxruntime crashes when imported.
set -euo pipefail

folder=$(realpath -m "${1:?usage: lane.sh FOLDER [PYTHON]}")
python=${2:-python3}
root=$folder/root
site=$folder/site
suite=bookworm  # has CPython 3.11, for which every wheel exists

qemu=$(command -v qemu-aarch64-static || command -v qemu-aarch64 || true)
if [ -z "$qemu" ] || ! command -v mmdebstrap >/dev/null; then
    echo "qemu-user-static and mmdebstrap are needed: apt-get install --no-install-recommends qemu-user-static mmdebstrap" >&2
    exit 1
fi
mkdir -p "$folder"
exec 9>"$folder/lock"
flock 9  # two runs at a time would unpack over each other

if [ ! -e "$folder/root.done" ]; then
    rm -rf "$root"
    mirror=$(sed -n 's/^URIs:[[:space:]]*\([^[:space:]]*\).*/\1/p' /etc/apt/sources.list.d/*.sources 2>/dev/null | head -1)
    mmdebstrap --quiet --variant=extract --arch=arm64 \
        --include=python3.11-minimal,libpython3.11-stdlib,libstdc++6 "$suite" "$root" ${mirror:+"$mirror"} >&2
    touch "$folder/root.done"
fi

versions=$("$python" -c 'from importlib.metadata import version as v; print(*(f"{n}=={v(n)}" for n in ("numpy", "onnxruntime")))')
if [ "$(cat "$folder/site.done" 2>/dev/null)" != "$versions" ]; then
    rm -rf "$site"
    # shellcheck disable=SC2086
    "$python" -m pip install --quiet --disable-pip-version-check --no-compile --target "$site" --only-binary=:all: \
        --implementation cp --python-version 3.11 --abi cp311 --abi abi3 --abi none \
        --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 \
        $versions >&2
    if command -v python3.11 >/dev/null; then
        env -u PYTHONDONTWRITEBYTECODE python3.11 -m compileall -q --invalidation-mode unchecked-hash \
            "$site" "$root/usr/lib/python3.11" >/dev/null 2>&1 || true  # some files of the library's own tests are meant not to compile
    fi
    echo "$versions" >"$folder/site.done"
fi

mkdir -p "$root/proc"
for core in 0 1; do
    printf 'processor\t: %d\nBogoMIPS\t: 100.00\nFeatures\t: fp asimd aes pmull sha1 sha2 crc32 cpuid\n' "$core"
    printf 'CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: 0xd03\nCPU revision\t: 4\n\n'
done >"$root/proc/cpuinfo"

cat >"$folder/py" <<PY
#!/bin/sh
# ARM64 Python under qemu; QEMU_CPU=cortex-a53|cortex-a72|cortex-a76|neoverse-n1|max
export QEMU_CPU="\${QEMU_CPU:-cortex-a53}" ORT_DISABLE_TELEMETRY=1 PYTHONDONTWRITEBYTECODE=1
export PYTHONPATH="$site"
exec "$qemu" -L "$root" -E PYTHONHOME="$root/usr" "$root/usr/bin/python3.11" "\$@"
PY
chmod +x "$folder/py"
echo "$folder/py"
