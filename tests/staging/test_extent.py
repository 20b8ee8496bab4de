"""What an encoding would become is counted exactly, and before it does."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.errors import RecordDamagedError, UnsupportedLeafError
from ckptmgr.staging import extent
from ckptmgr.staging.extent import too_much
from ckptmgr.staging.revive import decode_values
from ckptmgr.staging.values import encode_values

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text(max_size=300)
    | st.binary(max_size=300)
)
forms = st.recursive(scalars, lambda inner: st.lists(inner, max_size=40), max_leaves=60)


def arrays_in(form: Any) -> int:
    return 1 + sum(map(arrays_in, form)) if type(form) is list else 0


@pytest.fixture
def ten_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extent, "ARRAYS_MAX", 10)


@given(form=forms)
def test_arrays_are_counted_exactly(form: Any) -> None:
    raw = msgspec.msgpack.encode(form)
    arrays = arrays_in(form)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extent, "ARRAYS_MAX", arrays)
        assert extent._scan(raw) == too_much(raw) == ""
        if arrays:
            patch.setattr(extent, "ARRAYS_MAX", arrays - 1)
            assert "arrays" in extent._scan(raw)


@given(raw=st.binary(max_size=2000))
def test_any_bytes_are_scanned_to_their_end(raw: bytes) -> None:
    extent._scan(raw)


@pytest.mark.usefixtures("ten_arrays")
def test_long_scalars_are_no_arrays() -> None:
    """Bytes that look like arrays, in a bin, cost nothing."""
    assert too_much(msgspec.msgpack.encode([b"\x90" * 70_000, "x" * 70_000, b"\x80" * 300])) == ""


@pytest.mark.parametrize("form", [{}, {"a": 1}, msgspec.msgpack.Ext(5, b"12345")])
@pytest.mark.usefixtures("ten_arrays")
def test_what_the_encoding_never_holds_is_refused_where_there_is_much(form: Any) -> None:
    assert "maps or extensions" in too_much(msgspec.msgpack.encode([form] * 20))


def test_what_could_not_be_restored_is_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    places = [([[]] * 30, ("net", None))]
    encoded = encode_values(places, lambda _item, _trail: None)  # type: ignore[arg-type]
    monkeypatch.setattr(extent, "ARRAYS_MAX", 10)
    with pytest.raises(RecordDamagedError, match="values: holds more than 10 arrays"):
        decode_values(encoded, subject="values")
    with pytest.raises(UnsupportedLeafError, match="holds more than 10 arrays"):
        encode_values(places, lambda _item, _trail: None)  # type: ignore[arg-type]
