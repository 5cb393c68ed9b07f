"""highlight-tokens and token-dynamics as a user calls them."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from megatron_eslm.data.preprocess import preprocess
from megatron_eslm.data.tokenizers.build import ByteTokenizer
from megatron_eslm.reports import token_scores
from tests.harness import run_ranks

from ..interop.conftest import load_tool
from .models import save_model
from .test_html import Outline, assert_stands_alone

TEXT = "the quick <b>brown</b> fox & the lazy dog"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two models, a run of three checkpoints, a text and a pair."""
    folder = tmp_path_factory.mktemp("tools")
    save_model(folder / "a", seed=1)
    save_model(folder / "b", seed=2)
    for iteration in (10, 20, 30):
        save_model(folder / "run", seed=iteration, iteration=iteration)
    (folder / "text.txt").write_text(TEXT)
    texts = [f"{n} {TEXT}" for n in range(20)]
    preprocess(["x"], str(folder / "pair"), ByteTokenizer(), documents=texts)
    return folder


def call(name, *words):
    """Exit status of a tool, in a process of its own as models need a process group."""
    tool = load_tool(name)
    return run_ranks(1, lambda rank: tool.main(list(map(str, words))))[0]


class TestHighlight:
    def test_one_model(self, place, tmp_path):
        out = tmp_path / "new" / "page.html"
        words = ("--load", place / "a", "--text", place / "text.txt", "--output", out)
        assert call("highlight_tokens", *words, "--alpha", 0.5) == 0
        outline = assert_stands_alone(out.read_text())
        # The text, cut at the model's 24 positions.
        assert TEXT[:24] in outline.text and TEXT[24:] in outline.text
        assert f"{len(TEXT) // 2:,} of {len(TEXT):,} tokens kept" in outline.text
        assert "Where the two agree" not in outline.text

    def test_two_models_on_validation_documents(self, place, tmp_path):
        out = tmp_path / "page.html"
        words = ("--load", place / "a", "--load-b", place / "b", "--data-path", place / "pair")
        more = ("--split", "80,10,10", "--seq-length", 12, "--samples", 2, "--output", out)
        assert call("highlight_tokens", *words, *more) == 0
        text = Outline(out.read_text()).text
        assert "pair, document 16" in text and "pair, document 17" in text
        assert "a, iteration 0, loss" in text and "b, iteration 0, loss" in text
        assert text.count("21 of 24 tokens kept") == 2

    def test_documents_are_those_that_the_run_held_out(self, place, tmp_path):
        """Of 20 documents; --split 98,1,1 would take one that was trained on."""
        tool, out = load_tool("highlight_tokens"), tmp_path / "page.html"
        words = ("--load", place / "a", "--data-path", place / "pair", "--output", out)

        def on_rank(rank: int) -> int:
            ordinary = token_scores.open_scoring_model
            data = {"split": "60,20,20", "eod_mask_loss": True}

            def opened(*args):
                model = ordinary(*args)
                return replace(model, weights=replace(model.weights, data=data))

            token_scores.open_scoring_model = opened
            return tool.main([*map(str, words), "--samples", "20"])

        assert run_ranks(1, on_rank) == [0]
        text = Outline(out.read_text()).text
        assert set(re.findall(r"pair, document (\d+)", text)) == {"12", "13", "14", "15"}
        # Without its first token, which such training does not predict.
        assert "12 the quick" not in text and "2 the quick" in text

    def test_folders_of_one_name_are_told_apart(self, place, tmp_path):
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "checkpoints").symlink_to(place / name)
        out = tmp_path / "page.html"
        words = ("--load", tmp_path / "a" / "checkpoints", "--load-b", tmp_path / "b/checkpoints")
        text = ("--text", place / "text.txt", "--output", out)
        assert call("highlight_tokens", *words, *text) == 0
        page = Outline(out.read_text()).text
        assert "a, iteration 0, loss" in page and "b, iteration 0, loss" in page
        assert "checkpoints, iteration" not in page

    def test_excess_is_the_loss_above_the_reference(self, place, tmp_path):
        out = tmp_path / "page.html"
        words = ("--load", place / "a", "--text", place / "text.txt", "--output", out)
        more = ("--score", "excess", "--reference", place / "a", "--score-b", "loss")
        assert call("highlight_tokens", *words, *more) == 0
        page = out.read_text()
        # Of a model against itself nothing is left.
        assert page.count('title="excess loss 0.00 nats"') == len(TEXT)
        assert 'title="loss ' in page

    def test_errors_exit_with_2(self, place, tmp_path):
        base = ("--load", place / "a", "--text", place / "text.txt")
        tool = load_tool("highlight_tokens")

        def messages(rank: int) -> list[str]:
            import contextlib
            import io

            found = []
            for words in (
                (*base, "--score", "excess"),
                (*base, "--reference", place / "b"),
                (*base, "--seq-length", 99),
                (*base, "--alpha", 1.5),
                (*base, "--output", place / "text.txt" / "x.html"),
                ("--load", place / "none", "--text", place / "text.txt"),
                (*base, "--load-b", place / "none"),
            ):
                with contextlib.redirect_stderr(io.StringIO()) as error:
                    assert tool.main(list(map(str, words))) == 2
                found.append(error.getvalue())
            return found

        (found,) = run_ranks(1, messages)
        wanted = (
            "name one with --reference",
            "is read for --score excess only",
            "--seq-length 99 must be from 1 to 24",
            "--alpha 1.5 is outside",
            "--output: ",
            "there is no such folder",
            "--load-b: ",
        )
        for message, part in zip(found, wanted, strict=True):
            assert message.startswith("error: ") and part in message


class TestDynamics:
    def test_report(self, place, tmp_path):
        prefix = tmp_path / "new" / "d"
        words = ("--load", place / "run", "--data-path", place / "pair", "--split", "80,10,10")
        assert call("token_dynamics", *words, "--samples", 2, "--output-prefix", prefix) == 0
        text = prefix.with_suffix(".md").read_text()
        assert "# Token dynamics of run" in text and "## Classes of 45 tokens" in text
        assert "loss at 10 | loss at 30" in text
        assert prefix.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert_stands_alone(prefix.with_suffix(".html").read_text())

    def test_checkpoints_are_chosen(self, place):
        tool = load_tool("token_dynamics")
        load = str(place / "run")
        assert tool.chosen_iterations(load, None) == [10, 20, 30]
        assert tool.chosen_iterations(load, [30, 10, 20, 10]) == [10, 20, 30]

    @pytest.mark.parametrize(
        ("folder", "words", "message"),
        [
            ("run", ("--iterations", "10", "40"), "--iterations 40: "),
            ("run", ("--iterations", "10", "20"), "2 checkpoints (10, 20)"),
            ("a", (), "1 checkpoints (0)"),
            ("none", (), "0 checkpoints (none)"),
        ],
    )
    def test_errors_exit_with_2(self, place, tmp_path, folder, words, message):
        tool = load_tool("token_dynamics")
        base = ("--load", place / folder, "--data-path", place / "pair")

        def told(rank: int) -> str:
            import contextlib
            import io

            with contextlib.redirect_stderr(io.StringIO()) as error:
                assert tool.main([*map(str, base), *words]) == 2
            return error.getvalue()

        (error,) = run_ranks(1, told)
        assert error.startswith("error: ") and message in error
