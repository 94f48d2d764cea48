# ruff: noqa: ANN001, ANN201
# mypy: ignore-errors
"""The loops of the id index; compiled from this text by `headwater.kernels.index`, never imported.

Invariants:
- A virtual slot's table is a row of cache lines, `LINES` in each of its `pages[slot]` pages; page k of the
  slot is number `directory[slot, k]`.
- A line has `WIDTH` entries: int64 ids, then int32 rows, then int32 counts; row −1 marks an entry empty.
- All lines from an id's home to the one before its own are full, so a search ends at a line that is not, and
  a removal fills the gap that it leaves in a full line.
- Slots grow at loads between 42 / 64 and 49 / 64, so that they do not all grow in the same few updates.
- The home lines of a group of ids are asked for before the first of them is searched.
"""

import numpy as np

from headwater.kernels.memory import (
    inlined,
    mix,
    place_of,
    prefetch,
    read_int,
    read_long,
    write_int,
    write_long,
)
from headwater.kernels.primitives import inner, outer

WIDTH = 4
LINE = 64
LINES_SHIFT = 4
LINES = 1 << LINES_SHIFT
PAGE = LINE * LINES
PAGE_SHIFT = 14
ROWS_HERE, COUNTS = 8, 12
SLOTS = 4096
GROUP = 128
AHEAD = 16
MOST_COUNT = np.int32(2**31 - 1)

NEXT_ROW, FREE, NEXT_PAGE, ROWS, REFUSED, FRESH, WANTED = range(7)
BUCKETS = 16
PLACES = 8


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
def ask_for(wanted, beyond, first, pages, directory, chunks):
    """Address of the line where the id is searched first, or of the one after it; prefetched."""
    hashed = mix(np.uint64(wanted))
    slot = slot_of(hashed, first)
    lines = lines_of(slot, pages)
    home = home_of(hashed, lines)
    line = line_at(after(home, lines) if beyond else home, slot, directory, chunks)
    prefetch(line)
    return line


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
def take_late(ids, later, late, first, pages, directory, chunks, lines, rows, counts, counting):
    """Search on for ids[i], i in later[:late]."""
    for start in range(0, late, GROUP):
        stop = min(start + GROUP, late)
        for k in range(start, stop):
            line = ask_for(ids[np.uint64(later[np.uint64(k)])], True, first, pages, directory, chunks)
            lines[np.uint64(k - start)] = line
        for k in range(start, stop):
            i = np.uint64(later[np.uint64(k)])
            line = lines[np.uint64(k - start)]
            row, on = take(line, ids[i])
            if on:
                hashed = mix(np.uint64(ids[i]))
                line = search(ids[i], hashed, slot_of(hashed, first), pages, directory, chunks)[1]
                row = take(line, ids[i])[0]
            rows[i] = row
            if counting:
                counts[i] = count_one(line, ids[i])


@inner
def look_up(ids, first, pages, directory, chunks, rows, counts, counting):
    """Fill `rows` and, where counting, add to and fill `counts`; returns how many ids have a row.

    Ids that are not in their home line, about one in twelve, are put off to the end: to wait for the line
    after it, or to guess whether it is needed, would cost as much as all the rest.
    """
    lines = np.empty(GROUP, np.int64)
    later = np.empty(len(ids) + 1, np.int32)
    late = 0
    for start in range(0, len(ids), GROUP):
        stop = min(start + GROUP, len(ids))
        for i in range(start, stop):
            lines[np.uint64(i - start)] = ask_for(ids[np.uint64(i)], False, first, pages, directory, chunks)
        for i in range(start, stop):
            place = np.uint64(i)
            row, on = take(lines[np.uint64(i - start)], ids[place])
            rows[place] = row
            later[np.uint64(late)] = i
            late += on
        if counting:
            for i in range(start, stop):
                counts[np.uint64(i)] = count_one(lines[np.uint64(i - start)], ids[np.uint64(i)])
    take_late(ids, later, late, first, pages, directory, chunks, lines, rows, counts, counting)
    found = 0
    for i in range(len(ids)):
        found += rows[i] >= 0
    return found


@outer("int64(int64[::1], int64, int64)")
def stranger(ids, first, slots):
    """Position of the first id that is in none of the `slots` slots from `first` on, or −1."""
    for i in range(len(ids)):
        if not 0 <= slot_of(mix(np.uint64(ids[i])), first) < slots:
            return i
    return -1


@outer("int64(int64[::1], int64, int32[::1], int32[:, ::1], int64[::1], int32[::1])")
def find(ids, first, pages, directory, chunks, rows):
    """rows[i] = the row of ids[i], or −1; returns how many there are."""
    return look_up(ids, first, pages, directory, chunks, rows, rows, False)


@outer("int64(int64[::1], int64, int32[::1], int32[:, ::1], int64[::1], int32[::1], int32[::1])")
def count(ids, first, pages, directory, chunks, rows, counts):
    """As `find`, and counts one update of each that has a row: counts[i], this one included."""
    return look_up(ids, first, pages, directory, chunks, rows, counts, True)


@inner
def clear(page, chunks):
    first = place_of(page, chunks, PAGE_SHIFT, PAGE)
    for line in range(first, first + PAGE, LINE):
        for way in range(WIDTH):
            write_int(line, ROWS_HERE + way, np.int32(-1))


@outer("void(int64, int64, int64[::1])")
def clear_pages(start, stop, chunks):
    """Make the entries of pages [start, stop) empty."""
    for page in range(start, stop):
        clear(page, chunks)


@inlined
def write_entry(line, way, wanted, row, count):
    write_long(line, way, wanted)
    write_int(line, ROWS_HERE + way, row)
    write_int(line, COUNTS + way, count)


@inner
def copy_entries(slot, pages, directory, chunks, ids, rows, counts):
    """The slot's entries, in the order of its lines; returns how many."""
    found = 0
    for position in range(lines_of(slot, pages)):
        line = line_at(position, slot, directory, chunks)
        for way in range(WIDTH):
            if read_int(line, ROWS_HERE + way) >= 0:
                ids[found] = read_long(line, way)
                rows[found] = read_int(line, ROWS_HERE + way)
                counts[found] = read_int(line, COUNTS + way)
                found += 1
    return found


@inner
def grow(slot, pages, used, directory, chunks, counters):
    """Give the slot two fifths more pages; False, nothing changed, where pages or directory end first."""
    old = np.int64(pages[slot])
    new = old + max(1, old * 2 // 5)
    if counters[NEXT_PAGE] + new - old > len(chunks) << PAGE_SHIFT or new > directory.shape[1]:
        counters[WANTED] = new
        return False
    moved = np.empty((np.int64(used[slot]), 3), np.int64)
    copy_entries(slot, pages, directory, chunks, moved[:, 0], moved[:, 1], moved[:, 2])
    for page in range(old, new):
        directory[slot, page] = np.int32(counters[NEXT_PAGE])
        counters[NEXT_PAGE] += 1
    for page in range(new):
        clear(np.int64(directory[slot, page]), chunks)
    pages[slot] = np.int32(new)
    lines = lines_of(slot, pages)
    for i in range(len(moved)):
        position = home_of(mix(np.uint64(moved[i, 0])), lines)
        line = line_at(position, slot, directory, chunks)
        while empty_way(line) < 0:
            position = after(position, lines)
            line = line_at(position, slot, directory, chunks)
        write_entry(line, empty_way(line), moved[i, 0], np.int32(moved[i, 1]), np.int32(moved[i, 2]))
    return True


@inlined
def bucket_of(hashed, slot):
    return slot * BUCKETS + np.int64((hashed >> np.uint64(12)) & np.uint64(BUCKETS - 1))


@inner
def pending_place(wanted, bucket, pending_ids, pending_counts):
    """Where the id is counted in its bucket, or `PLACES`."""
    for place in range(PLACES):
        if pending_counts[bucket, place] > 0 and pending_ids[bucket, place] == wanted:
            return place
    return PLACES


@inner
def drop_pending(bucket, place, pending_ids, pending_counts):
    """Forget one count; those behind it move up."""
    for behind in range(place, PLACES - 1):
        pending_ids[bucket, behind] = pending_ids[bucket, behind + 1]
        pending_counts[bucket, behind] = pending_counts[bucket, behind + 1]
    pending_counts[bucket, PLACES - 1] = 0


@inner
def admits(wanted, bucket, pending_ids, pending_counts, needed):
    """Count one more update that carries the id; whether it is the one that makes its row.

    A bucket lists its ids from the last pushed to the longest not pushed, which a new one displaces.
    """
    place = pending_place(wanted, bucket, pending_ids, pending_counts)
    count = np.int32(1)
    if place < PLACES:
        count += pending_counts[bucket, place]
        if count >= needed:
            drop_pending(bucket, place, pending_ids, pending_counts)
            return True
    for behind in range(min(place, PLACES - 1), 0, -1):
        pending_ids[bucket, behind] = pending_ids[bucket, behind - 1]
        pending_counts[bucket, behind] = pending_counts[bucket, behind - 1]
    pending_ids[bucket, 0] = wanted
    pending_counts[bucket, 0] = count
    return False


@outer(
    "int64(int64[::1], int32[::1], int64, int64, int32[::1], int32[::1], int32[:, ::1], int64[::1], "
    "int64[::1], int32[::1], int64, int64[:, ::1], int32[:, ::1], int32[::1], int32[::1], int32[::1])"
)
def claim(
    ids,
    absent,
    begin,
    first,
    pages,
    used,
    directory,
    chunks,
    counters,
    free,
    needed,
    pending_ids,
    pending_counts,
    rows,
    counts,
    fresh,
):
    """Make entries with a count of 1 for ids[i], i in `absent` from `begin` on, where they are admitted.

    rows[i]: the new row, −1 where refused; the positions of new ones are appended to `fresh`. Returns where
    in `absent` it stopped for want of pages, or its end.
    """
    for k in range(begin, len(absent)):
        i = absent[k]
        if k + AHEAD < len(absent):
            ask_for(ids[absent[k + AHEAD]], False, first, pages, directory, chunks)
        hashed = mix(np.uint64(ids[i]))
        slot = slot_of(hashed, first)
        crowded = np.int64(used[slot]) * 64 >= lines_of(slot, pages) * WIDTH * (42 + (slot & 7))
        if crowded and not grow(slot, pages, used, directory, chunks, counters):
            return k
        rows[i], counts[i] = -1, 0
        if needed > 1:
            bucket = bucket_of(hashed, slot)
            if not admits(ids[i], bucket, pending_ids, pending_counts, needed):
                counters[REFUSED] += 1
                continue
        if counters[FREE] > 0:
            counters[FREE] -= 1
            rows[i] = free[counters[FREE]]
        else:
            rows[i] = counters[NEXT_ROW]
            counters[NEXT_ROW] += 1
        counts[i] = 1
        line = search(ids[i], hashed, slot, pages, directory, chunks)[1]
        write_entry(line, empty_way(line), ids[i], rows[i], counts[i])
        used[slot] += 1
        counters[ROWS] += 1
        fresh[counters[FRESH]] = i
        counters[FRESH] += 1
    return len(absent)


@inner
def passing_way(line, position, hole, lines):
    """An entry of the line at `position` whose home is at or before `hole`, or −1."""
    for w in range(WIDTH):
        if read_int(line, ROWS_HERE + w) >= 0:
            home = home_of(mix(np.uint64(read_long(line, w))), lines)
            if (position - home) % lines >= (position - hole) % lines:
                return w
    return -1


@inner
def close_gap(hole, line, way, slot, pages, directory, chunks):
    """Empty entry `way` of `line`, at position `hole`, and keep every search that went past it whole."""
    lines = lines_of(slot, pages)
    position = hole
    past = empty_way(line) < 0
    while past:
        position = after(position, lines)
        if position == hole:
            break
        other = line_at(position, slot, directory, chunks)
        past = empty_way(other) < 0
        mover = passing_way(other, position, hole, lines)
        if mover >= 0:
            count = read_int(other, COUNTS + mover)
            write_entry(line, way, read_long(other, mover), read_int(other, ROWS_HERE + mover), count)
            hole, line, way = position, other, mover
    write_int(line, ROWS_HERE + way, np.int32(-1))


@outer(
    "int64(int64[::1], int64, int32[::1], int32[::1], int32[:, ::1], int64[::1], int64[::1], int32[::1], "
    "int64[:, ::1], int32[:, ::1])"
)
def remove(ids, first, pages, used, directory, chunks, counters, free, pending_ids, pending_counts):
    """Drop the entries and pending counts of ids, their rows to `free`; returns how many had a row."""
    removed = 0
    for i in range(len(ids)):
        hashed = mix(np.uint64(ids[i]))
        slot = slot_of(hashed, first)
        if len(pending_ids) > 0:
            bucket = bucket_of(hashed, slot)
            place = pending_place(ids[i], bucket, pending_ids, pending_counts)
            if place < PLACES:
                drop_pending(bucket, place, pending_ids, pending_counts)
        position, line, way = search(ids[i], hashed, slot, pages, directory, chunks)
        if way >= 0:
            free[counters[FREE]] = read_int(line, ROWS_HERE + way)
            counters[FREE] += 1
            close_gap(position, line, way, slot, pages, directory, chunks)
            used[slot] -= 1
            removed += 1
    counters[ROWS] -= removed
    return removed


@outer("int64(int64, int64, int32[::1], int32[:, ::1], int64[::1], int64[::1], int32[::1])")
def entries(start, stop, pages, directory, chunks, ids, rows):
    """Ids and rows of the entries of slots [start, stop), one slot after the other; returns how many."""
    count = 0
    counts = np.empty(len(rows), np.int32)
    for slot in range(start, stop):
        count += copy_entries(slot, pages, directory, chunks, ids[count:], rows[count:], counts[count:])
    return count
