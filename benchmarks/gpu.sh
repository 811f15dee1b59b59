#!/usr/bin/env bash
# What a GPU has to say of this library, in at most four minutes: what is worth most first, each part with a time limit of
# its own, results written after each, so that a run that is cut leaves what it has.
#
#   benchmarks/gpu.sh OUTPUT_DIR [WHEELS]      WHEELS: a folder of wheels that the machine lacks, such as datasets
#   benchmarks/gpu.sh --rehearse OUTPUT_DIR    the same on a CPU at tiny sizes
#
# Needs no network. What failed or ran out of time is in OUTPUT_DIR/parts.txt; the output of each part is beside it.
set -uo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 PYTHONUNBUFFERED=1
python=${PYTHON:-python3} device=cuda rehearse=
if [ "${1:-}" = --rehearse ]; then rehearse=1 device=cpu; shift; fi
if [ $# -lt 1 ]; then sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2; fi
out=$1; mkdir -p "$out"
if [ -n "${2:-}" ]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$out/wheels" "$2"/*.whl
    export PYTHONPATH="$out/wheels"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
: > "$out/parts.txt"
failed=0 patience=1  # the limits are a GPU's

part() {  # part NAME SECONDS COMMAND...: runs it, and notes how it ended
    local name=$1 limit=$(($2 * patience)) status=0 start=$SECONDS
    shift 2
    timeout "$limit" "$@" > "$out/$name.log" 2>&1 || status=$?
    [ $status = 0 ] || failed=1
    echo "$name: exit status $status after $((SECONDS - start)) s" | tee -a "$out/parts.txt"
}

# Sizes: MDLM-small at 1,024 tokens in bfloat16; rehearsed with next to nothing.
tests=(tests/test_gpu.py)
training=(benchmarks/training_cost.py --device $device --repetitions 3)
sampling=(benchmarks/sampling_speed.py --device $device)
scoring=(benchmarks/lm_eval_throughput.py --device $device)
if [ -n "$rehearse" ]; then
    export FPMGM_REHEARSE=1
    patience=6
    tiny=(--length 32 --hidden_size 64 --vocab_size 500)
    training+=("${tiny[@]}" --image_hidden_size 64 --batch_size 2 --repetitions 1)
    sampling+=("${tiny[@]}" --batch_sizes 1 --steps 2 --repetitions 1)
    scoring+=(--hidden_size 64 --vocab_size 500 --mc_num 8 --repetitions 1)
else
    tests+=(tests/test_no_waiting.py tests/models/test_head.py)
    sampling+=(--dtype bfloat16 --length 1024 --batch_sizes 8 --repetitions 3)
fi

part tests 60 "$python" -m pytest -q -p no:cacheprovider "${tests[@]}"
part training_text 50 "$python" "${training[@]}" --steps "plain MDLM" "MDLM" "FP-MDLM diagonal" \
    --output "$out/training_cost_text.json"
part sampling 60 "$python" "${sampling[@]}" --budgets 96 384 --output "$out/sampling_speed.json"
part training_more 40 "$python" "${training[@]}" --steps "FP-MDLM mlp" "consistency diagonal" "FP-MaskGIT diagonal" \
    --output "$out/training_cost_more.json"
if "$python" -c "import lm_eval" 2> /dev/null; then
    part lm_eval 30 "$python" "${scoring[@]}" --output "$out/lm_eval_throughput.json"
fi
exit $failed
