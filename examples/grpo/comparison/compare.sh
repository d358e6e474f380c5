#!/usr/bin/env bash
# GRPO on digits with multi-response and single-response reward models, and with the true answer: the paper's comparison, in small.
#
#   examples/grpo/comparison/compare.sh [OUT [SEED ...]]     # grpo-comparison, seeds 0 1 2: about two hours of CPU time
#
# A seed trains reward models of its own (OUT/seedN), draws images and samples captions; the policy begins as the same weak
# captioner (OUT/policy). Figures of each run go to OUT/results, a table and a plot are made of them at the end. What is there
# whole is kept: the same command goes on behind a run that was cut. JOBS runs at a time (2), each on one thread; PYTHON is
# the interpreter (python).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${1:-grpo-comparison}
case $out in -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}" && exit ;; esac
seeds=("${@:2}")
[ ${#seeds[@]} -gt 0 ] || seeds=(0 1 2)
for seed in "${seeds[@]}"; do
    [[ $seed =~ ^[0-9]+$ ]] || { echo "error: seeds are whole numbers, got '$seed'" >&2 && exit 2; }
done
python=${PYTHON:-python}
case $python in */*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;; esac
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
export PYTHONPATH=$here/../../..${PYTHONPATH:+:$PYTHONPATH}

mkdir -p "$out" && cd "$out" # so that the judges' names in the results say nothing of this machine
$python "$here/captioner.py" policy
for seed in "${seeds[@]}"; do echo "$seed"; done |
    xargs -P "${JOBS:-2}" -I{} $python "$here/reward_models.py" seed{} --seed {}

run() { # NAME SEED REWARD [JUDGE]
    $python "$here/train.py" "results/$1-seed$2.jsonl" --policy policy --seed "$2" --reward "$3" ${4:+--judge "$4"} \
        >"results/$1-seed$2.log" 2>&1 || { tail -n 3 "results/$1-seed$2.log" >&2 && exit 255; } # 255 ends xargs
}
export -f run && export here python
mkdir -p results
for seed in "${seeds[@]}"; do
    echo "truth $seed truth"
    echo "single $seed judge seed$seed/single"
    echo "multi $seed judge seed$seed/multi"
    echo "multi-4 $seed judge seed$seed/multi#permutations=4"
    echo "wide $seed judge seed$seed/wide"
done | xargs -P "${JOBS:-2}" -L 1 bash -c 'run "$@"' run
$python "$here/report.py" results --plot grpo.png
