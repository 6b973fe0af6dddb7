#!/usr/bin/env bash
# rsaft's rewards beside the original packages: builds an environment for each, runs both sides, writes the table.
#   benchmarks/reward_parity/run.sh [FOLDER]     what is there is kept, so it can be stopped and run again
# Needs about 5 GB of disk (three environments and 1.8 GB of random ImageReward) and 6 GB of memory.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-build/reward_parity}
mkdir -p "$out/hub"
out=$(cd "$out" && pwd)
here=benchmarks/reward_parity
export OMP_NUM_THREADS=1 PYTHONPATH=. PYTHONWARNINGS=ignore HF_HUB_OFFLINE=1

environment() { # NAME: made once
  local python=$out/venv_$1/bin/python
  [ -e "$out/venv_$1/done" ] && return
  python3.11 -m venv "$out/venv_$1"
  "$python" -m pip install --quiet --requirement "$here/requirements/$1.txt"
  "$python" -m pip install --quiet --no-deps --no-build-isolation --requirement "$here/requirements/$1_without_dependencies.txt"
  touch "$out/venv_$1/done"
}

theirs() { # ENVIRONMENT SCRIPT CASE...: once for each case
  local name=$1 script=$2
  shift 2
  for case in "$@"; do
    [ -s "$out/$case.theirs.npz" ] || "$out/venv_$name/bin/python" "$here/$script" "$out" "$case"
    [ -s "$out/$case.ours.npz" ] || .venv/bin/python -m benchmarks.reward_parity.ours "$out" "$case"
  done
}

environment clip
theirs clip theirs_clip.py open_clip
theirs clip theirs_imscore.py imscore_mps imscore_aesthetic
# Before hpsv2 gets the file that its wheel lacks.
[ -s "$out/attempts.json" ] || "$out/venv_clip/bin/python" "$here/attempts.py" "$out/attempts.json"
theirs clip theirs_clip.py hpsv2
environment image_reward
theirs image_reward theirs_image_reward.py image_reward
environment hpsv3
.venv/bin/python -m benchmarks.reward_parity.hpsv3_ids "$out"
theirs hpsv3 theirs_hpsv3.py hpsv3
.venv/bin/python -m benchmarks.reward_parity.table "$out"
