"""The manifest: not one bit of it can change without being noticed."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from megatron_eslm.checkpoint import manifest as manifests
from megatron_eslm.checkpoint.find import find_checkpoint
from megatron_eslm.errors import ConfigError

from .forging import seal, tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    save = tmp_path_factory.mktemp("saved") / "run"
    tiny(save, 3)
    tiny(save, 5)
    return save


def test_what_is_encoded_is_decoded(saved: Path) -> None:
    data = (saved / "iter_0000005" / "manifest.json").read_bytes()
    manifest = manifests.decode(data, saved)
    assert (manifest.kind, manifest.iteration) == ("training", 5)
    assert set(manifest.files) == set(manifests.files_of(saved / "iter_0000005"))
    assert manifests.encode(manifest) == data


def test_every_flipped_bit_is_damage(saved: Path) -> None:
    """Also those that leave JSON, and a manifest that would pass for one of another version."""
    folder = saved / "iter_0000005"
    data = bytearray((folder / "manifest.json").read_bytes())
    for at in range(len(data)):
        for bit in range(8):
            data[at] ^= 1 << bit
            with pytest.raises(ConfigError, match=r"iter_0000005 is damaged: "):
                manifests.decode(bytes(data), folder)
            data[at] ^= 1 << bit
    for at in range(0, len(data), 7):
        with pytest.raises(ConfigError, match=r"iter_0000005 is damaged: "):
            manifests.decode(bytes(data[:at]), folder)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"bytes"', b'"bytec"'),
        (b'"crc32"', b'"cr#32"'),
        (b"megatron_eslm/3", b"megatron_eslm/2"),
        (b'"training"', b'"training" '),
        (b"iter", b"\xffter"),
        (b"{", b"["),
    ],
)
def test_a_run_goes_on_from_the_one_before(
    saved: Path, tmp_path: Path, old: bytes, new: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    save = Path(shutil.copytree(saved, tmp_path / "run"))
    file = save / "iter_0000005" / "manifest.json"
    file.write_bytes(file.read_bytes().replace(old, new, 1))
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(save).state().iteration == 3
    assert "iter_0000005 is damaged: " in caplog.text and "manifest.json" in caplog.text
    assert "Trying the previous checkpoint" in caplog.text


@pytest.mark.parametrize("version", ["megatron_eslm/1", "megatron_eslm/2"])
def test_an_older_format_is_told_from_damage(saved: Path, version: str) -> None:
    with pytest.raises(ConfigError, match=rf"earlier version \(format '{version}'.*convert_to_hf"):
        manifests.decode(f'{{"format": "{version}", "files": {{}}}}'.encode(), saved)


def test_a_later_format_is_told_from_damage(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved / "iter_0000005", tmp_path / "iter_0000005"))
    seal(folder, lambda values: values.update(format="megatron_eslm/99", more=1))
    with pytest.raises(
        ConfigError, match=r"'megatron_eslm/99'; this version reads 'megatron_eslm/3'"
    ):
        manifests.verify(folder)


def test_checkpoints_are_listed_by_their_number(tmp_path: Path) -> None:
    for name in ("iter_0000009", "iter_0000010", "iter_10000000", "iter_9", "latest", ".saving-x"):
        (tmp_path / name).mkdir()
    assert [p.name for p in manifests.list_checkpoints(tmp_path)] == [
        "iter_10000000",
        "iter_0000010",
        "iter_0000009",
    ]
    assert manifests.list_checkpoints(tmp_path / "none") == []
