"""--train-data-path, --valid-data-path and --test-data-path: files of their own for each set."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_eslm.data.data_options import DataOptions
from megatron_eslm.data.mixture import Datasets, build_datasets
from megatron_eslm.data.plan import check_epochs, plan_mixture
from megatron_eslm.data.preprocess import preprocess
from megatron_eslm.data.source import open_data
from megatron_eslm.data.tokenizers.build import ByteTokenizer
from megatron_eslm.errors import ConfigError
from tests.data.conftest import make_documents

T = 32


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("apart")
    found = {}
    for seed, (name, documents) in enumerate({"a": 80, "b": 40, "c": 12, "d": 9}.items()):
        found[name] = str(folder / name)
        preprocess(["x"], found[name], ByteTokenizer(), documents=make_documents(documents, seed))
    return found


def build(options: DataOptions, train=60, valid=10_000, **more) -> Datasets:
    source = open_data(options)
    return build_datasets(
        source, options, seq_length=T, train_samples=train, valid_samples=valid, seed=3, **more
    )


def rows(dataset) -> list[tuple[int, ...]]:
    return [tuple(dataset[i]["tokens"].tolist()) for i in range(len(dataset))]


def test_training_reads_what_all_of_data_path_would(pairs):
    """Every document, in the same order; and other validation data change nothing about it."""
    words = ("3", pairs["a"], "1", pairs["b"])
    whole = build(DataOptions(data_path=words, split="1,0,0"), valid=0)
    for valid in ((pairs["c"],), ("1", pairs["c"], "2", pairs["d"])):
        apart = build(DataOptions(train_data_path=words, valid_data_path=valid))
        assert rows(apart.train) == rows(whole.train)
        assert [d.epochs for d in apart.report.domains] == [d.epochs for d in whole.report.domains]


def test_validation_and_test_have_domains_of_their_own(pairs):
    mixed = DataOptions(
        train_data_path=(pairs["a"],),
        valid_data_path=("1", pairs["c"], "1", pairs["d"]),
        test_data_path=(pairs["b"],),
    )
    data = build(mixed, test_samples=20)
    assert data.valid is not None and data.test is not None
    assert [d.name for d in data.train.source.domains] == ["a"]
    assert [d.name for d in data.valid.source.domains] == ["c", "d"]
    assert [d.name for d in data.test.source.domains] == ["b"]
    assert {data.valid.domain_of(i) for i in range(len(data.valid))} == {0, 1}
    assert len(data.test) == data.report.test_samples == 20
    # No sequence twice, and the smaller domain to its end.
    limits = [d.sequences["valid"] / d.weight for d in data.report.by_split["valid"]]
    assert abs(len(data.valid) - min(limits)) <= 2 and len(set(rows(data.valid))) == len(data.valid)
    # A set of one file is all of the file, whatever else is trained on.
    alone = build(DataOptions(train_data_path=(pairs["a"],), valid_data_path=(pairs["c"],)))
    other = build(DataOptions(train_data_path=(pairs["b"],), valid_data_path=(pairs["c"],)))
    assert rows(alone.valid) == rows(other.valid)
    assert len(alone.valid) == (open_data(mixed).of("valid").domains[0].tokens - 1) // T


def test_a_file_of_weights(pairs, tmp_path):
    (tmp_path / "w.yaml").write_text("a: 3\nb: 1\n")
    folder = str(Path(pairs["a"]).parent)
    words = (f"@{tmp_path / 'w.yaml'}", folder)
    options = DataOptions(train_data_path=words, valid_data_path=(pairs["c"],))
    assert options.train_data_path == ("3", pairs["a"], "1", pairs["b"])
    with pytest.raises(ConfigError, match=r"--valid-data-path @.*none: there is no file"):
        DataOptions(train_data_path=words, valid_data_path=(f"@{tmp_path / 'none'}", folder))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data_path": "a", "valid_data_path": "c"}, "--data-path and --valid-data-path are both"),
        ({"data_path": "a", "train_data_path": "b"}, "--data-path and --train-data-path are both"),
        ({"valid_data_path": "c"}, "--valid-data-path needs --train-data-path"),
        ({"test_data_path": "c", "valid_data_path": "d"}, "-data-path needs --train-data-path"),
        (
            {"train_data_path": "a", "valid_data_path": "c", "split": "98,1,1"},
            "--split 98,1,1 divides the documents of --data-path; it has no meaning with "
            "--train-data-path",
        ),
    ],
)
def test_forms_are_not_mixed(options, said):
    with pytest.raises(ConfigError, match=said):
        DataOptions(**{k: v if k == "split" else (v,) for k, v in options.items()})


def test_bad_files_are_named(pairs, tmp_path, gpt2):
    def refused(said: str, **paths: tuple[str, ...]) -> None:
        with pytest.raises(ConfigError, match=said):
            open_data(DataOptions(train_data_path=(pairs["a"],), **paths))

    refused(r"none: there is no file .*none\.bin", valid_data_path=(str(tmp_path / "none"),))
    refused("--valid-data-path names .*a, which --train-data-path", valid_data_path=(pairs["a"],))
    refused(
        "--test-data-path names .*c, which --valid-data-path",
        valid_data_path=(pairs["c"],),
        test_data_path=(pairs["c"],),
    )
    refused("--valid-data-path has 3 words", valid_data_path=("1", pairs["c"], "2"))
    empty = str(tmp_path / "empty")
    for suffix in (".bin", ".idx"):
        shutil.copy(pairs["c"] + suffix, empty + suffix)
    Path(f"{empty}.bin").write_bytes(b"")
    refused("empty: the data set is empty", valid_data_path=(empty,))
    preprocess(["x"], str(tmp_path / "gpt2"), gpt2, documents=make_documents(5))
    refused("Preprocess them with one tokenizer", valid_data_path=(str(tmp_path / "gpt2"),))


def test_what_is_too_small_or_missing(pairs, tmp_path):
    source = open_data(DataOptions(train_data_path=(pairs["a"],)))
    with pytest.raises(ConfigError, match=r"without --valid-data-path.*or set --eval-iters 0"):
        plan_mixture(source, T, 60, 8)
    with pytest.raises(ConfigError, match=r"without --valid-data-path.*the selection needs"):
        plan_mixture(source, T, 60, 0, aligns=2)
    assert plan_mixture(source, T, 60).valid_samples == 0
    with pytest.raises(ConfigError, match=r"The run reads .*a 22\.47 times"):
        check_epochs(plan_mixture(source, T, 10_000), 1)
    short = str(tmp_path / "short")
    preprocess(["x"], short, ByteTokenizer(), documents=["hello"])
    source = open_data(DataOptions(train_data_path=(pairs["a"],), valid_data_path=(short,)))
    with pytest.raises(
        ConfigError,
        match=r"short: the validation split has \d tokens in 1 of 1 documents; .* needs 33. Sh",
    ):
        plan_mixture(source, T, 60, 8)
    # Doing without evaluation means doing without the files for it.
    source = open_data(DataOptions(train_data_path=(pairs["a"],), test_data_path=(short,)))
    without = "or set --eval-iters 0 and leave out --test-data-path"
    with pytest.raises(ConfigError, match=f"without --valid-data-path.*{without}"):
        plan_mixture(source, T, 60, 8)
    with pytest.raises(ConfigError, match=f"short: the test split.*{without}"):
        plan_mixture(source, T, 60, test_samples=8)
