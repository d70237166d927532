"""The command line: exit codes 0, 1 and 2, and one sentence without a traceback where the input was wrong."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import mpdit
from mpdit import cli
from mpdit import config as configs
from mpdit.config import Config
from mpdit.errors import CheckFailed, InputError


def run(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """``python -m mpdit ARGUMENTS`` in a process of its own."""
    command = [sys.executable, "-m", "mpdit", *map(str, arguments)]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=120)


def one_sentence(done: subprocess.CompletedProcess[str]) -> str:
    """What a command that was given bad input says: nothing but a line on stderr."""
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("mpdit: ")
    assert done.stderr.endswith(".\n")
    assert done.stderr.count("\n") == 1
    return done.stderr


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_without_arguments_it_shows_the_commands_and_says_that_this_was_no_command() -> None:
    done = run()
    assert done.returncode == 2
    assert all(f"\n  {name} " in done.stdout for name in cli.COMMANDS)
    assert "exit codes: 0 done, 1 the check failed, 2 the input was wrong" in done.stdout


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_no_error(flag: str) -> None:
    done = run(flag)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: mpdit COMMAND")


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """As under `| head -1`: no traceback, and a shell's exit code for a closed pipe."""
    command = [sys.executable, "-m", "mpdit", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()  # before a word is printed: Python takes longer than this to start
        error = process.stderr.read()
    assert (process.returncode, error) == (128 + signal.SIGPIPE, "")


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"mpdit {mpdit.__version__}\n", "")


def test_an_unknown_command_is_refused_with_those_there_are() -> None:
    said = one_sentence(run("trian", "config.yaml"))
    assert "'trian'" in said
    assert all(name in said for name in cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    done = run(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"usage: mpdit {command}" in done.stdout


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("train",), ["section.key=value", "torchrun", "run.dir", "constant | linear | cosine | wsd"]),
        (("sample",), ["--prompts", "--checkpoint", "--guidance", "--no-ema"]),
        (("data", "build", "folder"), ["--out", "--size", "--vocab-size"]),
    ],
    ids=["train", "sample", "data build folder"],
)
def test_help_names_what_can_be_given(command: tuple[str, ...], words: list[str]) -> None:
    done = run(*command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert [word for word in words if word not in done.stdout] == []


def test_train_help_shows_every_key_with_its_default_as_a_config_has_it() -> None:
    shown = run("train", "--help").stdout.split("keys and their defaults:\n")[1]
    tree = yaml.safe_load(shown)
    assert configs.from_dict(tree) == Config()
    for section, keys in configs.to_dict(Config()).items():
        assert tree[section].keys() == keys.keys(), section


def test_train_without_a_config_shows_its_usage() -> None:
    done = run("train")
    assert done.returncode == 2
    assert "usage: mpdit train CONFIG" in done.stdout


def test_train_names_a_missing_file(tmp_path: Path) -> None:
    assert f"{tmp_path / 'none.yaml'}: can't be read" in one_sentence(run("train", tmp_path / "none.yaml"))
    assert f"{tmp_path / 'config.yaml'}: can't be read" in one_sentence(run("train", tmp_path))


def test_train_names_an_unknown_key_and_the_nearest(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", "model:\n  widht: 64\n")
    said = one_sentence(run("train", path))
    assert f"{path}: unknown key model.widht; did you mean 'width'?" in said
    assert "unknown key train.stepz; did you mean 'steps'?" in one_sentence(
        run("train", write(path, "{}"), "train.stepz=3")
    )


def test_train_refuses_a_config_that_cannot_work_without_a_traceback(tmp_path: Path) -> None:
    """All the way through preflight; the one test here that imports torch and Megatron."""
    path = write(tmp_path / "run.yaml", f"run:\n  dir: {tmp_path / 'run'}\ndata:\n  path: {tmp_path / 'none'}\n")
    assert f"{tmp_path / 'none'}: there is no such folder" in one_sentence(run("train", path))
    assert not (tmp_path / "run").exists()


def test_sample_names_a_missing_prompts_file(tmp_path: Path) -> None:
    said = one_sentence(run("sample", tmp_path, "--prompts", tmp_path / "none.txt"))
    assert f"{tmp_path / 'none.txt'}: can't be read" in said


def test_of_many_ranks_only_the_first_speaks() -> None:
    assert "trian" in one_sentence(run("trian", RANK="0", WORLD_SIZE="2"))
    silent = run("trian", RANK="1", WORLD_SIZE="2")
    assert (silent.returncode, silent.stdout, silent.stderr) == (2, "", "")


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (InputError("a.yaml: is no good."), 2, "mpdit: a.yaml: is no good.\n"),
        (CheckFailed("the slope is 0.5."), 1, "mpdit: the slope is 0.5.\n"),
        (None, 0, ""),
    ],
)
def test_exit_codes(
    raised: Exception | None, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def command(argv: list[str]) -> int | None:
        assert argv == ["--flag", "x"]
        if raised:
            raise raised
        return None

    monkeypatch.setattr(cli, "COMMANDS", {"try": ("somewhere:command", "tries")})
    monkeypatch.setitem(sys.modules, "somewhere", type("module", (), {"command": staticmethod(command)}))
    monkeypatch.delenv("RANK", raising=False)
    assert cli.main(["try", "--flag", "x"]) == code
    assert capsys.readouterr().err == said


def test_a_commands_own_exit_code_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "COMMANDS", {"try": ("somewhere:command", "tries")})
    monkeypatch.setitem(sys.modules, "somewhere", type("module", (), {"command": staticmethod(lambda argv: 1)}))
    assert cli.main(["try"]) == 1


def test_an_error_in_the_program_is_not_called_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(argv: list[str]) -> int:
        raise ValueError("a mistake of ours")

    monkeypatch.setattr(cli, "COMMANDS", {"try": ("somewhere:command", "tries")})
    monkeypatch.setitem(sys.modules, "somewhere", type("module", (), {"command": staticmethod(command)}))
    with pytest.raises(ValueError, match="a mistake of ours"):
        cli.main(["try"])
