#!/usr/bin/env bash
# Installs without a compiler, and on request: what must hold where no kernel is built.
# usage: tools/check_install.sh PYTHON   (with torch; pip gets the build requirements)
set -euo pipefail
python="$(realpath -s "${1:?usage: check_install.sh PYTHON}")"
root="$(cd "$(dirname "$0")/.." && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
# A copy, so that the build folder of the checkout stays as it is.
git -C "$root" ls-files -z | (cd "$root" && xargs -0 cp --parents -t "$work")

site="$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

# Runs PYTHON on an installed folder and on its own packages, but without the .pth
# files of these: an editable fastminima among them would bring its kernels in.
run() { # FOLDER, arguments
  local folder="$work/$1"
  shift
  (cd "$folder" && PYTHONPATH="$folder:$site" "$python" -S -W ignore "$@")
}

install() { # NAME: the wheel of that name, into the folder of that name
  "$python" -m pip install -qq --no-deps --no-index --target "$work/$1" \
    "$work/wheels/$1"/*.whl
}

build() { # NAME, then environment settings
  local name="$1"
  shift
  (cd "$work/source" && rm -rf build && env "$@" "$python" -m pip wheel -v --no-deps \
    -w "$work/wheels/$name" . > "$work/$name.log" 2>&1) ||
    { tail -30 "$work/$name.log"; echo "the build '$name' failed"; return 1; }
}

report() { # NAME: the line of the report on the native kernels, from this install
  run "$1" -m fastminima | grep '^native'
}

expect() { # TEXT PATTERN
  grep -q -- "$2" <<< "$1" || { echo "expected '$2', got: $1"; exit 1; }
  echo "  $1"
}

echo "the source distribution:"
"$python" -m pip install -qq --target "$work/builders" build 'setuptools>=77' pybind11
(cd "$work" && PYTHONPATH="$work/builders" "$python" -m build --sdist --no-isolation \
  --outdir "$work/sdist" . > "$work/sdist.log" 2>&1) ||
  { tail -30 "$work/sdist.log"; echo "no source distribution"; exit 1; }
bash "$root/tools/check_sdist.sh" "$work"/sdist/*.tar.gz
# What follows is built from it.
mkdir "$work/source" && tar -xzf "$work"/sdist/*.tar.gz --strip-components 1 -C "$work/source"

echo "without a compiler:"
build none CC=/nonexistent CXX=/nonexistent
grep 'native kernels not built' "$work/none.log" | head -1
install none
expect "$(report none)" '^native .*not built: .*nonexistent'

echo "with FASTMINIMA_NATIVE=0:"
build off FASTMINIMA_NATIVE=0
install off
expect "$(report off)" '^native .*not built: FASTMINIMA_NATIVE=0'

echo "with FASTMINIMA_NATIVE=1 and no compiler:"
if build forced FASTMINIMA_NATIVE=1 CC=/nonexistent CXX=/nonexistent > "$work/forced.out"; then
  echo "a build that had to have kernels passed without them"
  exit 1
fi
echo "  the build is refused"

echo "with FASTMINIMA_CUDA=1 and no CUDA compiler that works:"
if build cuda FASTMINIMA_CUDA=1 FASTMINIMA_CUDA_ARCHS=1 > "$work/cuda.out"; then
  echo "a build that had to have CUDA kernels passed without them"
  exit 1
fi
grep -q 'FASTMINIMA_CUDA=1, but' "$work/cuda.log"
echo "  the build is refused"

echo "the references serve:"
run none - << 'PYTHON'
import torch, fastminima as fm
model = torch.nn.Linear(3, 2)
losses = model(torch.randn(4, 3)).square().sum(1)
stats = fm.GradientProbe(model).backward(losses)
assert stats.count == 4 and stats.is_finite
print(f"  tr Sigma = {stats.covariance_trace:.4f} from 4 samples")
PYTHON
