"""What a recipe file says, and what it must not say."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_eslm.config.run import parse_run
from megatron_eslm.errors import ConfigError
from megatron_eslm.recipes.recipe import Recipe, read_recipe

EXAMPLES = Path(__file__).parents[2] / "examples" / "reproduce"

GOOD = {
    "output": "${place}/runs",
    "launch": "deepspeed --num_gpus 2",
    "seeds": [1, 2],
    "prepare": [{"creates": "a.idx", "run": "make 'a b' ${place}"}],
    "flags": {"train-iters": 100, "data-path": [1, "${place}/x"], "lr": 0.1},
    "methods": {
        "clm": {"selection": "clm"},
        "eslm 0.1": {"--eslm_alpha": 0.1, "lr": 0.2, "eslm-adaptive": False},
        "rho1": {"selection": "rho1", "needs": "clm", "reference": "${run:clm}"},
        "short": {"selection": "clm", "flops-of": "eslm 0.1", "load": "${place}/w"},
    },
    "after": [{"creates": "${output}/t.html", "run": "show ${run:clm}"}],
}


def read(tmp_path, *, place="there", **changes) -> Recipe:
    path = tmp_path / "r.yaml"
    content = {key: value for key, value in (GOOD | changes).items() if value is not None}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return read_recipe(path, {"place": place})


def test_everything_in_its_place(tmp_path):
    recipe = read(tmp_path)
    assert recipe.output == Path("there/runs")
    assert recipe.launch == ("deepspeed", "--num_gpus", "2")
    assert recipe.prepare[0].words == ("make", "a b", "there")
    assert [(r.method, r.seed) for r in recipe.runs] == [
        (method, seed) for seed in (1, 2) for method in GOOD["methods"]
    ]
    clm, eslm, rho1, short = (recipe.run(m, 2) for m in GOOD["methods"])
    assert eslm.folder == Path("there/runs/eslm_0.1-seed2")
    assert eslm.words() == [
        *("--train-iters", "100", "--data-path", "1", "there/x", "--lr", "0.2"),
        *("--eslm-alpha", "0.1", "--no-eslm-adaptive", "--seed", "2"),
        *("--save", f"{eslm.folder}/checkpoints", "--load", f"{eslm.folder}/checkpoints"),
        *("--metrics-file", f"{eslm.folder}/metrics.jsonl"),
    ]
    assert rho1.needs == "clm" and rho1.flags["reference"] == str(clm.checkpoints)
    assert short.flops_of == "eslm 0.1"
    # Weights to start from, until there are checkpoints of its own.
    assert short.words()[-3] == "there/w" and short.words(resumed=True)[-3] == str(
        short.checkpoints
    )
    assert short.words(70)[:2] == ["--train-iters", "70"]
    assert recipe.after[0].words == ("show", str(recipe.run("clm", 1).checkpoints))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {}}, "no key 'method'; did you mean methods"),
        ({"output": None}, "has no 'output'"),
        ({"methods": {}}, "has no 'methods'"),
        ({"methods": ["clm"]}, "must map names"),
        ({"methods": {"a/b": {}}}, "no name for a method"),
        ({"methods": {"a b": {}, "a_b": {}}}, "'a b' and 'a_b' would share there/runs/a_b-seed1"),
        ({"methods": {"a": {"eslm-alpa": 1}}}, "no option eslm_alpa; did you mean eslm_alpha"),
        ({"methods": {"a": {"save": "x"}}}, "sets --save, which the runner sets"),
        ({"flags": {"load": "x"}}, "sets --load"),
        ({"flags": ["lr"]}, "must be a mapping"),
        ({"seeds": []}, "list of whole numbers"),
        ({"seeds": [1, 1]}, "names one of them twice"),
        ({"seeds": [True]}, "list of whole numbers"),
        ({"methods": {"a": {"needs": "b"}}}, "needs of a is 'b'"),
        ({"methods": {"a": {"flops-of": "a"}}}, "flops-of of a is 'a'"),
        ({"methods": {"a": {"needs": "b"}, "b": {"needs": "a"}}}, "a needs b needs a: none"),
        ({"methods": {"a": {"reference": "${run:b}"}}}, r"\$\{run:b\} names no method"),
        ({"output": "${nowhere}"}, r"has no value; give --set nowhere="),
        ({"prepare": [{"run": "x"}]}, "has a 'creates' and a 'run'"),
        ({"after": "x"}, "'after' must be a list"),
    ],
)
def test_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, **changes)


def test_not_a_file_or_not_yaml(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_recipe(tmp_path / "none.yaml")
    (tmp_path / "x.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_recipe(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text("a")
    with pytest.raises(ConfigError, match="must be a mapping"):
        read_recipe(tmp_path / "x.yaml")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda p: p.name)
def test_examples_are_runs_that_training_accepts(path):
    recipe = read_recipe(path, {"corpus": "corpus", "data": "data", "teacher": "teacher"})
    for run in recipe.runs:
        parsed = parse_run(run.words(), 1)
        assert parsed.training.seed == run.seed
    # No comparison without plain training and the random control.
    assert {"clm", "random"} <= {run.flags.get("selection") for run in recipe.runs}
