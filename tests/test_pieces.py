"""Messages of big functions; that they travel and refuse what does not fit: `test_messages`."""

from __future__ import annotations

import subprocess
import sys

import pytest

from distpool.errors import ProtocolError
from distpool.wire import messages, pieces
from distpool.wire.frames import Kind


def test_a_piece_says_where_it_belongs() -> None:
    piece = pieces.Piece.unpack(pieces.Piece(7, 1, 1 << 40, [5, 1 << 41]).pack())
    assert (piece.number, piece.index, piece.offset, piece.sizes) == (7, 1, 1 << 40, [5, 1 << 41])
    with pytest.raises(ProtocolError):
        pieces.Piece.unpack(b"[7, 1, 0]")


def test_the_table_is_beside_that_of_other_messages() -> None:
    assert set(pieces.MESSAGES) == {int(Kind.PIECE), int(Kind.FORWARD), int(Kind.WANTED)}
    assert not set(pieces.MESSAGES) & set(messages.MESSAGES)


def test_who_sends_no_big_function_does_not_load_them() -> None:
    code = "import sys, distpool.wire.messages, distpool.wire.structs; print('distpool.wire.pieces' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=True)
    assert done.stdout.strip() == "False"
