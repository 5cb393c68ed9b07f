"""What a recipe file says, and what it must not say."""

from __future__ import annotations

import dataclasses
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
    assert rho1.needs == "clm" and rho1.flags["reference"] == ["--reference", str(clm.checkpoints)]
    assert short.flops_of == "eslm 0.1"
    began = dataclasses.replace(short, flags={**short.flags, "finetune": ["--finetune"]})
    assert "--finetune" in began.words() and "--finetune" not in began.words(resumed=True)
    # Weights to start from, until there are checkpoints of its own.
    assert short.words()[-3] == "there/w" and short.words(resumed=True)[-3] == str(
        short.checkpoints
    )
    assert short.words(70)[:2] == ["--train-iters", "70"]
    assert recipe.after[0].words == ("show", str(recipe.run("clm", 1).checkpoints))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {}}, "no key 'method'. Did you mean methods"),
        ({"zzzz": 1}, r"no key 'zzzz'\.$"),
        ({"output": None}, "has no 'output'"),
        ({"methods": {}}, "has no 'methods'"),
        ({"methods": ["clm"]}, "'methods' must be a mapping"),
        ({"methods": {"a/b": {}}}, "no name for a method"),
        ({"methods": {"a b": {}, "a_b": {}}}, "'a b' and 'a_b' would share there/runs/a_b-seed1"),
        (
            {"methods": {"a": {"eslm-alpa": 1}}},
            r"eslm_alpa \(line \d+\). Did you mean eslm_alpha",
        ),
        ({"methods": {"a": {"save": "x"}}}, "sets --save, which the runner sets"),
        ({"flags": {"load": "x"}}, "sets --load"),
        ({"flags": ["lr"]}, "must be a mapping"),
        ({"seeds": []}, "list of whole numbers"),
        ({"seeds": 7}, "list of whole numbers"),
        ({"seeds": [1, 1]}, "names one of them twice"),
        ({"seeds": [True]}, "'true' is not a whole number"),
        ({"seeds": [[1]]}, "'seeds' takes one value, not a list of 1"),
        ({"seeds": [{"a": 1}]}, "'seeds' must be a value"),
        ({"methods": {"a": {"needs": "b"}}}, "needs of a is 'b'"),
        ({"methods": {"a": {"flops-of": "a"}}}, "flops-of of a is 'a'"),
        ({"methods": {"a": {"needs": "b"}, "b": {"needs": "a"}}}, "a needs b needs a: none"),
        ({"methods": {"a": {"reference": "${run:b}"}}}, r"\$\{run:b\} names no method"),
        ({"output": "${nowhere}"}, r"has no value; give --set nowhere="),
        ({"prepare": [{"run": "x"}]}, "has a 'creates' and a 'run'"),
        ({"after": "x"}, "'after' must be a list"),
        ({"methods": {"a": {"needs": ["b"]}, "b": {}}}, r"needs of a is \['b'\]"),
        ({"methods": {"a": {"flops-of": "b"}, "b": {"flops-of": "a"}}}, "a flops-of b flops-of a"),
        ({"methods": {"a": {"lr": [0.1, "--save", "/x"]}}}, "a: lr takes one value"),
        ({"flags": {"data-path": ["x", "--save", "/x"]}}, "flags?.*'--save' looks like a flag"),
        ({"methods": {"a": {"lr": {"b": 1}}}}, "a: lr must be a value"),
        ({"methods": {"a": {"lr": "fast"}}}, "a: lr: 'fast' is not a number"),
        ({"methods": {"a": {"eslm-adaptive": 1}}}, "eslm_adaptive must be true or false"),
        ({"methods": {"a": {"lr": 1, "--lr": 2}}}, "gives --lr twice, in lines"),
        ({"methods": {"a": 5}}, "methods: a must be a mapping"),
        ({"output": ["x"]}, "'output' must be text"),
        ({"launch": ["python"]}, "'launch' must be text"),
        ({"launch": "python 'x"}, "'launch' is no command: No closing quotation"),
        ({"prepare": [{"creates": "x", "run": ["a"]}]}, "'run' of 'prepare' must be text"),
        ({"prepare": [{"creates": {}, "run": "a"}]}, "it has no 'creates' of 'prepare'"),
        ({"prepare": ["x"]}, "has a 'creates' and a 'run'"),
    ],
)
def test_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, **changes)


def test_not_a_file_or_not_yaml(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_recipe(tmp_path / "none.yaml")
    for content, message in (
        ("a: [", "is not YAML in line"),
        ("a", "it must be a mapping"),
        ("", "it must be a mapping"),
        ("a: &x 1", "anchors"),
        ("output: x\noutput: y", "in line 2: the key output"),
    ):
        (tmp_path / "x.yaml").write_text(content)
        with pytest.raises(ConfigError, match=message):
            read_recipe(tmp_path / "x.yaml")


def test_base_is_merged_in(tmp_path):
    (tmp_path / "small.yaml").write_text(
        """
        defaults: {steps: 10, data: there, runs: "runs/${steps}"}
        launch: torchrun
        seeds: [3, 4]
        prepare: [{creates: "${data}/x", run: first}]
        flags: {train-iters: "${steps}", lr: 0.1}
        """
    )
    (tmp_path / "r.yaml").write_text(
        """
        base: ${scale}.yaml
        defaults: {scale: small, data: here}
        output: ${runs}/${scale}
        seeds: [1]
        prepare: [{creates: y, run: second}]
        flags: {lr: 0.2}
        methods: {a: {selection: clm}}
        """
    )
    (tmp_path / "more.yaml").write_text("base: r.yaml\nmethods: {b: {selection: random}}\n")
    recipe = read_recipe(tmp_path / "more.yaml", {"steps": "20"})
    assert recipe.launch == ("torchrun",) and recipe.output == Path("runs/20/small")
    assert [(run.method, run.seed) for run in recipe.runs] == [("a", 1), ("b", 1)]
    assert recipe.runs[0].words()[:4] == ["--train-iters", "20", "--lr", "0.2"]
    assert [str(step.creates) for step in recipe.prepare] == ["here/x", "y"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: r.yaml", "it is its own base"),
        ("base: none.yaml", "none.yaml cannot be read"),
        ("base: [x]", "'base' must be text"),
        ("defaults: {a: '${b}', b: '${a}'}\nbase: '${a}'", r"\$\{a\} has no value"),
        ("base: ${where}", r"\$\{where\} has no value; give --set where="),
        ("defaults: [x]", "'defaults' must be a mapping"),
        ("output: ${there}", r"--set their=.*no \$\{their\}; it has there. Did you mean there"),
    ],
)
def test_base_refused(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_recipe(tmp_path / "r.yaml", {"their": "x"} if "there" in text else {})


SCALES = {"small": {"corpus": "corpus"}, "paper": {"scale": "paper", "data": "data"}}
OURS = {"architectures", "excess", "prose", "references"}
"""Experiments that are not the paper's, at the small scale only."""


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        (path.stem, scale)
        for path in sorted(EXAMPLES.glob("*.yaml"))
        for scale in SCALES
        if not (scale == "paper" and path.stem in OURS)
    ],
)
def test_examples_are_runs_that_training_accepts(name, scale):
    recipe = read_recipe(EXAMPLES / f"{name}.yaml", SCALES[scale])
    for run in recipe.runs:
        parsed = parse_run(run.words(), 1)
        assert parsed.training.seed == run.seed
    # No comparison without plain training and the random control.
    assert name == "references" or {"clm", "random"} <= {
        run.flags["selection"][1] for run in recipe.runs if "selection" in run.flags
    }
