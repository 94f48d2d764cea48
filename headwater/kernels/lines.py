# ruff: noqa: ANN001, ANN201
# mypy: ignore-errors
"""The cache lines that the id index is made of: where they are, and what is in them.

Imported only by generated modules, as `headwater.kernels.memory` is.

Invariants:
- A virtual slot's table is a row of lines, `LINES` in each of its `pages[slot]` pages; page k of the slot is
  number `directory[slot, k]`.
- Page 0 has no entries. It is the only page of every slot that never had one, so an index that few slots
  are used of is small, and made at once.
- A line has `WIDTH` entries: int64 ids, then int32 rows, then int32 counts; row −1 marks an entry empty.
- All lines from an id's home to the one before its own are full, so a search ends at a line that is not.
"""

import numpy as np

from headwater.kernels.memory import inlined, place_of, read_int, read_long, write_int, write_long
from headwater.kernels.primitives import inner

WIDTH = 4
LINE = 64
LINES_SHIFT = 4
LINES = 1 << LINES_SHIFT
PAGE = LINE * LINES
PAGE_SHIFT = 14
ROWS_HERE, COUNTS = 8, 12
SLOTS = 4096
MOST_COUNT = np.int32(2**31 - 1)


@inlined
def home_of(hashed, lines):
    """Where a search begins: the upper half of the hash, scaled to the number of lines."""
    return np.int64(((hashed >> np.uint64(32)) * np.uint64(lines)) >> np.uint64(32))


@inlined
def slot_of(hashed, first):
    return np.int64(hashed & np.uint64(SLOTS - 1)) - first


@inlined
def lines_of(slot, pages):
    return np.int64(pages[np.uint64(slot)]) << LINES_SHIFT


@inlined
def line_at(position, slot, directory, chunks):
    """Address of the slot's line at `position`."""
    page = np.int64(directory[np.uint64(slot), np.uint64(position >> LINES_SHIFT)])
    return place_of(page, chunks, PAGE_SHIFT, PAGE) + (position & (LINES - 1)) * LINE


@inlined
def way_of(line, wanted):
    """Which entry of the line has the id, or −1. Without branches, which would be guessed wrong."""
    way = -1
    for w in range(WIDTH):
        here = (read_long(line, w) == wanted) & (read_int(line, ROWS_HERE + w) >= 0)
        way = w if here else way
    return way


@inlined
def empty_way(line):
    """An empty entry of the line, or −1."""
    way = -1
    for w in range(WIDTH):
        way = w if read_int(line, ROWS_HERE + w) < 0 else way
    return way


@inlined
def after(position, lines):
    return position + 1 if position + 1 < lines else 0


@inner
def search(wanted, hashed, slot, pages, directory, chunks):
    """(position, line, way) of the id's entry; way −1, and the first line with an empty one, if none."""
    lines = lines_of(slot, pages)
    position = home_of(hashed, lines)
    line = line_at(position, slot, directory, chunks)
    way = way_of(line, wanted)
    while way < 0 and empty_way(line) < 0:
        position = after(position, lines)
        line = line_at(position, slot, directory, chunks)
        way = way_of(line, wanted)
    return position, line, way


@inlined
def take(line, wanted):
    """The id's row in this line, or −1, and 1 where to search on, else 0.

    In bits, since comparisons become branches, which random ids mispredict.
    """
    row, lowest = np.int32(-1), np.int32(0)
    for w in range(WIDTH):
        here = read_int(line, ROWS_HERE + w)
        lowest = lowest | here
        row = row & (here | (np.int32(read_long(line, w) == wanted) - np.int32(1)))
    return row, np.int64((row & ~lowest) >> 31) & 1


@inlined
def count_one(line, wanted):
    """The id's count, one higher than it was; 0 where it is not in this line."""
    counted = np.int32(0)
    for w in range(WIDTH):
        lives = read_int(line, ROWS_HERE + w) >= 0
        more = np.int32(lives & (read_long(line, w) == wanted))
        count = min(read_int(line, COUNTS + w), MOST_COUNT - more) + more
        write_int(line, COUNTS + w, count)
        counted = max(counted, count * more)
    return counted


@inner
def clear(page, chunks):
    first = place_of(page, chunks, PAGE_SHIFT, PAGE)
    for line in range(first, first + PAGE, LINE):
        for way in range(WIDTH):
            write_int(line, ROWS_HERE + way, np.int32(-1))


@inlined
def write_entry(line, way, wanted, row, count):
    write_long(line, way, wanted)
    write_int(line, ROWS_HERE + way, row)
    write_int(line, COUNTS + way, count)
