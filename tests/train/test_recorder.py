"""What a start writes into the run folder."""

import contextlib
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

import tiny
from mpdit import config as configs
from mpdit.data.encoders import Encoder
from mpdit.data.latents import Autoencoder
from mpdit.data.text import Labels, SentencePiece
from mpdit.train import recorder

NAMES = ("config.yaml", "mup_table.json", "environment.json", "classes.json", "autoencoder.json")


def stale(folder: Path, names: tuple[str, ...]) -> Path:
    """Files of an earlier start, and a folder of hard links to them, which show what is written in place."""
    (kept := folder / "kept").mkdir()
    for name in names:
        (folder / name).write_text("stale")
        os.link(folder / name, kept / name)
    return kept


def none_in_place(folder: Path, kept: Path, names: tuple[str, ...]) -> None:
    for name in names:
        assert (kept / name).read_text() == "stale", f"{name} was empty for a moment, and would be after a kill"
        assert (folder / name).read_text() != "stale"


def test_a_start_replaces_each_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = stale(tmp_path, NAMES)
    config = tiny.with_run_dir(tiny.config(tmp_path), tmp_path)
    autoencoder = SimpleNamespace(folder=tmp_path, sha256="00", FILE=Autoencoder.FILE)
    autoencoder.save = lambda folder: Autoencoder.save(autoencoder, folder)
    sets = SimpleNamespace(tokenizer=Labels(["cat", "dog"]), autoencoder=autoencoder)
    tracker = SimpleNamespace(log_file=lambda *_: None)
    monkeypatch.setattr(recorder, "Tracker", lambda *_, **__: contextlib.nullcontext(tracker))
    monkeypatch.setattr(recorder.groups, "rank", lambda: 0)
    with recorder.Recorder(config, config, sets, {}, 0):
        pass
    none_in_place(tmp_path, kept, NAMES)
    assert configs.load(tmp_path) == config


def test_so_do_the_other_texts(tmp_path: Path) -> None:
    names = (SentencePiece.FILE, Encoder.FILE)
    kept = stale(tmp_path, names)
    SentencePiece.save(SimpleNamespace(FILE=SentencePiece.FILE, _model=b"model"), tmp_path)
    Encoder.save(SimpleNamespace(FILE=Encoder.FILE, kind="t5", folder=tmp_path, sha256="00"), tmp_path)
    none_in_place(tmp_path, kept, names)
