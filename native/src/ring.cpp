#include "ring.h"

#include <algorithm>
#include <cstdio>
#include <string>

namespace gm {

Ring::Ring(int64_t cap, int32_t taps) : slots_(size_t(cap)), all_taps_(taps == 64 ? ~uint64_t(0) : (uint64_t(1) << taps) - 1) {
    for (size_t l = 0; l < kLevels; ++l) {
        levels_[l].whole.resize(size_t(chunks(cap, kChunks[l])), -1);
        levels_[l].newest.resize(size_t(chunks(cap, kChunks[l])), 0);
    }
}

Runs Ring::runs(int64_t start, int64_t count) const {
    Runs          runs;
    const int64_t first = slot(start);
    const int64_t head  = std::min(count, cap() - first);
    if (head > 0) runs.run[runs.n++] = { first, 0, head };
    if (count > head) runs.run[runs.n++] = { 0, head, count - head };
    return runs;
}

// Runs body(position, slot) over the range, without a division for each.
template <class Slots, class Body> static void for_slots(Slots & slots, const Runs & runs, int64_t start, Body && body) {
    for (const Run & run : runs) {
        auto * slot = slots.data() + run.slot;
        for (int64_t i = 0; i < run.count; ++i) body(start + run.offset + i, slot[i]);
    }
}

bool Ring::is_complete(int64_t slot, int64_t position) const {
    const Slot & s = slots_[size_t(slot)];
    return s.position == position && s.taps == all_taps_;
}

// What a chunk holds now. A larger one is whole if all of its parts are, one after the other; its parts are up to date.
void Ring::note_chunk(size_t l, int64_t chunk) {
    const bool    smallest = l + 1 == kLevels;
    const int64_t size = kChunks[l], part = smallest ? 1 : kChunks[l + 1];
    const int64_t from = chunk * size, end = std::min(from + size, cap()), first = slots_[size_t(from)].position;
    bool          whole  = first >= 0;
    uint64_t      newest = 0;
    for (int64_t s = from; whole && s < end; s += part) {
        const int64_t position = first + (s - from);
        whole  = smallest ? is_complete(s, position) : levels_[l + 1].whole[size_t(s / part)] == position;
        newest = std::max(newest, smallest ? slots_[size_t(s)].version : levels_[l + 1].newest[size_t(s / part)]);
    }
    levels_[l].whole[size_t(chunk)]  = whole ? first : -1;
    levels_[l].newest[size_t(chunk)] = newest;
}

// The chunks of slots that were written, the smallest first.
void Ring::note_chunks(const Runs & runs) {
    for (size_t l = kLevels; l-- > 0;) {
        for (const Run & run : runs) {
            for (int64_t c = run.slot / kChunks[l]; c * kChunks[l] < run.slot + run.count; ++c) note_chunk(l, c);
        }
    }
}

void Ring::note_broken(int64_t slot) {
    for (size_t l = 0; l < kLevels; ++l) levels_[l].whole[size_t(slot / kChunks[l])] = -1;
}

// Slots of the largest chunk that begins at this one and holds complete rows from `position` on, none newer than `since`; 0: there is none.
int64_t Ring::whole_from(int64_t slot, int64_t position, uint64_t since) const {
    for (size_t l = 0; l < kLevels; ++l) {
        const size_t c = size_t(slot / kChunks[l]);
        if (slot % kChunks[l] == 0 && levels_[l].whole[c] == position && levels_[l].newest[c] <= since) return kChunks[l];
    }
    return 0;
}

// Slots of the largest chunk around this one up to it, itself included, if the chunk holds complete rows of which this is `position`; 0: there
// is none.
int64_t Ring::whole_up_to(int64_t slot, int64_t position) const {
    for (size_t l = 0; l < kLevels; ++l) {
        const int64_t before = slot % kChunks[l];
        if (position >= before && levels_[l].whole[size_t(slot / kChunks[l])] == position - before) return before + 1;
    }
    return 0;
}

void Ring::begin_write(int64_t start, int64_t count, uint64_t taps) {
    const Runs range = runs(start, count);
    for_slots(slots_, range, start, [&](int64_t p, Slot & s) {
        held_ += s.position < 0;
        if (s.position != p) s = { p, 0, 0 };
        s.taps &= ~taps;
    });
    for (size_t l = 0; l < kLevels; ++l) {
        const auto whole = levels_[l].whole.begin();
        for (const Run & run : range) std::fill(whole + run.slot / kChunks[l], whole + (run.slot + run.count - 1) / kChunks[l] + 1, -1);
    }
    end_ = std::max(end_, start + count);
}

void Ring::end_write(int64_t start, int64_t count, uint64_t taps) {
    const Runs range = runs(start, count);
    ++version_;
    for_slots(slots_, range, start, [&](int64_t, Slot & s) {
        s.taps |= taps;
        s.version = version_;
    });
    note_chunks(range);
}

void Ring::truncate(int64_t from) {
    // Each live position >= from lies in [from, end_); a range longer than the ring visits every slot once.
    from = std::max<int64_t>(from, 0);
    for (int64_t p = std::max(from, end_ - cap()); p < end_; ++p) {
        Slot & s = slots_[size_t(slot(p))];
        if (s.position < from) continue;
        s = Slot{};
        --held_;
        note_broken(slot(p));
    }
    end_ = std::min(end_, from);
}

// Runs body(slot) over the slots that hold a position, from the latest position backwards: of a large ring that holds little, little is seen.
template <class Body> void Ring::for_held(Body && body) const {
    int64_t s = slot(std::max<int64_t>(end_ - 1, 0));
    for (int64_t left = held_, seen = 0; left > 0 && seen < cap(); ++seen, s = s > 0 ? s - 1 : cap() - 1) {
        if (slots_[size_t(s)].position < 0) continue;
        --left;
        body(s);
    }
}

void Ring::clear() {
    for_held([&](int64_t s) {
        slots_[size_t(s)] = Slot{};
        note_broken(s);
    });
    end_ = held_ = 0;
}

static std::string tap_list(uint64_t taps) {
    std::string list;
    for (int t = 0; t < 64; ++t) {
        if (taps >> t & 1) list += (list.empty() ? "" : ", ") + std::to_string(t);
    }
    return list;
}

void Ring::require(int64_t start, int64_t count) const {
    for (const Run & run : runs(start, std::min(count, cap()))) {
        for (int64_t i = 0; i < run.count;) {
            const int64_t slot = run.slot + i, position = start + run.offset + i;
            if (const int64_t whole = whole_from(slot, position, UINT64_MAX)) {
                i += whole;  // beyond the run's end, if the chunk is
            } else if (is_complete(slot, position)) {
                ++i;
            } else {
                throw stale(start, count, position);
            }
        }
    }
    // Of more positions than slots, the first beyond one ring's worth is missing at the latest.
    if (count > cap()) throw stale(start, count, start + cap());
}

Error Ring::stale(int64_t start, int64_t count, int64_t p) const {
    const Slot & s = slots_[size_t(slot(p))];
    char         reason[256];
    if (s.position == p && s.taps != 0) {
        snprintf(reason, sizeof(reason), "is partial: taps not written: %s", tap_list(all_taps_ & ~s.taps).c_str());
    } else if (s.position > p) {
        snprintf(reason, sizeof(reason), "was overwritten by position %lld (cap %lld)", (long long) s.position, (long long) cap());
    } else {
        snprintf(reason, sizeof(reason), "was never written, or was forgotten by truncate or clear");
    }
    return error(GM_ERR_STALE, "cannot read positions %lld..%lld: position %lld %s", (long long) start, (long long) (start + count - 1), (long long) p,
                 reason).at(p);
}

std::vector<Ring::Live> Ring::live(bool complete_only) const {
    std::vector<Live> live;
    for_held([&](int64_t i) {
        const Slot & s = slots_[size_t(i)];
        if (is_live(s, complete_only)) live.push_back({ s.position, s.taps });
    });
    std::reverse(live.begin(), live.end());
    // Ascending now, unless what lies behind a gap is older than a round of the ring.
    const auto before = [](const Live & a, const Live & b) { return a.position < b.position; };
    if (!std::is_sorted(live.begin(), live.end(), before)) std::sort(live.begin(), live.end(), before);
    return live;
}

int64_t Ring::count_live(bool complete_only) const {
    int64_t count = 0;
    for_held([&](int64_t i) { count += is_live(slots_[size_t(i)], complete_only); });
    return count;
}

uint64_t Ring::taps_at(int64_t position) const {
    const Slot & s = slots_[size_t(slot(position))];
    return s.position == position ? s.taps : 0;
}

int64_t Ring::stretch_before(int64_t end, int64_t max) const {
    const int64_t most = std::min({ max, end, cap() });
    int64_t       n    = 0;
    for (int64_t s = most > 0 ? slot(end - 1) : 0; n < most; s = s < 0 ? cap() - 1 : s) {
        const int64_t position = end - n - 1;
        if (const int64_t whole = whole_up_to(s, position)) {
            n += whole;
            s -= whole;
        } else if (is_complete(s, position)) {
            ++n;
            --s;
        } else {
            break;
        }
    }
    return std::min(n, most);
}

void Ring::changed(int64_t start, int64_t count, uint64_t since, std::vector<Version> & out) const {
    for (const Run & run : runs(start, count)) {
        for (int64_t i = 0; i < run.count;) {
            const int64_t slot = run.slot + i, position = start + run.offset + i;
            if (const int64_t whole = whole_from(slot, position, since)) {
                i += whole;  // beyond the run's end, if the chunk is
            } else {
                out.push_back({ position, is_complete(slot, position) ? slots_[size_t(slot)].version : 0 });
                ++i;
            }
        }
    }
}

} // namespace gm
