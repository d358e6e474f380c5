#!/usr/bin/env bash
# Trains a multi-response and a single-response reward model on one file, and evaluates both in one table.
#
#   examples/compare.sh [--config FILE.yaml] [--out FOLDER] [YOJO TRAIN OPTIONS] [-- BENCHMARK DATA [YOJO EVAL OPTIONS]]
#
#   examples/compare.sh                                     # digits, on a CPU in minutes; --max_steps 20 to see it run
#   examples/compare.sh --config run.yaml --out run -- preferences held_out.jsonl
#   examples/compare.sh --config run.yaml --out run -- vl-rewardbench DATA        # the same two models, another table
#
# multi judges all responses in one row: comparative mode; loss and max_responses as the file says. single judges each
# response alone: isolated mode, Bradley-Terry on a pair of responses, drawn anew from each example in every epoch. All
# else is the same: backbone, data, LoRA, rates, steps, examples of a step, seeds; so a step shows multi N responses of
# an example, and single two. The file's mode and output_dir are not used. The table also has multi-permutations, multi
# in four orders in one row, averaged; and multi-isolated, multi with each response alone, as it was not trained.
#
# What is in FOLDER (comparison) is kept: a run that was cut goes on from its last checkpoint. YOJO is the command
# (yojo), LAUNCH the one that trains, such as "accelerate launch --config_file FILE -m yojo.cli".
set -euo pipefail

fail() { echo "error: $1" >&2 && exit 2; }

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
config='' out=comparison options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case ${1//-/_} in
        _h | __help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}" && exit ;;
        __config=* | __out=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
        __config) config=${2:-} && [ -f "$config" ] || fail "--config: no such file: '$config'" && shift 2 ;;
        __out) out=${2:-} && [ -n "$out" ] || fail "--out needs a folder" && shift 2 ;;
        __mode | __mode=* | __output_dir* | __resume_from_checkpoint*) fail "${1%%=*} is set by the comparison" ;;
        *) options+=("$1") && shift ;;
    esac
done
held_out=("${@:2}")
case " ${held_out[*]-} " in
    *" --judge"* | *" --out"*) fail "--judge and --out are set by the comparison; for more judges call yojo eval" ;;
    *" -"*) [[ ${held_out[0]} != -* ]] || fail "behind -- the benchmark comes first, got ${held_out[0]}" ;;
    "  ") [ -z "$config" ] || fail "say what to evaluate on: -- preferences FILE, or -- BENCHMARK DATA" ;;
esac
yojo=${YOJO:-yojo} && launch=${LAUNCH:-$yojo}

mkdir -p "$out"
if [ -z "$config" ]; then # pooling last: a response's own last token is read in fewer steps than a new separator
    config=$root/examples/digits.yaml data=$out/digits
    [ -d "$data" ] || { $yojo demo --data "$data.writing" && mv "$data.writing" "$data"; }
    options=(--model "$root/yojo/demo/backbone" --train_data "$data/train.jsonl" --eval_data "$data/held_out.jsonl"
        --pooling last ${options[@]+"${options[@]}"})
    [ ${#held_out[@]} -gt 0 ] || held_out=(preferences "$data/held_out.jsonl")
fi

train() { # NAME, and what is its own
    local folder=$out/$1 resume=() found now
    set -- --config "$config" ${options[@]+"${options[@]}"} "${@:2}" --output_dir "$folder"
    now=$(cksum <"$config" && printf ' %q' "$@")
    for found in "$folder"/checkpoint-*; do [ ! -d "$found" ] || resume=(--resume_from_checkpoint last); done
    if [ -f "$folder/trainer_state.json" ] || [ ${#resume[@]} -gt 0 ]; then
        [ "$now" = "$(cat "$folder.options")" ] || fail "other options made it: $folder.options; take another --out"
    fi
    [ ! -f "$folder/trainer_state.json" ] || { echo "$folder is there" && return; }
    echo "$now" >"$folder.options"
    $launch train "$@" ${resume[@]+"${resume[@]}"}
}

{ # which is read whole before hours pass and this file may change
    # Held-out records that cannot be read, and a file that has no isolated mode, are refused before hours of training.
    [ -f "$out/multi/trainer_state.json" ] || $yojo eval "${held_out[@]}" --judge length >/dev/null ||
        { code=$? && [[ $code = 1 && " ${held_out[*]} " = *" --skip-bad "* ]] || exit $code; }
    train single --mode isolated --permutations 1 --loss bradley_terry --max_responses 2
    train multi --mode comparative
    $yojo eval "${held_out[@]}" --out "$out/${held_out[0]}" --judge "multi=$out/multi" --judge "single=$out/single" \
        --judge "multi-permutations=$out/multi#permutations=4" --judge "multi-isolated=$out/multi#isolated"
    exit
}
