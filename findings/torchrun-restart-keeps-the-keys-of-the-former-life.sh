#!/usr/bin/env bash
# After a restart by torchrun (--max-restarts) its store still has the keys of the processes that died.
#
# A comment in torch/distributed/rendezvous.py has it that every retry gets a store of its own, so that keys need
# no prefix. With --standalone and --rdzv-backend c10d the store is the agent's, at the same address in every
# life, and nothing is removed from it. So what a program keeps there is met again: a barrier that counts who has
# arrived is passed at once by the first process of the second life, and a key that says "ready" or "stop" is
# still set. Nothing warns of it. Put TORCHELASTIC_RESTART_COUNT into the name of each key.
#
# The program below waits, as one does, until as many processes have arrived as there are. In the first life all
# wait for the slowest, then rank 1 dies. In the second, rank 0 does not wait for rank 1, which is 3 s late.
#
# Versions: torch 2.13.0, on the CPU with gloo. Found 30 November 2026.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0
cat >"$folder/program.py" <<'PYTHON'
import os
import sys
import time
from pathlib import Path

from torch.distributed import rendezvous

life, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
if rank == 1:
    time.sleep(3)
store, _, num_ranks = next(iter(rendezvous("env://")))
began = time.monotonic()
store.add("arrived", 1)
while store.add("arrived", 0) < num_ranks:
    time.sleep(0.01)
waited = time.monotonic() - began
print(f"life {life}, rank {rank}: waited {waited:.2f} s, {store.add('arrived', 0)} have arrived", flush=True)
if rank == 0:
    Path(sys.argv[1], str(life)).write_text(str(waited))
elif life == 0:
    time.sleep(1)
    sys.exit(1)
PYTHON
mkdir "$folder/waited"
OMP_NUM_THREADS=1 "$folder/venv/bin/torchrun" --standalone --nproc-per-node 2 --max-restarts 1 \
    "$folder/program.py" "$folder/waited" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
"$folder/venv/bin/python" - "$folder/waited" <<'PYTHON'
import sys
from pathlib import Path

first, second = (float(Path(sys.argv[1], life).read_text()) for life in "01")
assert first > 1, "in the first life rank 0 waits for rank 1"
assert second < 0.5, "in the second it does not: the counter was full"
PYTHON
echo "reproduced: the barrier of the second life was passed before all had arrived"
