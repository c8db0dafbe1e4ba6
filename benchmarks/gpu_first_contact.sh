#!/bin/sh
# Everything that only a GPU can tell, in one command of under nine minutes; nothing is installed or downloaded.
#
#   OUT=FOLDER benchmarks/gpu_first_contact.sh             on an NVIDIA GPU of compute capability 8.0 or more
#   OUT=FOLDER benchmarks/gpu_first_contact.sh --rehearse  the same commands on a CPU with a tiny model: no number counts
#
# Each part has a limit of its own, and its failure is its own: the rest goes on. FOLDER gets at most eight files;
# summary.txt says how each part ended. The exit code is the number of parts that failed.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
mkdir -p "${OUT:?name the folder for the results: OUT=FOLDER $0}"
OUT=$(cd "$OUT" && pwd)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false
BEGAN=$(date +%s)
BUDGET=520
FAILED=0
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
: >"$OUT/summary.txt"

left() { echo $((BUDGET - $(date +%s) + BEGAN)); }

# part NAME LIMIT FILE COMMAND...: the output goes to the end of FILE, how it ended to the summary.
part() {
  name=$1 limit=$2 file=$OUT/$3
  shift 3
  rest=$(left)
  [ "$rest" -lt "$limit" ] && limit=$rest
  began=$(date +%s)
  if [ "$limit" -lt 10 ]; then
    how="not begun: the $BUDGET s were used up"
    FAILED=$((FAILED + 1))
  elif timeout -k 5 "$limit" "$@" >>"$file" 2>&1; then
    how=passed
  else
    code=$?
    how="FAILED with $code"
    [ "$code" -ge 124 ] && how="STOPPED after its $limit s"
    FAILED=$((FAILED + 1))
  fi
  echo "$name: $how, $(($(date +%s) - began)) s" | tee -a "$OUT/summary.txt"
}

if [ "${1-}" = --rehearse ]; then
  DEVICE=cpu SIZE=tiny QUICK=--quick CONTEXT=64 STEPS=8 SMALL="--layers 1 --vocab 2048 --rounds 1"
else
  DEVICE=cuda SIZE=2b QUICK="" CONTEXT=512 STEPS=32 SMALL="--layers 18 --rounds 1"
fi

# The most telling first: whatever hangs or breaks later, this is there. $QUICK and $SMALL are several words, or none.
part machine 20 machine.txt sh -c 'nvidia-smi; "$0" -m gemmakit.cli env; "$0" -m gemmakit.cli doctor' "$PYTHON"
part tests 75 tests.txt "$PYTHON" -m pytest -p no:cacheprovider -rs -k "on_a_gpu" tests/unit/triton
# Its parts end with its own budget; the limit here is for a process that does not.
part recipe 285 recipe.txt "$PYTHON" benchmarks/gpu.py --device $DEVICE --size $SIZE $QUICK --budget 260 --json "$OUT/recipe.json"
for scheme in "" "--quantize int4"; do
  part "profile ${scheme:-bfloat16}" 45 profile.txt \
    "$PYTHON" benchmarks/step_profile.py --device $DEVICE --size $SIZE --context $CONTEXT --steps $STEPS $scheme
done
part "Flax weights" 40 flax.txt "$PYTHON" benchmarks/flax_decode.py "$SCRATCH/flax" --make $SMALL
part "Flax decode" 100 flax.txt "$PYTHON" benchmarks/flax_decode.py "$SCRATCH/flax" --sides flax --few 17 --many 24 \
  --rounds 1 --out "$OUT/flax.json"
echo "$FAILED parts failed; $(($(date +%s) - BEGAN)) s in all" | tee -a "$OUT/summary.txt"
exit "$FAILED"
