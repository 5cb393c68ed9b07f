#!/usr/bin/env bash
# The paper's 124M runs on one machine with 8 GPUs: plain, ESLM and the random control, then the table.
# Needs the seven domains of SlimPajama as Megatron files (tools/preprocess_data.py), named as below.
#
#   DATA=data/slimpajama examples/pretrain_124M.sh --train-iters 40000
#
# Arguments go to every run. Interrupted runs continue when the script is started again.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${DATA:?set DATA to the folder of the .bin/.idx files}"
RUNS=${RUNS:-runs/124M}

# SlimPajama-6B-Unif of Table 6: every domain with the same share of tokens.
mixture=()
for domain in arxiv book commoncrawl c4 github stackexchange wikipedia; do
    mixture+=(1 "$DATA/$domain")
done

for selection in clm eslm random; do
    deepspeed --num_gpus 8 pretrain_gpt.py --model-size 124M --bf16 --deepspeed_config ds_configs/zero1.json \
        --data-path "${mixture[@]}" --max-epochs 20 \
        --selection "$selection" --eslm-alpha 0.1 --eslm-proxy-layers 1 \
        --save "$RUNS/$selection" --load "$RUNS/$selection" --metrics-file "$RUNS/$selection.jsonl" "$@"
done
python tools/compare_runs.py "$RUNS"/{clm,eslm,random}.jsonl --output-prefix "$RUNS/report"
