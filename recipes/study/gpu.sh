#!/usr/bin/env bash
# The study on one GPU in at most eight minutes, from the world to the tables; what is finished by then is written.
#
#   recipes/study/gpu.sh TRUTH OUTPUT_DIR [WHEELS]    WHEELS: a folder of wheels that the machine lacks, such as datasets
#   recipes/study/gpu.sh --rehearse TRUTH OUTPUT_DIR  the same on a CPU at tiny size
#
# The same command goes on where it was stopped. Needs no network.
set -euo pipefail
cd "$(dirname "$0")/../.."
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 PYTHONUNBUFFERED=1
plan=recipes/study/gpu.yaml device=cuda
if [ "${1:-}" = --rehearse ]; then plan=recipes/study/tiny.yaml device=cpu; shift; fi
if [ $# -lt 2 ]; then sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2; fi
if [ -n "${3:-}" ]; then
    python3 -m pip install -q --no-index --no-deps --no-compile --target "$2/wheels" "$3"/*.whl
    export PYTHONPATH="$2/wheels"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
status=0
timeout 460 "${PYTHON:-python3}" recipes/study/run.py --plan "$plan" --truth "$1" --output_dir "$2" --device "$device" || status=$?
cat "$2"/results/*.md
exit $status
