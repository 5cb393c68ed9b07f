"""--data-path @FILE FOLDER."""

from pathlib import Path

import pytest

from megatron_eslm.data.data_options import DataOptions
from megatron_eslm.data.parts.domain_names import SLIMPAJAMA
from megatron_eslm.data.source import parse_data_path
from megatron_eslm.errors import ConfigError

FILES = sorted((Path(__file__).parents[2] / "examples" / "data").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_examples_name_every_domain(path):
    pairs = parse_data_path(DataOptions(data_path=(f"@{path}", "data")).data_path)
    assert [prefix for _, prefix in pairs] == [f"data/{name}" for name in SLIMPAJAMA.values()]
    total = sum(float(weight) for weight, _ in pairs)
    assert total == pytest.approx(
        {"slimpajama_natural": 100, "slimpajama_unif": 7}.get(path.stem, 1), rel=1e-3
    )


def test_there_are_four():
    assert len(FILES) == 4


@pytest.mark.parametrize(
    ("text", "more", "said"),
    [
        ("a: 1\nb:\n", (), r"b \(line 2\) must have a number"),
        ("- a\n", (), "must be lines of NAME: WEIGHT"),
        ("a: 1\n", ("x", "y"), "takes one folder"),
        (None, (), "there is no file"),
    ],
)
def test_bad_files(tmp_path, text, more, said):
    path = tmp_path / "weights.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        DataOptions(data_path=(f"@{path}", *more))
    path.write_text("a: 1\n")
    assert DataOptions(data_path=(f"@{path}",)).data_path == ("a",)
