"""Shapes and strides that nobody thought of, in Triton's interpreter (started by test_fused.py)."""

from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.cases import USED, Heads, Rows, rows_errors

# Relative to the largest value. Of few numbers it can be almost nothing, as that of dx where all rows are almost even.
FP32, FEW = 2e-6, 1e-3

small = st.integers(0, 6)


@st.composite
def rows(draw: st.DrawFn) -> Rows:
    P, Q, D = draw(small), draw(small), draw(st.integers(3, 90))
    along_second = draw(st.booleans())
    modulation = draw(st.sampled_from([(1, Q) if along_second else (P, 1), (1, 1)]))
    view = draw(st.sampled_from(["contiguous", "transposed", "every other", "columns"]))
    return Rows(shape=(P, Q, D), modulation=(*modulation, D), view=view)


@given(rows(), st.sampled_from(sorted(USED)), st.booleans())
@settings(max_examples=60, deadline=None)
def test_rows(case: Rows, operation: str, gated: bool) -> None:
    found = rows_errors(operation, case, gated=gated)
    assert max(found.values()) <= (FP32 if case.shape[2] > 16 else FEW), found


@given(st.tuples(small, small, st.integers(1, 5), st.integers(3, 40)), st.booleans(), st.data())
@settings(max_examples=40, deadline=None)
def test_heads(shape: tuple[int, int, int, int], packed: bool, data: st.DataObject) -> None:
    P, Q, _, d = shape
    tables = [None] if d % 2 else [None, (P, 1), (1, Q), (P, Q), (1, 1)]
    found = Heads(shape=shape, packed=packed, table=data.draw(st.sampled_from(tables))).errors()
    assert max(found.values()) <= (FP32 if d > 16 else FEW), found
