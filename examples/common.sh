# shellcheck shell=bash
# What the pretrain_*.sh share; they source it.
#
#   DATA        folder of the seven domains of SlimPajama as Megatron files (tools/preprocess_data.py)
#   RUNS        folder for checkpoints, metrics and the report; default runs/<size>
#   SELECTIONS  what to train, one after the other; default "clm eslm random"
#   LAUNCH      what starts the processes; default 8 GPUs of this machine. The launch_*.sh set it
#
# Flags go to every run and win over examples/paper.yaml. Interrupted runs continue when the script is started again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${DATA:?set DATA to the folder of the .bin/.idx files}"
read -ra selections <<<"${SELECTIONS:-clm eslm random}"
# By eval, since words in LAUNCH may be quoted.
declare -a launch
eval "launch=(${LAUNCH:-deepspeed --num_gpus 8})"

# SlimPajama-6B-Unif of Table 6: every domain with the same share of tokens.
mixture=()
for domain in arxiv book commoncrawl c4 github stackexchange wikipedia; do
    mixture+=(1 "$DATA/$domain")
done

# pretrain SIZE [FLAG...]: the paper's run of that size with each selection on the same data, then the table.
pretrain() {
    local size=$1 runs=${RUNS:-runs/$1} selection files=()
    shift
    for selection in "${selections[@]}"; do
        files+=("$runs/$selection.jsonl")
        "${launch[@]}" pretrain_gpt.py --model-size "$size" --config examples/paper.yaml \
            --data-path "${mixture[@]}" --selection "$selection" \
            --save "$runs/$selection" --load "$runs/$selection" --metrics-file "$runs/$selection.jsonl" "$@"
    done
    python tools/compare_runs.py "${files[@]}" --output-prefix "$runs/report"
}
