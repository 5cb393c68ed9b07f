"""Names on the hub and paths; nothing here asks a server."""

from __future__ import annotations

import huggingface_hub
import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from megatron_eslm.data.hub import check_data_set, is_hub_name, model_folder
from megatron_eslm.data.tokenizers.build import build_tokenizer
from megatron_eslm.errors import ConfigError
from megatron_eslm.interop.convert import folder_to_checkpoint


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("gpt2", True),
        ("openai-community/gpt2", True),
        ("owner/model-1.5B_v2", True),
        ("./gpt2", False),
        ("../gpt2", False),
        ("/models/gpt2", False),
        ("~/gpt2", False),
        ("a/b/c", False),
        ("here/gpt2", False),
        ("here", False),
        ("gpt2/", False),
        ("tokenizer.json", False),
        ("owner/spm.model", False),
        ("corpus.jsonl.gz", False),
        ("two words", False),
        ("nul\0", False),
        ("", False),
    ],
)
def test_names_and_paths(tmp_path, monkeypatch, name, meant):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert is_hub_name(name) is meant


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub whose answer a test decides, and its cache."""

    class Hub:
        answer: Exception | None = None
        asked = 0
        cache = tmp_path / "cache"

        def hold(self, name, files):
            """Put a model into the cache."""
            commit = "c" * 40
            model = self.cache / f"models--{name.replace('/', '--')}"
            (model / "refs").mkdir(parents=True)
            (model / "refs" / "main").write_text(commit)
            for file, content in files.items():
                path = model / "snapshots" / commit / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)

    hub = Hub()

    def repo_info(self, name, *, repo_type, timeout):
        assert timeout < 5
        hub.asked += 1
        if hub.answer is not None:
            raise hub.answer

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub.cache))
    monkeypatch.chdir(tmp_path)
    return hub


def not_found():
    import httpx2

    request = httpx2.Request("GET", "https://hub")
    return RepositoryNotFoundError("404", response=httpx2.Response(404, request=request))


def test_paths_never_ask_the_hub(hub):
    for name in ("./gpt2", "runs/a/gpt2", "cache.json"):
        assert str(model_folder("--input", name, ["config.json"])) == name.removeprefix("./")
    for name in ("./gpt2", "runs/a/gpt2"):
        with pytest.raises(ConfigError, match="There is no folder"):
            folder_to_checkpoint(name, "run")
    assert hub.asked == 0


def test_a_model_in_the_cache_is_used_without_a_network(hub, bpe_files):
    hub.answer = OSError("offline mode is enabled.")
    hub.hold("gpt2", {"tokenizer.json": (bpe_files / "tokenizer.json").read_bytes()})
    assert build_tokenizer("HuggingFaceTokenizer", tokenizer_model="gpt2").vocab_size == 400


def test_what_the_hub_does_not_give(hub):
    hub.answer = OSError("Name or service not known\nand more")
    message = r"--tokenizer-model gpt2 is not a local path.* \(Name or service not known\)"
    with pytest.raises(ConfigError, match=message):
        build_tokenizer("HuggingFaceTokenizer", tokenizer_model="gpt2")
    with pytest.raises(ConfigError, match="--input gpt2 is not a local path"):
        folder_to_checkpoint("gpt2", "run")
    with pytest.raises(ConfigError, match=r"--input squad .* data set .* cannot be downloaded"):
        check_data_set("--input", "squad")
    hub.answer = not_found()
    with pytest.raises(ConfigError, match=r"--input no/model .* has no model of that name"):
        folder_to_checkpoint("no/model", "run")
    with pytest.raises(ConfigError, match=r"--input no/data .* has no dataset of that name"):
        check_data_set("--input", "no/data")
    hub.answer = None
    check_data_set("--input", "squad")


def test_what_is_fetched(hub, monkeypatch, tmp_path):
    """Safe files first; pickled weights only where there are no others."""
    wanted = []

    def snapshot_download(name, *, allow_patterns, local_files_only):
        assert (name, local_files_only) == ("gpt2", False)
        wanted.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"no config\.json"):
            folder_to_checkpoint("gpt2", "run")
        (tmp_path / "model.safetensors").write_bytes(b"")
    assert [any("bin" in pattern for pattern in patterns) for patterns in wanted] == [
        False,
        True,
        False,
    ]
    assert "tokenizer.json" in wanted[0]
