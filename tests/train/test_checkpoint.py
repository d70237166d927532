"""What a checkpoint says about where its run stands, without a run."""

from pathlib import Path

import pytest

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
