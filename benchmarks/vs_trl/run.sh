#!/usr/bin/env bash
# rsaft's AlignProp beside TRL 0.23.1's: builds TRL's own environment, runs both in turn, writes the table.
#   benchmarks/vs_trl/run.sh [FOLDER]     finished runs are kept, so it can be stopped and run again
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-build/vs_trl}
mkdir -p "$out"
trl=$out/venv/bin/python
if ! "$trl" -c "import trl" 2>/dev/null; then
  python3.11 -m venv "$out/venv"
  "$trl" -m pip install --quiet --requirement benchmarks/vs_trl/requirements.txt
fi
export OMP_NUM_THREADS=1 PYTHONPATH=. PYTHONWARNINGS=ignore

one() { # NAME ARGUMENTS...: both sides, one after the other
  local name=$1
  shift
  for side in trl rsaft; do
    local file=$out/$name.$side.json python=$trl
    [ "$side" = trl ] || python=.venv/bin/python
    [ -s "$file" ] || "$python" -m "benchmarks.vs_trl.${side}_side" --pipeline "$out/pipeline" --out "$file" \
      --steps 20 --batch 8 "$@" 2>"$file.log"
    echo "$file"
  done
}

for seed in 0 1 2 3 4; do
  one "learn-2-$seed" --seed "$seed" --updates 60 --last 2
  one "learn-random-$seed" --seed "$seed" --updates 60
done
for last in 1 2 5 10; do
  one "time-$last" --seed 0 --updates 12 --last "$last"
done
# What is freed leaves the process at once; slower, so these runs are not timed.
export MALLOC_MMAP_THRESHOLD_=65536 MALLOC_TRIM_THRESHOLD_=65536
for last in 1 2 5 10; do
  one "memory-$last" --seed 0 --updates 4 --last "$last"
done
one memory-random --seed 0 --updates 8
.venv/bin/python -m benchmarks.vs_trl.table "$out"
