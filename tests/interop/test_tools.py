"""The command lines: Hugging Face folder -> checkpoint -> Hugging Face folder -> text."""

from __future__ import annotations

import io
import shutil

import pytest
import torch

from megatron_eslm.checkpoint.weights import read_weights
from megatron_eslm.data.tokenizers.build import ByteTokenizer
from megatron_eslm.data.tokenizers.from_transformers import folder_tokenizer
from megatron_eslm.data.tokenizers.to_transformers import export_tokenizer
from megatron_eslm.errors import ConfigError
from megatron_eslm.frozen.model import find_frozen, load_frozen
from megatron_eslm.interop import huggingface
from megatron_eslm.interop.huggingface import export
from megatron_eslm.model.gpt import reference_logits
from megatron_eslm.model.hf import folder as hf_folder
from megatron_eslm.model.hf.folder import load_hf
from megatron_eslm.parallel.mesh import build_mesh
from megatron_eslm.reports.token_scores import open_scoring_model

from .conftest import edit_json, files_of, load_tool, random_gpt2


@pytest.fixture(scope="module")
def to_hf():
    return load_tool("convert_to_hf")


@pytest.fixture(scope="module")
def from_hf():
    return load_tool("convert_from_hf")


@pytest.fixture(scope="module")
def generate():
    return load_tool("generate")


@pytest.fixture
def folder(tmp_path, any_tokenizer):
    """An exported Hugging Face folder."""
    model = random_gpt2(vocab_size=any_tokenizer.vocab_size)
    weights, shape = hf_folder.from_hf(model, model.config, 128)
    export(tmp_path / "hf", weights, shape, any_tokenizer)
    return tmp_path / "hf"


@pytest.fixture
def byte_folder(tmp_path, gpt2, byte_tokenizer):
    weights, shape = hf_folder.from_hf(gpt2, gpt2.config, 128)
    export(tmp_path / "hf", weights, shape, byte_tokenizer)
    return tmp_path / "hf"


def test_round_trip_through_a_checkpoint(tmp_path, folder, to_hf, from_hf, capsys):
    saved, again = tmp_path / "run", tmp_path / "again"
    assert from_hf.main(["--input", str(folder), "--save", str(saved)]) == 0
    assert "largest logit difference: " in capsys.readouterr().out
    assert to_hf.main(["--load", str(saved), "--output", str(again)]) == 0
    assert "largest logit difference: " in capsys.readouterr().out
    assert files_of(again) == files_of(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "hf", "run"]


def test_checkpoint_is_what_load_starts_from(tmp_path, byte_folder, from_hf):
    arguments = ["--input", str(byte_folder), "--save", str(tmp_path / "run")]
    assert from_hf.main([*arguments, "--make-vocab-size-divisible-by", "100"]) == 0
    written = read_weights(str(tmp_path / "run"))
    model = load_hf(byte_folder)
    weights, shape = hf_folder.from_hf(model, model.config, 100)
    assert written.shape == shape
    assert shape.padded_vocab_size == 300
    assert written.weights.keys() == weights.keys()
    assert all(torch.equal(written.weights[name], weights[name]) for name in weights)
    assert written.tokenizer_dir is not None


def test_vocab_and_merges_alone_are_enough(tmp_path, bpe_folder, from_hf):
    tokenizer = folder_tokenizer(bpe_folder)
    model = random_gpt2(
        vocab_size=tokenizer.vocab_size, bos_token_id=tokenizer.eod, eos_token_id=tokenizer.eod
    )
    model.save_pretrained(tmp_path / "hf")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(bpe_folder / name, tmp_path / "hf")
    assert folder_tokenizer(tmp_path / "hf").name == "GPT2BPETokenizer"
    assert from_hf.main(["--input", str(tmp_path / "hf"), "--save", str(tmp_path / "run")]) == 0


@pytest.fixture
def padded_folder(tmp_path, byte_tokenizer):
    """A Hugging Face folder whose embeddings have more rows (300) than its tokenizer ids (257)."""
    random_gpt2(vocab_size=300).save_pretrained(tmp_path / "padded")
    export_tokenizer(byte_tokenizer, tmp_path / "padded", 40)
    return tmp_path / "padded"


def test_a_padded_vocabulary_is_cut_to_the_tokenizer(
    tmp_path, padded_folder, from_hf, to_hf, generate, capsys, process_group
):
    """Everything that takes a model takes it then; the logits of real ids are transformers'."""
    run = tmp_path / "run"
    assert from_hf.main(["--input", str(padded_folder), "--save", str(run)]) == 0
    written = read_weights(run)
    assert (written.shape.vocab_size, written.shape.padded_vocab_size) == (257, 384)
    tokenizer = folder_tokenizer(padded_folder)
    theirs = load_hf(padded_folder)
    tokens_BT = torch.tensor([tokenizer.encode("a cat on a mat")])
    with torch.no_grad():
        expected_BTV = theirs(tokens_BT).logits[..., :257]
        got_BTV = reference_logits(dict(written.weights), written.shape, tokens_BT)
    torch.testing.assert_close(got_BTV, expected_BTV)
    for source in (run, padded_folder):
        frozen = find_frozen("--distill-teacher", str(source), ByteTokenizer(), "teacher")
        assert frozen.shape.vocab_size == 257
        model = load_frozen(frozen, build_mesh(1, 1), torch.float32, torch.device("cpu"))
        torch.testing.assert_close(model.weight_VE[:257], theirs.transformer.wte.weight[:257])
        scoring = open_scoring_model(str(source))
        assert scoring.weights.shape.vocab_size == 257
    assert to_hf.main(["--load", str(run), "--output", str(tmp_path / "again")]) == 0
    assert load_hf(tmp_path / "again").config.vocab_size == 257
    capsys.readouterr()
    texts = []
    for load in (run, padded_folder, tmp_path / "again"):
        arguments = ["--load", str(load), "--prompt", "cat", "--max-new-tokens", "8"]
        assert generate.main([*arguments, "--temperature", "0"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]


def test_a_tokenizer_with_more_ids_than_the_model_has_rows(
    tmp_path, padded_folder, from_hf, generate, capsys
):
    random_gpt2(vocab_size=256, bos_token_id=0, eos_token_id=0).save_pretrained(padded_folder)
    message = "tokenizer has 257 ids, but the model only 256 rows"
    assert from_hf.main(["--input", str(padded_folder), "--save", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert generate.main(["--load", str(padded_folder), "--prompt", "a"]) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(ConfigError, match=f"--reference .*{message}"):
        find_frozen("--reference", str(padded_folder), ByteTokenizer(), "reference model")
    assert not (tmp_path / "run").exists()


def test_export_without_a_tokenizer(tmp_path, byte_folder, to_hf, from_hf, capsys):
    run, out = str(tmp_path / "run"), tmp_path / "out"
    assert from_hf.main(["--input", str(byte_folder), "--save", run]) == 0
    assert to_hf.main(["--load", run, "--output", str(out), "--without-tokenizer"]) == 0
    assert "largest logit difference" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer_config.json",
    ]
    assert (out / "model.safetensors").read_bytes() == (
        byte_folder / "model.safetensors"
    ).read_bytes()
    assert from_hf.main(["--input", str(out), "--save", str(tmp_path / "back")]) == 2
    assert "holds no tokenizer" in capsys.readouterr().err
    # With a tokenizer beside it, it is a whole model again.
    shutil.copy(byte_folder / "tokenizer.json", out)
    assert from_hf.main(["--input", str(out), "--save", str(tmp_path / "back")]) == 0


def test_import_errors(tmp_path, byte_folder, from_hf, capsys):
    save = tmp_path / "run"

    def error(*more, source=byte_folder):
        assert from_hf.main(["--input", str(source), "--save", str(save), *more]) == 2
        text = capsys.readouterr().err
        assert text.startswith("error: ")
        return text

    assert "no config.json" in error(source=tmp_path)
    assert "--make-vocab-size-divisible-by 0" in error("--make-vocab-size-divisible-by", "0")
    edit_json(byte_folder / "config.json", activation_function="relu")
    assert "activation_function = 'relu'" in error()
    edit_json(byte_folder / "config.json", activation_function="gelu_new")
    for path in byte_folder.glob("tokenizer*"):
        path.rename(tmp_path / path.name)
    assert "holds no tokenizer" in error()
    assert not save.exists()
    save.mkdir()
    for path in tmp_path.glob("tokenizer*"):
        path.rename(byte_folder / path.name)
    (save / "kept").write_text("")
    assert "--save" in error()
    assert list(save.iterdir()) == [save / "kept"]


def test_export_errors(tmp_path, byte_folder, to_hf, from_hf, capsys):
    run, out = str(tmp_path / "run"), tmp_path / "out"
    assert from_hf.main(["--input", str(byte_folder), "--save", run]) == 0

    def error(load, *more):
        assert to_hf.main(["--load", load, "--output", str(out), *more]) == 2
        return capsys.readouterr().err

    assert "error: --load" in error(str(tmp_path / "none"))
    assert error(run, "--tag", "iter_0000007").startswith("error: ")
    assert not out.exists()
    assert to_hf.main(["--load", run, "--output", str(out)]) == 0
    before = files_of(out)
    assert "exists already" in error(run)
    assert files_of(out) == before
    (out / "stale").write_text("")
    assert to_hf.main(["--load", run, "--output", str(out), "--overwrite"]) == 0
    assert files_of(out) == before


def test_different_logits_exit_with_1_and_leave_nothing(
    tmp_path, byte_folder, to_hf, from_hf, capsys, monkeypatch
):
    run = tmp_path / "run"
    assert from_hf.main(["--input", str(byte_folder), "--save", str(run)]) == 0
    monkeypatch.setattr(huggingface, "compare_logits", lambda *arguments: 2e-4)
    before = files_of(tmp_path)
    capsys.readouterr()
    assert to_hf.main(["--load", str(run), "--output", str(tmp_path / "out")]) == 1
    assert "differ by 0.0002, more than 0.0001" in capsys.readouterr().err
    arguments = ["--load", str(run), "--output", str(byte_folder), "--overwrite"]
    assert to_hf.main(arguments) == 1
    assert from_hf.main(["--input", str(byte_folder), "--save", str(tmp_path / "run2")]) == 1
    assert files_of(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]


def test_generate_from_checkpoint_and_folder_alike(
    tmp_path, byte_folder, from_hf, generate, capsys, monkeypatch
):
    run = str(tmp_path / "run")
    assert from_hf.main(["--input", str(byte_folder), "--save", run]) == 0
    capsys.readouterr()
    greedy = ["--max-new-tokens", "8", "--temperature", "0"]
    texts = []
    for load in (run, str(byte_folder)):
        assert generate.main(["--load", load, "--prompt", "cat", *greedy]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("cat")
    monkeypatch.setattr("sys.stdin", io.StringIO("cat\n"))
    assert generate.main(["--load", run, *greedy]) == 0
    assert capsys.readouterr().out == texts[0]
    assert generate.main(["--load", run, "--prompt", "a", "--prompt", "", "--num-samples=2"]) == 2
    assert "--max-new-tokens" in capsys.readouterr().err
    several = ["--prompt", "a", "--prompt", "", "--num-samples=2", "--max-new-tokens=5"]
    assert generate.main(["--load", run, *several]) == 0
    assert capsys.readouterr().out.count("--- ") == 4


def test_generate_errors(tmp_path, byte_folder, generate, capsys):
    for arguments, message in (
        (["--load", str(tmp_path / "none"), "--prompt", "a"], "--load"),
        (["--load", str(byte_folder), "--prompt", "a" * 50], "40 positions"),
        (["--load", str(byte_folder), "--prompt", "a", "--tag", "x"], "--tag x"),
        (["--load", str(byte_folder), "--prompt", "a", "--top-p", "2"], "--top-p 2"),
    ):
        assert generate.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
