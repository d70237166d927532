"""What a checkpoint says about where its run stands, without a run."""

import json
from pathlib import Path

import pytest

import checkpoint_folders as folders
import tiny
from mpdit.data.text import Labels
from mpdit.errors import InputError


def test_other_classes_than_the_run_s_are_refused() -> None:
    """The same names in another order: resumed, each class would go on as another."""
    from mpdit.train import checkpoint

    labels = Labels(["one", "two"])
    at = checkpoint.Position(step=1, plan_hash="", tokenizer_sha256=labels.sha256)
    checkpoint.same_tokenizer(Path("step_1"), at, labels)
    with pytest.raises(InputError, match=r"^step_1: was trained with a text model of SHA-256 .*; give the data set"):
        checkpoint.same_tokenizer(Path("step_1"), at, Labels(["two", "one"]))


def test_where_a_run_stands_is_read_back_and_what_an_older_version_did_not_say_has_its_default(tmp_path: Path) -> None:
    from mpdit.train import checkpoint

    config = tiny.config(Path("data"))
    at = checkpoint.Position(step=7, plan_hash="plan", tokenizer_sha256="tokens", skipped=2)
    text = checkpoint.state_text(config, at, ranks=4)
    path = folders.write(tmp_path, 7, {"state.json": text.encode()})
    assert checkpoint.position(path, config) == at
    state = json.loads(text)
    assert state["written"]["ranks"] == 4
    old = {key: value for key, value in state.items() if key not in ("skipped", "written")}
    old |= {"format": "mpdit-checkpoint/2", "of a later version": 1}
    path = folders.write(tmp_path, 8, {"state.json": json.dumps(old).encode()})
    assert checkpoint.position(path, config) == checkpoint.Position(step=7, plan_hash="plan", tokenizer_sha256="tokens")
    with pytest.raises(InputError, match=r"step_8: is of another model, with model\.width 32 where the config has 64"):
        checkpoint.position(path, tiny.config(Path("data"), "model.width=64"))
