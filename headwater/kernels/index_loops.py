# ruff: noqa: ANN001, ANN201
# mypy: ignore-errors
"""The loops of the id index; compiled from this text by `headwater.kernels.index`, never imported.

Invariants:
- The lines are as `headwater.kernels.lines` says; a removal fills the gap that it leaves in a full line.
- Slots grow at loads between 42 / 64 and 49 / 64, and by 30 to 49 of a hundred, so that few of them grow in
  the same update.
- The home lines of a group of ids are asked for while the group before it is searched.
"""

import numpy as np

from headwater.kernels.lines import (
    COUNTS,
    PAGE_SHIFT,
    ROWS_HERE,
    WIDTH,
    after,
    clear,
    count_one,
    empty_way,
    home_of,
    line_at,
    lines_of,
    search,
    slot_of,
    take,
    write_entry,
)
from headwater.kernels.memory import inlined, mix, prefetch, read_int, read_long, write_int
from headwater.kernels.primitives import inner, outer

GROUP = 64
AHEAD = 16

NEXT_ROW, FREE, NEXT_PAGE, ROWS, REFUSED, FRESH, WANTED = range(7)
BUCKETS = 16
PLACES = 8


@inlined
def ask_for(wanted, first, pages, directory, chunks):
    """Prefetch the line where the id is searched first."""
    hashed = mix(np.uint64(wanted))
    slot = slot_of(hashed, first)
    prefetch(line_at(home_of(hashed, lines_of(slot, pages)), slot, directory, chunks))


@inlined
def hash_group(ids, start, stop, hashes):
    """Apart from the loop that asks for lines, since this one is vectorised."""
    for k in range(stop - start):
        hashes[np.uint64(k)] = mix(np.uint64(ids[np.uint64(start + k)]))


@inlined
def ask_for_homes(ids, start, stop, hashes, lines, first, pages, directory, chunks):
    """lines[k]: where ids[start + k] is searched first."""
    hash_group(ids, start, stop, hashes)
    for k in range(stop - start):
        hashed = hashes[np.uint64(k)]
        slot = slot_of(hashed, first)
        line = line_at(home_of(hashed, lines_of(slot, pages)), slot, directory, chunks)
        prefetch(line)
        lines[np.uint64(k)] = line


@inlined
def ask_for_next(ids, later, positions, start, stop, lines, first, pages, directory, chunks):
    """lines[k]: where ids[later[start + k]] is searched next; positions[start + k] moves there.

    A position of −1 stands for the home.
    """
    for k in range(start, stop):
        hashed = mix(np.uint64(ids[np.uint64(later[np.uint64(k)])]))
        slot = slot_of(hashed, first)
        count = lines_of(slot, pages)
        position = np.int64(positions[np.uint64(k)])
        position = after(home_of(hashed, count) if position < 0 else position, count)
        positions[np.uint64(k)] = position
        line = line_at(position, slot, directory, chunks)
        prefetch(line)
        lines[np.uint64(k - start)] = line


@inner
def search_on(ids, later, late, lines, first, pages, directory, chunks, rows, counts, counting):
    """Search on for ids[i], i in later[:late], by one line a round."""
    positions = np.full(late, -1, np.int32)
    while late > 0:
        left = 0
        for start in range(0, late, GROUP):
            stop = min(start + GROUP, late)
            ask_for_next(ids, later, positions, start, stop, lines, first, pages, directory, chunks)
            for k in range(start, stop):
                i = np.uint64(later[np.uint64(k)])
                line = lines[np.uint64(k - start)]
                row, on = take(line, ids[i])
                rows[i] = row
                if counting:
                    counts[i] = count_one(line, ids[i])
                later[np.uint64(left)] = later[np.uint64(k)]
                positions[np.uint64(left)] = positions[np.uint64(k)]
                left += on
        late = left


@inner
def look_up(ids, first, pages, directory, chunks, rows, counts, counting):
    """Fill `rows` and, where counting, add to and fill `counts`; returns how many ids have a row.

    Ids that are not in their home line, about one in twelve, are put off to the end: to wait for the line
    after it, or to guess whether it is needed, would cost as much as all the rest.
    """
    here, there, hashes = np.empty(GROUP, np.int64), np.empty(GROUP, np.int64), np.empty(GROUP, np.uint64)
    later = np.empty(len(ids) + 1, np.int32)
    late = 0
    ask_for_homes(ids, 0, min(GROUP, len(ids)), hashes, here, first, pages, directory, chunks)
    for start in range(0, len(ids), GROUP):
        stop = min(start + GROUP, len(ids))
        ask_for_homes(ids, stop, min(stop + GROUP, len(ids)), hashes, there, first, pages, directory, chunks)
        for i in range(start, stop):
            place = np.uint64(i)
            row, on = take(here[np.uint64(i - start)], ids[place])
            rows[place] = row
            later[np.uint64(late)] = i
            late += on
        if counting:
            for i in range(start, stop):
                counts[np.uint64(i)] = count_one(here[np.uint64(i - start)], ids[np.uint64(i)])
        here, there = there, here
    search_on(ids, later, late, here, first, pages, directory, chunks, rows, counts, counting)
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


@outer("void(int64, int64, int64[::1])")
def clear_pages(start, stop, chunks):
    """Make the entries of pages [start, stop) empty."""
    for page in range(start, stop):
        clear(page, chunks)


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


@inlined
def place_for(hashed, slot, pages, directory, chunks):
    """Line of the first empty entry from the home of an id that has none."""
    lines = lines_of(slot, pages)
    position = home_of(hashed, lines)
    line = line_at(position, slot, directory, chunks)
    while empty_way(line) < 0:
        position = after(position, lines)
        line = line_at(position, slot, directory, chunks)
    return line


@inner
def grow(slot, first, pages, used, directory, chunks, counters):
    """Give the slot its first page, or about two fifths more; False, nothing changed, where pages or the
    directory end."""
    old = np.int64(pages[slot]) if directory[slot, 0] > 0 else 0
    new = old + max(1, old * (24 + (((slot + first) >> 3) & 15)) // 80)
    if counters[NEXT_PAGE] + new - old > len(chunks) << PAGE_SHIFT or new > directory.shape[1]:
        counters[WANTED] = new
        return False
    count = np.int64(used[slot])
    ids, rows, counts = np.empty(count, np.int64), np.empty(count, np.int32), np.empty(count, np.int32)
    copy_entries(slot, pages, directory, chunks, ids, rows, counts)
    for page in range(old, new):
        directory[slot, page] = np.int32(counters[NEXT_PAGE])
        counters[NEXT_PAGE] += 1
    for page in range(new):
        clear(np.int64(directory[slot, page]), chunks)
    pages[slot] = np.int32(new)
    for i in range(count):
        line = place_for(mix(np.uint64(ids[i])), slot, pages, directory, chunks)
        write_entry(line, empty_way(line), ids[i], rows[i], counts[i])
    return True


@inlined
def bucket_of(hashed, slot):
    return slot * BUCKETS + np.int64((hashed >> np.uint64(12)) & np.uint64(BUCKETS - 1))


@inlined
def pending_place(wanted, bucket, pending_ids, pending_counts):
    """Where the id is counted in its bucket, or `PLACES`."""
    for place in range(PLACES):
        if pending_counts[bucket, place] > 0 and pending_ids[bucket, place] == wanted:
            return place
    return PLACES


@inlined
def drop_pending(bucket, place, pending_ids, pending_counts):
    """Forget one count; those behind it move up."""
    for behind in range(place, PLACES - 1):
        pending_ids[bucket, behind] = pending_ids[bucket, behind + 1]
        pending_counts[bucket, behind] = pending_counts[bucket, behind + 1]
    pending_counts[bucket, PLACES - 1] = 0


@inlined
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
            ask_for(ids[absent[k + AHEAD]], first, pages, directory, chunks)
        hashed = mix(np.uint64(ids[i]))
        slot = slot_of(hashed, first)
        crowded = np.int64(used[slot]) * 64 >= lines_of(slot, pages) * WIDTH * (42 + ((slot + first) & 7))
        crowded = crowded or directory[slot, 0] == 0
        if crowded and not grow(slot, first, pages, used, directory, chunks, counters):
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
        line = place_for(hashed, slot, pages, directory, chunks)
        write_entry(line, empty_way(line), ids[i], rows[i], counts[i])
        used[slot] += 1
        counters[ROWS] += 1
        fresh[counters[FRESH]] = i
        counters[FRESH] += 1
    return len(absent)


@inlined
def passing_way(line, position, hole, lines):
    """An entry of the line at `position` whose home is at or before `hole`, or −1."""
    for w in range(WIDTH):
        if read_int(line, ROWS_HERE + w) >= 0:
            home = home_of(mix(np.uint64(read_long(line, w))), lines)
            if (position - home) % lines >= (position - hole) % lines:
                return w
    return -1


@inlined
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
        if i + AHEAD < len(ids):
            ask_for(ids[i + AHEAD], first, pages, directory, chunks)
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


@outer("void(int64[::1], int32[::1], int64, int32[::1], int32[:, ::1], int64[::1])")
def set_counts(ids, counts, first, pages, directory, chunks):
    """Set the count of each of the ids, which have entries."""
    for i in range(len(ids)):
        if i + AHEAD < len(ids):
            ask_for(ids[i + AHEAD], first, pages, directory, chunks)
        hashed = mix(np.uint64(ids[i]))
        line, way = search(ids[i], hashed, slot_of(hashed, first), pages, directory, chunks)[1:]
        write_int(line, COUNTS + way, counts[i])


# ── whole slots ─────────────────────────────────────────────────────────────────────────────────


@outer("int64(int64[::1], int32[::1], int32[:, ::1], int64[::1], int64[::1], int32[::1], int32[::1])")
def entries(slots, pages, directory, chunks, ids, rows, counts):
    """Ids, rows and counts of the entries of `slots`, one slot after the other; returns how many."""
    found = 0
    for slot in slots:
        found += copy_entries(slot, pages, directory, chunks, ids[found:], rows[found:], counts[found:])
    return found


@outer("void(int64[::1], int64, int32[::1])")
def tally(ids, first, used):
    """Add to used[slot] how many of the ids are the slot's."""
    for i in range(len(ids)):
        used[slot_of(mix(np.uint64(ids[i])), first)] += 1


@outer("int64(int64[::1], int32[::1], int64, int32[::1], int32[:, ::1], int64[::1])")
def fill(ids, counts, first, pages, directory, chunks):
    """Make an entry with row i for each of ids[i]; returns where one stands that has one already, or −1."""
    for i in range(len(ids)):
        if i + AHEAD < len(ids):
            ask_for(ids[i + AHEAD], first, pages, directory, chunks)
        hashed = mix(np.uint64(ids[i]))
        slot = slot_of(hashed, first)
        line, way = search(ids[i], hashed, slot, pages, directory, chunks)[1:]
        if way >= 0:
            return i
        write_entry(line, empty_way(line), ids[i], np.int32(i), counts[i])
    return -1


@outer("int64(int64[::1], int32[::1], int64, int64, int64[:, ::1], int32[:, ::1])")
def fill_pending(ids, counts, first, needed, pending_ids, pending_counts):
    """Append ids to their buckets; returns where one stands that cannot be there, or −1."""
    for i in range(len(ids)):
        hashed = mix(np.uint64(ids[i]))
        bucket = bucket_of(hashed, slot_of(hashed, first))
        place = 0
        while place < PLACES and pending_counts[bucket, place] > 0:
            place += 1
        known = pending_place(ids[i], bucket, pending_ids, pending_counts) < PLACES
        if known or place == PLACES or not 0 < counts[i] < needed:
            return i
        pending_ids[bucket, place], pending_counts[bucket, place] = ids[i], counts[i]
    return -1
