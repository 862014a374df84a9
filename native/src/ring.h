// Which position each slot holds and which of its taps were written. Knows nothing of bytes or devices.
#pragma once

#include "error.h"

#include <vector>

namespace gm {

// A range of positions as it lies in the ring: one run, or two where it wraps.
struct Run {
    int64_t slot;    // first slot
    int64_t offset;  // first row of the range
    int64_t count;
};

struct Runs {
    Run run[2];
    int n = 0;
    const Run * begin() const { return run; }
    const Run * end() const { return run + n; }
};

class Ring {
  public:
    Ring(int64_t cap, int32_t taps);

    int64_t cap() const { return int64_t(slots_.size()); }
    int64_t slot(int64_t position) const { return position % cap(); }

    // start..start+count-1; count <= cap.
    Runs runs(int64_t start, int64_t count) const;

    // Of the range, `taps` are no longer valid; they hold these positions.
    void begin_write(int64_t start, int64_t count, uint64_t taps);
    void end_write(int64_t start, int64_t count, uint64_t taps);

    void truncate(int64_t from);
    void clear();

    // Throws GM_ERR_STALE naming the first position that is missing, partial or overwritten.
    void require(int64_t start, int64_t count) const;

    // Live slots (complete ones, or any with a tap), ascending by position.
    struct Live { int64_t position; uint64_t taps; };
    std::vector<Live> live(bool complete_only) const;
    int64_t           count_live(bool complete_only) const;
    uint64_t          taps_at(int64_t position) const;  // 0 if the slot holds another position

    // Longest complete stretch that ends before `end`, of at most `max` rows: its length.
    int64_t stretch_before(int64_t end, int64_t max) const;

    // A row's version changes whenever the row does, and no version comes twice: lets a reader know what it has seen already.
    // 0: not complete.
    struct Version { int64_t position; uint64_t version; };
    uint64_t version() const { return version_; }  // the latest
    // Of the range, appended to `out`: every row whose version is above `since`, or 0; and others in their neighbourhood.
    void changed(int64_t start, int64_t count, uint64_t since, std::vector<Version> & out) const;

    uint64_t all_taps() const { return all_taps_; }

    static uint64_t bytes(int64_t cap) {
        uint64_t sum = uint64_t(cap) * sizeof(Slot);
        for (const int64_t size : kChunks) sum += uint64_t(chunks(cap, size)) * (sizeof(int64_t) + sizeof(uint64_t));
        return sum;
    }

  private:
    struct Slot {
        int64_t  position = -1;
        uint64_t taps     = 0;
        uint64_t version  = 0;
    };

    // Neighbouring slots, of which a read need not look at each, in chunks of chunks: what a step costs must not grow with its context.
    // The smallest are as many as the rows that a read waits to start on.
    static constexpr int64_t kChunks[] = { 4096, 256, 16 };
    static constexpr size_t  kLevels   = sizeof(kChunks) / sizeof(kChunks[0]);

    static int64_t chunks(int64_t cap, int64_t size) { return (cap + size - 1) / size; }

    struct Level {
        std::vector<int64_t>  whole;   // by chunk: the position in its first slot, if that and those that follow are all complete; else -1
        std::vector<uint64_t> newest;  // by chunk: of its slots' versions the highest, if it is whole
    };

    bool                     is_live(const Slot & s, bool complete_only) const { return s.position >= 0 && (complete_only ? s.taps == all_taps_ : s.taps != 0); }
    bool                     is_complete(int64_t slot, int64_t position) const;
    void                     note_chunk(size_t level, int64_t chunk);
    void                     note_chunks(const Runs & runs);
    void                     note_broken(int64_t slot);
    int64_t                  whole_from(int64_t slot, int64_t position, uint64_t since) const;
    int64_t                  whole_up_to(int64_t slot, int64_t position) const;
    template <class Body> void for_held(Body && body) const;
    Error                    stale(int64_t start, int64_t count, int64_t position) const;

    std::vector<Slot> slots_;
    Level             levels_[kLevels];  // as kChunks
    uint64_t          all_taps_;
    uint64_t          version_ = 0;
    int64_t           end_     = 0;  // 1 + highest live position: bounds the work of truncate
    int64_t           held_    = 0;  // slots that hold a position: bounds the work of live and clear
};

} // namespace gm
