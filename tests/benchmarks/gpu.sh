#!/usr/bin/env bash
# First figures from a machine with a GPU, lent for minutes. `pack` is called here, all else there.
#
# The machine: one H200, Python 3.12, torch 2.11 (CUDA 13), no network, bare at every start; a call carries
# 64 MiB and lasts 10 minutes at most; it is given back 30 s after a call, and 30 minutes are lent in all. So the
# calls below follow at once, each with what it needs; what was written to /tmp is there while it stays warm.
#
# 1. Here, in the checkout that is sent, once (a minute or two; it makes .gpu/, which git ignores):
#        bash tests/benchmarks/gpu.sh pack ../shared/data
# 2. Three calls of `run`, each with timeout_s 600. Files come back under $OUT.
#        carry [".gpu/wheels", ".gpu/piece0"]
#            export OUT; G=tests/benchmarks/gpu.sh; bash $G keep && { bash $G correctness 180; bash $G steps 380; }
#        carry [".gpu/wheels", ".gpu/piece1"]
#            export OUT; G=tests/benchmarks/gpu.sh; bash $G keep && bash $G unpack && bash $G runs 500 --mode MODE
#        carry [".gpu/wheels"]
#            export OUT; G=tests/benchmarks/gpu.sh; bash $G keep && { bash $G bench 240; bash $G tests 200; }
#    MODE is what the first call printed as «fastest mode»; without --mode the second measures it again (2 minutes).
# 3. A machine that went cold between the calls has lost /tmp: `unpack` then says which piece is missing. Call
#    `keep` with the other piece again, or `runs` without CIFAR-10 (--synthetic), whose times alone are worth it.
#
# On a CPU, all of it in some minutes, with tiny networks:
#        OUT=/tmp/out bash tests/benchmarks/gpu.sh try ../shared/data
#
# Results are JSON lines, written as they are measured: a call that is killed keeps them.
set -uo pipefail
cd "$(dirname "$0")/../.."

SITE=/tmp/site   # packages that the machine lacks
KEPT=/tmp/cifar  # pieces of CIFAR-10, from several calls
DATA=/tmp/data   # its files
DEVICE=${DEVICE:-cuda}
OUT=${OUT:-/tmp/out}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD:$SITE TORCHINDUCTOR_CACHE_DIR=/tmp/inductor
# NAME==VERSION, as `make install` has them; the machine's own typer and typing-extensions may be older
WHEELS=(
  pydantic==2.14.4 pydantic-core==2.50.5 annotated-types==0.8.0 typing-inspection==0.4.5
  typing-extensions==4.16.0 typer==0.29.2 lazy-loader==0.6
)
RIVAL=(fvcore==0.1.5.post20221221 iopath==0.1.10 yacs==0.1.8 termcolor==3.3.0 portalocker==4.4.2 tabulate==0.10.0)
# quick tests that train, measure or certify; the network of tests/conftest.py is then on the GPU
TESTS=(
  tests/training tests/faults/test_resume.py tests/faults/test_bad_numbers.py tests/determinism
  tests/batchnorm/population tests/inference tests/cli/commands/test_train.py tests/cli/commands/test_eval.py
  tests/cli/commands/test_recalibrate.py tests/cli/commands/test_predict.py tests/test_runtime.py
)

pack() {  # DATA: the folder that holds cifar-10-batches-py
  local pip=("$PYTHON" -m pip --disable-pip-version-check -q) platform=()
  for number in 28 27 17; do platform+=(--platform "manylinux_2_${number}_x86_64"); done
  rm -rf .gpu && mkdir -p .gpu/wheels
  "${pip[@]}" download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platform[@]}" --platform manylinux2014_x86_64 -d .gpu/wheels "${WHEELS[@]}" || return
  "${pip[@]}" wheel --no-deps -w .gpu/wheels "${RIVAL[@]}" || return  # pure Python; two are sources only
  "$PYTHON" -m tests.benchmarks.gpu.data pack "$1" .gpu 50 || return
  du -sh .gpu/*
}

keep() {  # what this call carried, for it and the next
  mkdir -p "$KEPT" "$OUT"
  if [ ! -e "$SITE/pydantic" ]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" \
      .gpu/wheels/*.whl || return
  fi
  cp .gpu/piece*/* "$KEPT" 2>/dev/null
  "$PYTHON" -m pip list 2>/dev/null | grep -iE '^(torch|torchvision|triton|numpy|typer|rich|pydantic|matplotlib) '
  command -v nvidia-smi > /dev/null && nvidia-smi --query-gpu=name,driver_version,clocks.sm,power.limit --format=csv
  ls "$KEPT" | grep -c xz
}

unpack() { "$PYTHON" -m tests.benchmarks.gpu.data unpack "$KEPT" "$DATA" && echo "CIFAR-10 is whole, by SHA-256"; }

limited() {  # SECONDS NAME COMMAND...: what it prints goes to a file as well
  local seconds=$1 name=$2
  shift 2
  mkdir -p "$OUT"
  timeout --kill-after=10 "$seconds" "$@" 2>&1 | tee -a "$OUT/$name.txt"
  echo "$name: exit code ${PIPESTATUS[0]} (124: out of time)"
}

correctness() {  # SECONDS [OPTIONS]
  local seconds=$1
  shift
  limited "$seconds" correctness "$PYTHON" -m tests.benchmarks.gpu.correctness "$OUT" --device "$DEVICE" \
    --seconds $((seconds - 20)) "$@"
}

steps() {  # SECONDS [OPTIONS]: the card's peak and the time of a step; needs no CIFAR-10
  local seconds=$1
  shift
  limited "$seconds" steps "$PYTHON" -m tests.benchmarks.gpu.speed "$OUT" --device "$DEVICE" \
    --phases peak,steps,profile --seconds $((seconds - 20)) "$@"
}

runs() {  # SECONDS [--synthetic] [OPTIONS]: whole runs beside the rival's
  local seconds=$1 data=(--data "$DATA")
  shift
  if [ "${1:-}" = --synthetic ]; then data=() && shift; fi
  local phases=peak,runs
  case " $* " in *" --mode "*) ;; *) phases=peak,steps,runs ;; esac
  limited "$seconds" runs "$PYTHON" -m tests.benchmarks.gpu.speed "$OUT" --device "$DEVICE" "${data[@]}" \
    --phases "$phases" --seconds $((seconds - 20)) "$@"
}

bench() {  # SECONDS [--small]: ResNet-50 at batch 256; commands of bncli's own, as a user types them
  local third=$(($1 / 3)) batch=256 images=1024 side=224 network=resnet50 count=512
  if [ "${2:-}" = --small ]; then batch=4 images=8 side=32 network=resnet18 count=16; fi
  limited "$third" population "$PYTHON" -m tests.benchmarks.population --network "$network" --device "$DEVICE" \
    --images "$images" --batch-size "$batch" --image-size "$side" --rounds 5
  local run data
  run=$(mktemp -d)/run
  data="data={name: torchvision:FakeData, arguments: {size: $count, image_size: [3, $side, $side], num_classes: 10}}"
  limited "$third" bench-eval-network "$PYTHON" -m bncli train quickstart --run-dir "$run" --device "$DEVICE" \
    --set "$data" --set "model={name: torchvision:$network}" --set augment.crop_padding=0 \
    --set train.epochs=1 --set "train.batch_size=$((count / 8))" --set train.learning_rate=0.001
  limited "$third" bench-eval "$PYTHON" -m bncli bench eval "$run/last.pt" --device "$DEVICE" --set "$data" \
    --batch-size "$batch" --batches 4 --rounds 5 --calls 50
}

tests() {  # SECONDS: the quick tests above, with their network on the device
  BNCLI_TEST_DEVICE=$DEVICE limited "$1" tests "$PYTHON" -m pytest -q -n 8 --dist loadgroup -W default \
    -p no:cacheprovider -m "not slow" "${TESTS[@]}"
}

try() {  # DATA: everything above but the tests, small and on a CPU
  DEVICE=cpu
  SITE=/tmp/gpu-try/site KEPT=/tmp/gpu-try/cifar DATA=/tmp/gpu-try/data
  "$PYTHON" -m tests.benchmarks.gpu.data pack "$1" /tmp/gpu-try/pieces 50 || return
  mkdir -p "$KEPT" && cp /tmp/gpu-try/pieces/piece0/* "$KEPT" && cp /tmp/gpu-try/pieces/piece1/* "$KEPT" 
  unpack || return
  correctness 1200 --small
  steps 300 --small --modes eager
  "$PYTHON" -m bncli doctor --data-root "$DATA" | grep data  # that bncli takes the files; 50,000 images are too many
  runs 300 --synthetic --small --mode eager --seeds 2
  bench 600 --small
  rm -rf /tmp/gpu-try
}

[ $# -gt 0 ] || { sed -n '2,29s/^# \{0,1\}//p' "$0"; exit 2; }
"$@"
