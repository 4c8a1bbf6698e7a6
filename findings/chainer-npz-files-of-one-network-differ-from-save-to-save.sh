#!/usr/bin/env bash
# chainer.serializers.save_npz writes the arrays of a network in another order in every process: a Chain keeps
# the names of its children in a set, and the order of a set of texts depends on PYTHONHASHSEED.
#
# So two saves of equal networks are different files (no cache by checksum, no comparison of files), and the
# order of the layers in a file says nothing about their order in the network. With PYTHONHASHSEED=0 the files
# are the same. NumPy's own savez keeps the order in which it is given arrays.
#
# Versions: chainer 7.8.1, numpy 1.23.5, Python 3.11. Found 29 November 2026.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  "setuptools<60" wheel numpy==1.23.5
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-build-isolation \
  numpy==1.23.5 chainer==7.8.1
cat >"$folder/save.py" <<'PYTHON'
import hashlib
import sys

import chainer
import chainer.links as L
import numpy as np

np.random.seed(0)
network = chainer.Chain()
with network.init_scope():
    for index in range(6):
        setattr(network, f"bn{index}", L.BatchNormalization(4))
path = sys.argv[1]
chainer.serializers.save_npz(path, network, compression=False)
with np.load(path) as file:
    layers = list(dict.fromkeys(name.partition("/")[0] for name in file.files))
    together = np.concatenate([np.ravel(file[name]) for name in sorted(file.files)])
print(*layers, hashlib.sha256(together.tobytes()).hexdigest())
PYTHON
cd "$folder"
run() { PYTHONHASHSEED=$1 venv/bin/python -W ignore save.py "$2"; }
for seed in 1 2 3 4; do
  run "$seed" "$seed.npz" | tee -a said.txt
done
[ "$(cut -d ' ' -f 7 said.txt | sort -u | wc -l)" = 1 ] || { echo "other numbers were saved"; exit 1; }
[ "$(cut -d ' ' -f 1-6 said.txt | sort -u | wc -l)" -gt 1 ] || { echo "the behaviour has changed"; exit 1; }
run 0 a.npz >one.txt
run 0 b.npz >two.txt
cmp one.txt two.txt
echo "equal numbers in every file, the layers in another order each time"
