#!/usr/bin/env bash
# Cross-compiles every kernel for aarch64 and looks for x86 in the result.
# Needs the Debian package g++-aarch64-linux-gnu.
# usage: tools/check_aarch64.sh PYTHON   (one that has pybind11, or pip to fetch it)
set -euo pipefail
python="$(realpath -s "${1:?usage: check_aarch64.sh PYTHON}")"
cd "$(dirname "$0")/.."
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"$python" -m pip install -qq --target "$work/tools" pybind11
flags="$("$python" -c 'import sysconfig; print("-I" + sysconfig.get_path("include"))')"
flags="$flags -I$work/tools/pybind11/include -Icsrc"
flags="$flags -O3 -std=c++17 -fvisibility=hidden -Wall -fopenmp -fno-math-errno"
flags="$flags -fno-trapping-math -Wno-psabi -DFM_ISA=generic -DFM_BASELINE"  # setup.py
for source in csrc/module.cpp csrc/cpu/*.cpp csrc/host/*.cpp; do
  # shellcheck disable=SC2086  # several flags
  aarch64-linux-gnu-g++ $flags -Werror -fPIC -c "$source" -o "$work/$(basename "$source").o"
  echo "  compiled $source"
done
# Python's symbols and OpenMP's are there at run time; others are missing files.
aarch64-linux-gnu-g++ -shared "$work"/*.o -o "$work/module.so"
if aarch64-linux-gnu-nm -DC --undefined-only "$work/module.so" | grep fastminima; then
  echo "undefined in the aarch64 module"
  exit 1
fi
if aarch64-linux-gnu-objdump -T "$work/module.so" | grep -iE 'avx|__cpu_model'; then
  echo "x86 symbols in the aarch64 module"
  exit 1
fi
aarch64-linux-gnu-readelf -h "$work/module.so" | grep Machine
