#!/usr/bin/env bash
# Installs the peers beside the torch that is already there, and never another torch.
# usage: benchmarks/install_peers.sh PYTHON
set -euo pipefail
python="${1:?usage: install_peers.sh PYTHON}"
here="$(cd "$(dirname "$0")" && pwd)"
constraints="$(mktemp)"
trap 'rm -f "$constraints"' EXIT
"$python" -c 'from importlib.metadata import version as v
print("torch==" + v("torch"), "numpy==" + v("numpy"), sep="\n")' > "$constraints"
"$python" -m pip install -q -c "$constraints" -r "$here/requirements-support.txt"
# BackPACK asks for torchvision, which only its examples use.
"$python" -m pip install -q --no-deps -r "$here/requirements.txt"
