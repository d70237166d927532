"""Guards what is said of the tokens that cross a stage boundary: U-ViT's long skips have their price named."""

from pathlib import Path

import pytest

from mpdit import config as configs
from mpdit.models import parts
from mpdit.parallel import context, stages

EXAMPLES = Path(__file__).parents[2] / "examples" / "coordcheck"


def note(arch: str, *overrides: str) -> str:
    config = configs.load(
        EXAMPLES / f"{arch}.yaml",
        ["model.width=32", "model.depth=5", "model.patch=4", "model.image_size=16", "model.text_tokens=1", *overrides],
    )
    return stages.crossing_note(config, parts(context.build(config)))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        # 16 of the image, 1 of the label, 1 of the time; two skips are open between blocks 2 and 3
        (["parallel.pp=2"], "carries 54 tokens a sample (0.00691 MB), 36 of them of 2 open skips: 3 times"),
        (["parallel.pp=2", "parallel.precision=bf16"], "carries 54 tokens a sample (0.00346 MB)"),
        (["parallel.pp=2", "parallel.tp=2", "parallel.sp=true"], "carries 27 tokens a sample (0.00346 MB), 18 of them"),
    ],
    ids=["pp", "half the bytes in bf16", "half the tokens under sp"],
)
def test_uvits_long_skips_are_counted(overrides: list[str], said: str) -> None:
    assert said in note("uvit", "parallel.pp_split=[2,3]", *overrides)


def test_nothing_is_said_where_no_skip_crosses() -> None:
    assert note("uvit") == ""
    assert note("dit", "parallel.pp=2", "parallel.pp_split=[2,3]") == ""
