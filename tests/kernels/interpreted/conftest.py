import pytest
import torch

from mpdit_kernels import switch


@pytest.fixture(autouse=True, scope="session")
def _kernels_are_tritons() -> None:
    switch.use("triton")
    assert switch.takes(torch.zeros(1)), "started without TRITON_INTERPRET=1"
