// What one launch of a row kernel does, worked out on the host. Plain C++: shared with the tests that run the kernels on a CPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace gm {

constexpr int kLanes          = 32;   // that share a piece; on GPUs with wavefronts of 64, one half of them
constexpr int kPieceGroups    = 4;    // groups of four values per lane and piece
constexpr int kPiece          = kLanes * 4 * kPieceGroups;  // values
constexpr int kCaptureThreads = 128;  // per thread block
constexpr int kReadThreads    = 256;
constexpr int kMaxTaps        = 64;

// What launches have met, by tap: see Tally.
struct Counters {
    unsigned long long nan, inf, overflow, over_f16;
    unsigned int       abs_max;  // bit pattern of a non-negative float, which orders like its value
    unsigned int       unused;
};

// The ring as kernels see it.
struct RingPlace {
    char *   data;
    uint64_t row_bytes;
    int64_t  n_embd;
    int32_t  taps;
    int64_t  cap;
    uint64_t tap_bytes() const { return row_bytes / uint64_t(taps); }
    char *   slot(int64_t i) const { return data + uint64_t(i) * row_bytes; }
};

// Rows of one or more neighbouring taps, into slots that may wrap.
struct CaptureJob {
    const char * source[kMaxTaps];  // by tap: the first row's slice
    uint64_t     row_stride;   // bytes from row to row
    char *       ring;         // the first of the taps, in slot 0
    uint64_t     row_bytes;    // stored
    uint64_t     tap_bytes;
    Counters *   counters;     // of the first of the taps
    uint32_t     slot, cap;    // the first row's slot
    uint32_t     rows;
    uint32_t     n_embd;
    uint32_t     pieces;       // per tap and row
    uint32_t     source_unit;  // the widest load that all sources allow: 16, 8, 4 bytes
    uint32_t     ring_unit;    // the widest store that the addresses of all pieces allow: 16, 8, 4, 2 bytes
    float        limit;        // of the format
    uint32_t     safe;         // bit pattern: |x| up to here needs no second look
};

// Stored values that follow one another: a range of rows that does not wrap.
struct ReadRun {
    const char * stored;
    float *      values;
    uint64_t     n;
};

struct ReadJob {
    ReadRun  run[2];
    uint32_t runs;
    uint32_t unit;  // 16: values may be written 16 bytes at a time, and stored groups read at once; else 4
};

// The largest power of two up to 16 that divides all of them.
template <class... T> uint32_t common_unit(T... values) {
    const uint64_t all = (uint64_t(16) | ... | uint64_t(values));
    return uint32_t(all & (~all + 1));
}

inline uint64_t address(const void * p) { return reinterpret_cast<uintptr_t>(p); }

// The first of `count` rows, as many as one launch takes: piece numbers stay within 32 bits. source[t]: of tap first_tap + t, n_taps of them.
inline CaptureJob capture_job(const RingPlace & ring, int32_t first_tap, int32_t n_taps, int64_t start, int64_t count, const char * const * source,
                              uint64_t row_stride, float limit, Counters * counters) {
    constexpr int64_t most_pieces = int64_t(1) << 30;
    CaptureJob        job{};
    job.row_stride  = row_stride;
    job.ring        = ring.data + uint64_t(first_tap) * ring.tap_bytes();
    job.row_bytes   = ring.row_bytes;
    job.tap_bytes   = ring.tap_bytes();
    job.counters    = counters + first_tap;
    job.slot        = uint32_t(start % ring.cap);
    job.cap         = uint32_t(ring.cap);
    job.n_embd      = uint32_t(ring.n_embd);
    job.pieces      = uint32_t((ring.n_embd + kPiece - 1) / kPiece);
    job.rows        = uint32_t(std::min(count, std::max<int64_t>(most_pieces / job.pieces, 1)));
    job.source_unit = common_unit(row_stride);
    for (int32_t t = 0; t < n_taps; ++t) {
        job.source[t]   = source[t];
        job.source_unit = common_unit(job.source_unit, address(source[t]));
    }
    job.ring_unit    = common_unit(address(job.ring), job.row_bytes, job.tap_bytes, job.tap_bytes * kPiece / uint64_t(ring.n_embd));
    job.limit        = limit;
    const float safe = std::min(limit, 65504.0f);
    memcpy(&job.safe, &safe, sizeof(safe));
    return job;
}

// group_bytes: of four stored values, where they are read at once; 2 for blocks.
inline ReadJob read_job(const RingPlace & ring, int64_t start, int64_t count, float * values, uint32_t group_bytes) {
    const int64_t first = start % ring.cap, before_end = std::min(count, ring.cap - first), width = ring.n_embd * ring.taps;
    ReadJob       job{};
    job.runs   = before_end < count ? 2 : 1;
    job.run[0] = { ring.slot(first), values, uint64_t(before_end) * uint64_t(width) };
    job.run[1] = { ring.slot(0), values + before_end * width, uint64_t(count - before_end) * uint64_t(width) };
    const uint32_t values_unit = common_unit(address(job.run[0].values), job.runs == 2 ? address(job.run[1].values) : 0);
    job.unit = values_unit == 16 && common_unit(address(job.run[0].stored), address(ring.data)) >= group_bytes ? 16 : 4;
    return job;
}

// Thread blocks.
inline uint32_t capture_blocks(const CaptureJob & job) {
    constexpr uint32_t per_block = kCaptureThreads / kLanes;
    return (job.rows * job.pieces + per_block - 1) / per_block;
}

inline uint32_t read_blocks(const ReadJob & job) {
    constexpr uint64_t per_block = uint64_t(kReadThreads) * 4;
    return uint32_t((std::max(job.run[0].n, job.run[1].n) + per_block - 1) / per_block);
}

} // namespace gm
