"""A checkpoint in the files that the ranks of another layout would write, byte for byte; one tensor in memory at once.

Which rank holds what is found by building every rank's stages on tensors without memory, as ``mpdit rehearse`` does.
"""

import contextlib
import dataclasses
import json
import math
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mpdit import config as configs
from mpdit.config import Config, Parallel, to_dict
from mpdit.errors import InputError
from mpdit.parallel import fp8, groups, packed, sharded
from mpdit.parallel.packed import Chunk, Place
from mpdit.train import checkpoint, checkpoints, preflight
from mpdit_tools import new_folder
from mpdit_tools.rehearse import tiles
from mpdit_tools.rehearse.tiles import Held


def reshard(
    path: Path, out: Path, overrides: tuple[str, ...] = (), *, ranks: int = 0, config_file: Path | None = None
) -> str:
    """Write `path` again as `out`; what was done, on the first process. Collective under torchrun.

    Raises InputError for a damaged checkpoint, another model's config, or an `out` that is there or can't be written.
    """
    if out.exists():
        raise InputError(f"--out {out}: is there already; name a folder that is not.")
    config = _config(path, overrides, config_file)
    copies = config.parallel.tp * config.parallel.pp
    ranks = ranks or copies
    if ranks % copies:
        raise InputError(f"--ranks {ranks}: should be a multiple of parallel.tp x parallel.pp, {copies}.")
    held = [one for one in tiles.held(_one_context(config)) if one.context == 0]
    groups.start(Parallel(), 0)
    try:
        partial = groups.decided_by_rank_0(lambda: _beside(out))
        with new_folder.becoming(partial, out):
            return _resharded(path, partial, out, held, _Layout(ranks=ranks, parallel=config.parallel), config)
    finally:
        groups.stop()


def _beside(out: Path) -> Path:
    partial = out.absolute().with_name(f"{out.name}.partial-{secrets.token_hex(4)}")
    new_folder.make(partial, out)
    return partial


def _resharded(path: Path, partial: Path, out: Path, held: list[Held], layout: "_Layout", config: Config) -> str:
    mine = (groups.rank(), groups.world_size())
    wrong = groups.decided_together(_problem(path, mine), lambda every: next(filter(None, every), None))
    if wrong:
        raise InputError(wrong)
    places = _write(sharded.Stored(path), held, layout, partial, mine)
    everything = groups.decided_together(places, lambda every: [place for part in every for place in part])
    if groups.rank() == 0:
        state = {"format": checkpoints.FORMAT, "written": checkpoint.written(config, layout.ranks)}
        written = {**checkpoints.state(path), **state}
        texts = packed.index_files(everything) | {checkpoints.STATE: (json.dumps(written, indent=1) + "\n").encode()}
        for name, content in texts.items():
            (partial / name).write_bytes(content)
        checkpoints.complete(partial, out.absolute(), checkpoints.manifest(checkpoints.hashed(partial)))
    groups.barrier()
    size = sum(place.size for place in everything)
    done = f"{out}: {len(everything):,} pieces, {size:,} bytes in {len({p.file for p in everything})} files"
    return done if groups.rank() == 0 else ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    ranks: int
    parallel: Parallel

    @property
    def replicas(self) -> int:
        """Ranks that hold the same: of data and context parallelism."""
        return self.ranks // (self.parallel.tp * self.parallel.pp)

    def rank(self, stage: int, replica: int, tensor: int) -> int:
        """Megatron numbers tensor ranks fastest and stages slowest."""
        return (stage * self.replicas + replica) * self.parallel.tp + tensor


def _config(path: Path, overrides: tuple[str, ...], file: Path | None) -> Config:
    file = file or path.absolute().parent.parent / "config.yaml"
    config = dataclasses.replace(configs.load(file), parallel=Parallel(micro_batch=1))
    tree: dict[str, Any] = to_dict(config)
    for assignment in overrides:
        if not assignment.startswith("parallel."):
            raise InputError(f"{assignment!r}: only the layout can change here; it should be parallel.key=value.")
        configs.override(tree, assignment)
    config = configs.from_dict(tree)
    parallel = config.parallel
    preflight.layout(config, parallel.tp * parallel.pp * parallel.cp)
    checkpoint.position(path, config)
    return config


def _one_context(config: Config) -> Config:
    """Context ranks hold copies: a checkpoint knows them as data-parallel ones."""
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, cp=1))


def _problem(path: Path, share: tuple[int, int]) -> str | None:
    try:
        checkpoints.verify(path, share)
    except InputError as error:
        return str(error)
    return None


def _write(
    stored: sharded.Stored, held: list[Held], layout: _Layout, folder: Path, share: tuple[int, int]
) -> list[Place]:
    """The files of this process's share of the (stage, replica) pairs; where each piece lies."""
    kinds = _kinds(stored, {name for one in held for name in one.shards})
    places = []
    for stage in range(layout.parallel.pp):
        row = sorted((one for one in held if one.stage == stage), key=lambda one: one.tensor)
        for replica in range(layout.replicas):
            if (stage * layout.replicas + replica) % share[1] == share[0]:
                ranks = [layout.rank(stage, replica, one.tensor) for one in row]
                places += _files(stored, kinds, row, (replica, layout.replicas), ranks, folder)
    return places


def _kinds(stored: sharded.Stored, names: set[str]) -> dict[str, list[str]]:
    """Parameter: what is kept of it (param, exp_avg, ema, ...), in the order in which training writes it."""
    kinds: dict[str, list[str]] = {}
    for key in stored.shapes:
        dots = [index for index, letter in enumerate(key) if letter == "."]
        split = next((index for index in dots if key[index + 1 :] in names), None)
        if split is None:
            raise InputError(f"{stored.folder}: holds {key}, which the config's model does not have; give --config.")
        kinds.setdefault(key[split + 1 :], []).append(key[:split])
    missing = sorted(names - kinds.keys())
    if missing:
        raise InputError(f"{stored.folder}: has nothing of {missing[0]}, which the config's model has; give --config.")
    known, last = checkpoint.KINDS, fp8.STATE
    for found in kinds.values():
        found.sort(key=lambda kind: (known.index(kind) if kind in known else len(known), kind in last, kind))
    return kinds


def _files(
    stored: sharded.Stored,
    kinds: dict[str, list[str]],
    row: list[Held],
    replica: tuple[int, int],
    ranks: list[int],
    folder: Path,
) -> list[Place]:
    """Those of one replica of a stage: its tensor ranks go through the parameters side by side."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(contextlib.closing(Files(folder, rank))) for rank in ranks]
        shares = [packed.Shares(replica[1]) for _ in row]
        for name in row[0].shards:
            for kind in kinds[name]:
                whole = None
                key = f"{kind}.{name}"
                whole_shape = stored.shapes[key] if kind in fp8.STATE else None
                for index, chunk in _chunks(key, name, row, whole_shape):
                    size = 4 * math.prod(chunk.shape)
                    if shares[index].owner(size) != replica[0]:
                        continue
                    whole = stored.read(chunk.key) if whole is None else whole
                    if tuple(whole.shape) != chunk.whole:
                        raise InputError(f"{stored.folder}: {chunk.key} is {tuple(whole.shape)}, not {chunk.whole}.")
                    box = tuple(slice(o, o + n) for o, n in zip(chunk.offset, chunk.shape, strict=True))
                    files[index].put(chunk, whole[box])
        return [place for file in files for place in file.places]


def _chunks(key: str, name: str, row: list[Held], whole_shape: tuple[int, ...] | None) -> Iterator[tuple[int, Chunk]]:
    """(tensor rank, what it writes of a tensor); `whole_shape`: of one that lies beside the parameter, alike on all."""
    if whole_shape is not None:
        yield 0, Chunk(key=key, whole=whole_shape, offset=(0,) * len(whole_shape), shape=whole_shape)
        return
    for index, one in enumerate(row):
        shard = one.shards[name]
        if shard.dim is None and index:
            continue
        offset = tuple(index * n if dim == shard.dim else 0 for dim, n in enumerate(shard.shape))
        yield index, Chunk(key=key, whole=tuple(shard.tag.shape), offset=offset, shape=shard.shape)


class Files:
    """The files of one rank."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank, self._count = folder, rank, 0
        self._file: IO[bytes] | None = None
        self.places: list[Place] = []

    def put(self, chunk: Chunk, value: Any) -> None:
        if self._file is None or self._file.tell() >= packed.FILE_BYTES:
            self.close()
            self._file = (self._folder / packed.file_name(self._rank, self._count)).open("xb")
            self._count += 1
        self.places.append(packed.put(self._file, Path(self._file.name).name, chunk, value))

    def close(self) -> None:
        if self._file is not None:
            checkpoints.sync_file(self._file)
            self._file.close()
            self._file = None
