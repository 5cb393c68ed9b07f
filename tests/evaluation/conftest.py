"""A random model as a checkpoint of ours and as the Hugging Face folder of it, and local tasks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_eslm.data.tokenizers.build import ByteTokenizer
from megatron_eslm.data.tokenizers.to_transformers import export_tokenizer
from megatron_eslm.interop.convert import checkpoint_to_folder, folder_to_checkpoint

from ..interop.conftest import random_gpt2, random_llama

POSITIONS = 64


@dataclass(frozen=True)
class Pair:
    """One model twice."""

    native: str
    """Folder of checkpoints; the vocabulary of 257 is padded to 384."""
    hf: str
    """Its export."""


@pytest.fixture(scope="session", params=["gpt2", "llama"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    if request.param == "gpt2":
        model = random_gpt2(n_positions=POSITIONS, n_head=2)
    else:
        model = random_llama(POSITIONS)
    model.save_pretrained(folder / "source")
    export_tokenizer(ByteTokenizer(), folder / "source", POSITIONS)
    folder_to_checkpoint(str(folder / "source"), str(folder / "native"), 128)
    checkpoint_to_folder(str(folder / "native"), str(folder / "hf"))
    return Pair(str(folder / "native"), str(folder / "hf"))


ANIMALS = ("a cat", "the dog", "some mice", "no fish at all", "a small horse", "an owl")


def write_tasks(folder: Path) -> Path:
    """A multiple choice, a last word, a generation and a perplexity; and groups of them."""
    folder.mkdir()
    for split, count in (("train", 6), ("validation", 11)):
        docs = [
            {
                "question": f"What did {number} of them see on day {number * number % 7}?",
                "choices": [ANIMALS[(number + i) % 6] for i in range(3)],
                "gold": number % 3,
                "text": " ".join(ANIMALS[(number * i) % 6] for i in range(1, 5)),
            }
            for number in range(count)
        ]
        lines = "".join(json.dumps(doc) + "\n" for doc in docs)
        (folder / f"{split}.jsonl").write_text(lines)
    head = f"""
dataset_path: json
dataset_kwargs:
  data_files: {{train: {folder}/train.jsonl, validation: {folder}/validation.jsonl}}
  cache_dir: {folder}/cache
training_split: train
validation_split: validation
metadata: {{version: 1.0}}
"""
    bodies = {
        "animals": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: gold
num_fewshot: 1
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
        "last_word": """
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
        "continued": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{question}}"
generation_kwargs: {until: ["\\n"], do_sample: false, max_gen_toks: 12}
metric_list: [{metric: exact_match}]
""",
        "texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}]
""",
    }
    for name, body in bodies.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{head}{body}")
    (folder / "both.yaml").write_text(
        "group: both\ntask: [animals, last_word]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    (folder / "changed.yaml").write_text(
        "group: changed\ntask: [{task: animals, num_fewshot: 2}]\n"
    )
    return folder


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("local") / "tasks")
