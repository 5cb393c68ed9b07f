"""The predicted cost of a recipe's trainings."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_eslm.commands import run_recipe
from megatron_eslm.planning.hardware import machine_of
from megatron_eslm.recipes.cost import RecipeCost
from megatron_eslm.recipes.recipe import read_recipe

MAIN = Path(__file__).parents[2] / "examples" / "reproduce" / "main.yaml"


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(MAIN.parents[2])  # recipes name ds_configs/ from there


def test_cost_of_the_main_comparison():
    recipe = read_recipe(MAIN, {"scale": "paper", "data": "nowhere"})
    model = RecipeCost(recipe, machine_of("a100-80g", "infiniband-hdr"), gpus=8)

    def cost(method: str):
        return model.of(recipe.run(method, 1))

    clm, random = cost("clm"), cost("random-0.2")
    # 6 N per token: 85M parameters of blocks, 39M of the head, 1024 positions of attention. The
    # head's logits are computed twice.
    tokens = 40_000 * 480 * 1024
    assert clm.flops / tokens == pytest.approx(
        6 * (85e6 + 38.6e6 + 12 * 1024 * 768) + 2 * 38.6e6, rel=0.01
    )
    # The same FLOPs are fewer steps of plain training, at the time of a plain step.
    fewer = cost("clm at the FLOPs of random-0.2")
    assert fewer.steps == round(40_000 * random.flops / clm.flops) < 30_000
    assert fewer.flops == pytest.approx(random.flops, rel=1e-4)
    assert fewer.seconds / fewer.steps == pytest.approx(clm.seconds / clm.steps)
    assert random.seconds < clm.seconds
    # The reference model's forward pass is a third of plain training.
    assert cost("rho1-0.1").flops / clm.flops == pytest.approx(4 / 3, rel=0.05)
    assert cost("greats-0.1").seconds is None


def test_printed(capsys):
    words = [str(MAIN), "--set", "scale=paper", "--set", "data=nowhere", "--dry-run"]
    assert run_recipe.main([*words, "--only", "clm", "--gpu", "h100-80g", "--gpus", "4"]) == 0
    *_, head, run, total, _assumed = capsys.readouterr().out.splitlines()
    assert head.startswith("on 4 x h100-80g")
    assert run.split()[:2] == ["clm-seed1", "40,000"]
    hours = float(run.split()[3])
    assert total.split()[2] == f"{hours:.2f},"
    assert float(total.split()[3]) == pytest.approx(4 * hours, abs=0.6)


def test_gpu_without_dry_run(capsys):
    assert run_recipe.main([str(MAIN), "--gpu", "h100-80g"]) == 2
    assert "--gpu h100-80g predicts what a recipe costs; give it with --dry-run" in (
        capsys.readouterr().err
    )


def test_salt_has_its_teacher_for_some_steps_only():
    recipe = read_recipe(MAIN.with_name("distillation.yaml"), {"scale": "paper", "data": "nowhere"})
    model = RecipeCost(recipe, machine_of("a100-80g", "infiniband-hdr"), gpus=8)
    clm, dense, salt = (model.of(recipe.run(m, 1)) for m in ("clm", "dense-kd", "salt"))
    assert salt.flops == pytest.approx(clm.flops + 12_000 / 40_000 * (dense.flops - clm.flops))
    assert clm.seconds < salt.seconds < dense.seconds


def test_gpus_without_gpu(capsys):
    assert run_recipe.main([str(MAIN), "--dry-run", "--gpus", "4"]) == 2
    assert "--gpus 4 needs --gpu" in capsys.readouterr().err
