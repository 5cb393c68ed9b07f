#!/usr/bin/env bash
# The data of small.yaml: a vocabulary of 4096 trained on the seven domains, and each of them as Megatron files.
#
#   examples/reproduce/scales/small_data.sh CORPUS DATA     CORPUS/train holds <domain>.jsonl.zst
set -euo pipefail
corpus=${1:?the folder with train/<domain>.jsonl.zst}
data=${2:?the folder to write}
[[ -f "$data/bpe.json" ]] ||
    python tools/train_tokenizer.py --input "$corpus/train" --vocab-size 4096 --output "$data/bpe.json"
for domain in arxiv book c4 commoncrawl github stackexchange wikipedia; do
    [[ -f $data/$domain.idx ]] ||
        python tools/preprocess_data.py --input "$corpus/train/$domain.jsonl.zst" --output-prefix "$data/$domain" \
            --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$data/bpe.json" --append-eod
done
touch "$data/complete"
