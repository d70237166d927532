"""Checkpoint folders without a run: a few small files under a real manifest."""

from pathlib import Path

from mpdit.train import checkpoints

FILES = {
    "__0_0.distcp": bytes(range(256)) * 8,
    "__1_0.distcp": b"weights" * 100,
    ".metadata": b"where",
    "state.json": b'{"format": "mpdit-checkpoint/3", "step": 1}\n',
}


def write(run_dir: Path, step: int, files: dict[str, bytes] | None = None) -> Path:
    """RUN/checkpoints/step_N, complete."""
    final = checkpoints.folder_of(run_dir) / f"step_{step}"
    partial = final.with_name(final.name + ".partial-test")
    partial.mkdir(parents=True)
    for name, content in (FILES if files is None else files).items():
        (partial / name).write_bytes(content)
    checkpoints.complete(partial, final, checkpoints.manifest(checkpoints.hashed(partial)))
    return final


DAMAGES = ("truncated", "flipped", "emptied", "removed")


def damage(path: Path, how: str, at: int = 0) -> None:
    """One of DAMAGES to a file; `at`: the byte that is flipped."""
    whole = path.read_bytes()
    at %= len(whole)
    spoilt = {
        "truncated": whole[: len(whole) // 2],
        "flipped": whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :],
        "emptied": b"",
    }
    path.unlink()
    if how != "removed":
        path.write_bytes(spoilt[how])
