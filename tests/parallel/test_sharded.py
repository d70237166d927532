"""Law 8: reading a checkpoint runs none of its code. Law 6: a damaged one is refused with a sentence."""

import builtins
import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ranks
from mpdit.config import Parallel
from mpdit.errors import InputError


class Runs:
    """Unpickled, it calls `function(*arguments)`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def save_and_load(rank: int, world: int, folder: Path, spoil: Callable[[Path], None] | None) -> str | dict[str, Any]:
    """Two tensors written, read again after `spoil(folder)`: what was read, or the refusal."""
    from mpdit.parallel import groups, packed, sharded

    groups.start(Parallel(), seed=0)
    parameters = {name: torch.nn.Parameter(torch.arange(6.0).reshape(2, 3) + n) for n, name in enumerate("ab")}
    image = packed.Image()
    places = packed.pack(((name, p.detach(), p) for name, p in parameters.items()), 0, image)
    for name, content in packed.index_files(places).items():
        image.add(name, content)
    for name, (start, size) in image.files.items():
        (folder / name).write_bytes(os.pread(image.fd, size, start))
    if spoil:
        spoil(folder)
    wanted = {name: sharded.tensor(name, torch.zeros(2, 3), p) for name, p in parameters.items()}
    try:
        return {name: value.tolist() for name, value in sharded.load(wanted, folder).items()}
    except BaseException as error:  # torch's CheckpointException is no Exception
        return f"{type(error).__name__}: {error}"
    finally:
        groups.stop()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    found = ranks.run(1, save_and_load, timeout_s=60, folder=folder, spoil=None)[0]
    assert found == {"a": [[0, 1, 2], [3, 4, 5]], "b": [[1, 2, 3], [4, 5, 6]]}
    return folder


@pytest.fixture
def refuse_code() -> Callable[[Path], None]:
    ranks.warm()
    from mpdit.parallel.sharded import refuse_code

    return refuse_code


@pytest.fixture
def metadata(written: Path, tmp_path: Path) -> Path:
    """A real one's copy, to be damaged."""
    return Path(shutil.copy(written / ".metadata", tmp_path))


def refusal(refuse_code: Callable[[Path], None], path: Path) -> str:
    with pytest.raises(InputError) as caught:
        refuse_code(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


def test_a_real_metadata_file_is_fine(refuse_code: Any, metadata: Path) -> None:
    refuse_code(metadata)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (os.system, ("touch {marker}",)),
        (os.mkdir, ("{marker}",)),
        (builtins.exec, ("open('{marker}', 'w')",)),
        (builtins.eval, ("open('{marker}', 'w')",)),
        (builtins.open, ("{marker}", "w")),
        (torch.save, (1, "{marker}")),
    ],
    ids=["os.system", "os.mkdir", "exec", "eval", "open", "torch.save"],
)
def test_code_in_the_metadata_is_refused_and_not_run(
    function: Callable[..., Any], arguments: tuple[Any, ...], protocol: int, refuse_code: Any, tmp_path: Path
) -> None:
    marker, path = tmp_path / "marker", tmp_path / ".metadata"
    filled = [a.format(marker=marker) if isinstance(a, str) else a for a in arguments]
    path.write_bytes(pickle.dumps({"state": [Runs(function, *filled)]}, protocol))
    said = refusal(refuse_code, path)
    assert function.__name__ in said
    assert "may run code and is refused" in said
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists(), "the test's own pickle runs its code where nobody looks"


@pytest.mark.parametrize(
    "name",
    [
        "torch.load",
        "torch.hub.load",
        "torch.serialization.load",
        "torch._utils._rebuild_tensor",
        "torch.distributed.checkpoint.metadata.os",
        "builtins.getattr",
        "builtins.__import__",
        "functools.partial",
        "operator.attrgetter",
    ],
)
def test_everything_that_is_not_metadata_is_refused_even_unused(name: str, refuse_code: Any, tmp_path: Path) -> None:
    module, attribute = name.rsplit(".", 1)
    path = tmp_path / ".metadata"
    path.write_bytes(b"c" + f"{module}\n{attribute}\n.".encode())
    assert f"holds {name}" in refusal(refuse_code, path)


def test_a_dotted_name_does_not_lead_out_of_an_allowed_class(refuse_code: Any, tmp_path: Path) -> None:
    """Protocol 4 resolves a.b.c within a module: Size.__init__.__globals__ and the like."""
    path = tmp_path / ".metadata"
    for name in ("Metadata.__init__", "Metadata.__init__.__globals__", "pickle.loads"):
        module = b"torch.distributed.checkpoint.metadata"
        words = [b"\x8c" + bytes([len(word)]) + word for word in (module, name.encode())]
        path.write_bytes(b"\x80\x04" + words[0] + words[1] + b"\x93.")
        assert name in refusal(refuse_code, path)


def test_an_extension_code_is_refused(refuse_code: Any, tmp_path: Path) -> None:
    import copyreg

    copyreg.add_extension("os", "getcwd", 77)
    try:
        path = tmp_path / ".metadata"
        path.write_bytes(b"\x80\x02\x82\x4d)R.")  # EXT1 77, called without arguments
        assert "os.getcwd" in refusal(refuse_code, path)
    finally:
        copyreg.remove_extension("os", "getcwd", 77)


def test_a_truncated_metadata_file_is_refused(refuse_code: Any, metadata: Path) -> None:
    whole = metadata.read_bytes()
    for length in sorted({0, 1, 2, 10, len(whole) - 1, *range(0, len(whole), max(1, len(whole) // 60))}):
        metadata.write_bytes(whole[:length])
        assert "is no checkpoint metadata" in refusal(refuse_code, metadata)


def test_a_missing_metadata_file_is_refused(refuse_code: Any, tmp_path: Path) -> None:
    assert "is no checkpoint metadata" in refusal(refuse_code, tmp_path / ".metadata")


@pytest.mark.parametrize(
    "damaged",
    [
        b"ctorch\nSize\nI1\nR.",  # TypeError: called with something that is no tuple
        b"ctorch.serialization\n_get_layout\n(S'torch.stridee'\ntR.",  # KeyError: a letter is another one
        b"\x80\x05\x96" + b"\xff" * 8 + b".",  # OverflowError: a length beyond any
        b"\x80\x05\x96" + (2**62).to_bytes(8, "little") + b".",  # MemoryError: a length beyond this machine
        b"\x80\x04\x8c\x02\xff\xfe.",  # UnicodeDecodeError
        b"\x80\x63.",  # ValueError: a protocol of the future
        b"\xde\xad\xbe\xef",
    ],
    ids=["no tuple", "no layout", "overflow", "memory", "no text", "protocol", "no pickle"],
)
def test_damaged_bytes_give_a_sentence(damaged: bytes, refuse_code: Any, tmp_path: Path) -> None:
    """Whatever the unpickler raises, and it raises nearly anything, is no traceback."""
    path = tmp_path / ".metadata"
    path.write_bytes(damaged)
    assert "is no checkpoint metadata" in refusal(refuse_code, path)


# ---- through the whole of load -----------------------------------------------------------------------------------


def code_in_metadata(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Runs(os.mkdir, str(folder / "marker"))))


def code_in_common(folder: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"evil": Runs(os.mkdir, str(folder / "marker"))}, buffer)
    (folder / "common.pt").write_bytes(buffer.getvalue())


def code_in_a_shard(folder: Path) -> None:
    """In the place of a tensor, of the length that the metadata has for it."""
    path = max(folder.glob("*.distcp"), key=lambda p: p.stat().st_size)
    buffer = io.BytesIO()
    torch.save(Runs(os.mkdir, str(folder / "marker")), buffer)
    path.write_bytes(buffer.getvalue().ljust(path.stat().st_size, b"\0"))


def code_in_bytes(folder: Path) -> None:
    """A tensor's entry turned into one for bytes, which torch reads with plain pickle, and code in their place."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    path = folder / ".metadata"
    found = pickle.loads(path.read_bytes())
    entry = BytesStorageMetadata()
    entry.size = found.state_dict_metadata["a"].size  # type: ignore[attr-defined]
    found.state_dict_metadata["a"] = entry
    place = next(value for index, value in found.storage_data.items() if index.fqn == "a")
    found.storage_data[MetadataIndex("a")] = place
    path.write_bytes(pickle.dumps(found))
    code_in_a_shard(folder)


@pytest.mark.dist
@pytest.mark.parametrize("spoil", [code_in_metadata, code_in_common, code_in_a_shard, code_in_bytes])
def test_no_file_of_a_checkpoint_can_run_code(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    said = ranks.run(1, save_and_load, timeout_s=60, folder=tmp_path, spoil=spoil)[0]
    assert not (tmp_path / "marker").exists()
    assert isinstance(said, str), "the spoiled file was not read at all"
