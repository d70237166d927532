"""What a rank leaves for torchrun, if that has started it."""

import contextlib
import json
import os
import time
from pathlib import Path


def tell_launcher(text: str) -> None:
    """Why this process ends: torchrun's summary of a failed job has the text of each rank, the earliest as the cause.

    In the format of torch.distributed.elastic's ErrorHandler, which would write a traceback where a sentence is due.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        more = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": more}}), encoding="utf-8")
