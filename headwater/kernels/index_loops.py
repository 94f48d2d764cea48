# ruff: noqa: ANN001, ANN201
# mypy: allow-untyped-defs, allow-untyped-calls
"""The loops of the id index; compiled from this text by `headwater.kernels.index`, never imported.

Invariants:
- A virtual slot's table is open addressing with linear probing over `pages[slot]` pages of `ENTRIES`
  entries; page k of the slot is number `directory[slot, k]`.
- An entry is int64 id, int32 row, int32 count; row −1 marks it empty. Between an id's home and its entry
  none is empty, so a removal moves the entries after it back and leaves no mark.
- Ids are hashed a group at a time and their first lines asked for, before the first is probed.
"""

import numpy as np

from headwater.kernels.memory import (
    mix,
    place_of,
    prefetch,
    read_int,
    read_long,
    write_int,
    write_long,
)
from headwater.kernels.primitives import inner, outer

ENTRIES_SHIFT = 5
ENTRIES = 1 << ENTRIES_SHIFT
ENTRY = 16
PAGE = ENTRIES * ENTRY
PAGE_SHIFT = 15
SLOTS = 4096
GROUP = 16

NEXT_ROW, FREE, NEXT_PAGE, ROWS, REFUSED, FRESH, WANTED = range(7)
WAYS = 8
BUCKETS = 16


@inner
def home_of(hashed, capacity):
    """First position to look at: the upper half of the hash, scaled to the capacity."""
    return np.int64(((hashed >> np.uint64(32)) * np.uint64(capacity)) >> np.uint64(32))


@inner
def slot_of(hashed, first):
    return np.int64(hashed & np.uint64(SLOTS - 1)) - first


@inner
def entry_at(position, slot, directory, chunks):
    page = np.int64(directory[slot, position >> ENTRIES_SHIFT])
    return place_of(page, chunks, PAGE_SHIFT, PAGE) + (position & (ENTRIES - 1)) * ENTRY


@inner
def probe(wanted, hashed, slot, pages, directory, chunks):
    """Position and address of the id's entry, or of the empty entry where it would go."""
    capacity = np.int64(pages[slot]) * ENTRIES
    position = home_of(hashed, capacity)
    address = entry_at(position, slot, directory, chunks)
    while read_int(address, 2) >= 0 and read_long(address, 0) != wanted:
        position += 1
        address += ENTRY
        if position & (ENTRIES - 1) == 0:
            position = position if position < capacity else 0
            address = entry_at(position, slot, directory, chunks)
    return position, address


@inner
def ask_for(ids, start, stop, first, pages, directory, chunks, hashes):
    """Hash ids [start, stop) into `hashes` and prefetch where each is looked for first."""
    for i in range(start, stop):
        hashes[i - start] = mix(np.uint64(ids[i]))
    for i in range(start, stop):
        hashed = hashes[i - start]
        slot = slot_of(hashed, first)
        position = home_of(hashed, np.int64(pages[slot]) * ENTRIES)
        prefetch(entry_at(position, slot, directory, chunks))


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
    hashes = np.empty(GROUP, np.uint64)
    found = 0
    for start in range(0, len(ids), GROUP):
        stop = min(start + GROUP, len(ids))
        ask_for(ids, start, stop, first, pages, directory, chunks, hashes)
        for i in range(start, stop):
            hashed = hashes[i - start]
            address = probe(ids[i], hashed, slot_of(hashed, first), pages, directory, chunks)[1]
            row = read_int(address, 2)
            rows[i] = row
            found += row >= 0
    return found


@inner
def clear(page, chunks):
    address = place_of(page, chunks, PAGE_SHIFT, PAGE)
    for entry in range(ENTRIES):
        write_int(address + entry * ENTRY, 2, np.int32(-1))


@outer("void(int64, int64, int64[::1])")
def clear_pages(start, stop, chunks):
    """Make the entries of pages [start, stop) empty."""
    for page in range(start, stop):
        clear(page, chunks)


@inner
def grow(slot, pages, used, directory, chunks, counters):
    """Give the slot a quarter more pages; False, nothing changed, where pages or directory end first."""
    old = np.int64(pages[slot])
    new = old + max(1, old // 4)
    if counters[NEXT_PAGE] + new - old > len(chunks) << PAGE_SHIFT or new > directory.shape[1]:
        counters[WANTED] = new
        return False
    moved = np.empty((np.int64(used[slot]), 2), np.int64)
    count = 0
    for page in range(old):
        address = entry_at(page * ENTRIES, slot, directory, chunks)
        for entry in range(ENTRIES):
            if read_int(address + entry * ENTRY, 2) >= 0:
                moved[count, 0] = read_long(address + entry * ENTRY, 0)
                moved[count, 1] = read_long(address + entry * ENTRY, 1)
                count += 1
        clear(np.int64(directory[slot, page]), chunks)
    for page in range(old, new):
        directory[slot, page] = np.int32(counters[NEXT_PAGE])
        clear(counters[NEXT_PAGE], chunks)
        counters[NEXT_PAGE] += 1
    pages[slot] = np.int32(new)
    for i in range(count):
        hashed = mix(np.uint64(moved[i, 0]))
        address = probe(moved[i, 0], hashed, slot, pages, directory, chunks)[1]
        write_long(address, 0, moved[i, 0])
        write_long(address, 1, moved[i, 1])
    return True


@inner
def bucket_of(hashed, slot):
    return slot * BUCKETS + np.int64((hashed >> np.uint64(12)) & np.uint64(BUCKETS - 1))


@inner
def way_of(wanted, bucket, pending_ids, pending_counts):
    """Where the id is counted in its bucket, or `WAYS`."""
    for way in range(WAYS):
        if pending_counts[bucket, way] > 0 and pending_ids[bucket, way] == wanted:
            return way
    return WAYS


@inner
def drop_way(bucket, way, pending_ids, pending_counts):
    """Forget one count; those behind it move up."""
    for behind in range(way, WAYS - 1):
        pending_ids[bucket, behind] = pending_ids[bucket, behind + 1]
        pending_counts[bucket, behind] = pending_counts[bucket, behind + 1]
    pending_counts[bucket, WAYS - 1] = 0


@inner
def admits(wanted, bucket, pending_ids, pending_counts, needed):
    """Count one more update that carries the id; whether it is the one that makes its row.

    A bucket lists its ids from the last pushed to the longest not pushed, which a new one displaces.
    """
    way = way_of(wanted, bucket, pending_ids, pending_counts)
    count = np.int32(1)
    if way < WAYS:
        count += pending_counts[bucket, way]
        if count >= needed:
            drop_way(bucket, way, pending_ids, pending_counts)
            return True
    for behind in range(min(way, WAYS - 1), 0, -1):
        pending_ids[bucket, behind] = pending_ids[bucket, behind - 1]
        pending_counts[bucket, behind] = pending_counts[bucket, behind - 1]
    pending_ids[bucket, 0] = wanted
    pending_counts[bucket, 0] = count
    return False


@outer(
    "int64(int64[::1], int64, int64, int32[::1], int32[::1], int32[:, ::1], int64[::1], int64[::1], "
    "int32[::1], int64, int64[:, ::1], int32[:, ::1], int32[::1], int32[::1], int32[::1])"
)
def claim(
    ids,
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
    """Find or make the entries of ids from `begin` on, and count an update of each.

    rows[i]: its row, −1 where admission refuses it; counts[i]: its updates, this one included; the
    positions of new rows are appended to `fresh`. Returns where it stopped for want of pages, or the end.
    """
    hashes = np.empty(GROUP, np.uint64)
    for start in range(begin, len(ids), GROUP):
        stop = min(start + GROUP, len(ids))
        ask_for(ids, start, stop, first, pages, directory, chunks, hashes)
        for i in range(start, stop):
            hashed = hashes[i - start]
            slot = slot_of(hashed, first)
            address = probe(ids[i], hashed, slot, pages, directory, chunks)[1]
            row = read_int(address, 2)
            if row < 0:
                if np.int64(used[slot]) * 10 >= np.int64(pages[slot]) * (ENTRIES * 7):
                    if not grow(slot, pages, used, directory, chunks, counters):
                        return i
                    address = probe(ids[i], hashed, slot, pages, directory, chunks)[1]
                if needed > 1 and not admits(
                    ids[i], bucket_of(hashed, slot), pending_ids, pending_counts, needed
                ):
                    rows[i] = -1
                    counts[i] = 0
                    counters[REFUSED] += 1
                    continue
                if counters[FREE] > 0:
                    counters[FREE] -= 1
                    row = free[counters[FREE]]
                else:
                    row = np.int32(counters[NEXT_ROW])
                    counters[NEXT_ROW] += 1
                write_long(address, 0, ids[i])
                write_int(address, 2, row)
                write_int(address, 3, np.int32(0))
                used[slot] += 1
                counters[ROWS] += 1
                fresh[counters[FRESH]] = np.int32(i)
                counters[FRESH] += 1
            rows[i] = row
            counts[i] = min(read_int(address, 3), np.int32(2147483646)) + 1
            write_int(address, 3, counts[i])
    return len(ids)


@inner
def close_gap(hole, slot, pages, directory, chunks):
    """Empty the entry at position `hole`, moving back those after it that belong before it."""
    capacity = np.int64(pages[slot]) * ENTRIES
    position = hole
    while True:
        position = position + 1 if position + 1 < capacity else 0
        address = entry_at(position, slot, directory, chunks)
        if read_int(address, 2) < 0:
            break
        home = home_of(mix(np.uint64(read_long(address, 0))), capacity)
        if (position - home) % capacity >= (position - hole) % capacity:
            target = entry_at(hole, slot, directory, chunks)
            write_long(target, 0, read_long(address, 0))
            write_long(target, 1, read_long(address, 1))
            hole = position
    write_int(entry_at(hole, slot, directory, chunks), 2, np.int32(-1))


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
            way = way_of(ids[i], bucket, pending_ids, pending_counts)
            if way < WAYS:
                drop_way(bucket, way, pending_ids, pending_counts)
        position, address = probe(ids[i], hashed, slot, pages, directory, chunks)
        row = read_int(address, 2)
        if row >= 0:
            free[counters[FREE]] = row
            counters[FREE] += 1
            close_gap(position, slot, pages, directory, chunks)
            used[slot] -= 1
            removed += 1
    counters[ROWS] -= removed
    return removed


@outer("int64(int64, int64, int32[::1], int32[:, ::1], int64[::1], int64[::1], int32[::1])")
def entries(start, stop, pages, directory, chunks, ids, rows):
    """Ids and rows of the entries of slots [start, stop), one slot after the other; returns how many."""
    count = 0
    for slot in range(start, stop):
        for page in range(np.int64(pages[slot])):
            address = entry_at(page * ENTRIES, slot, directory, chunks)
            for entry in range(ENTRIES):
                row = read_int(address + entry * ENTRY, 2)
                if row >= 0:
                    ids[count] = read_long(address + entry * ENTRY, 0)
                    rows[count] = row
                    count += 1
    return count
