// Ring behind a C ABI, for tests that ask what no mirror tells: stretches and versions. Rings are addressed by pointer.
#include "ring.h"

#include <cstdint>

using gm::Ring;

extern "C" {

Ring * ring_new(int64_t cap, int32_t taps) { return new Ring(cap, taps); }
void   ring_free(Ring * ring) { delete ring; }

void ring_begin_write(Ring * ring, int64_t start, int64_t count, uint64_t taps) { ring->begin_write(start, count, taps); }
void ring_end_write(Ring * ring, int64_t start, int64_t count, uint64_t taps) { ring->end_write(start, count, taps); }
void ring_truncate(Ring * ring, int64_t from) { ring->truncate(from); }
void ring_clear(Ring * ring) { ring->clear(); }

uint64_t ring_version(const Ring * ring) { return ring->version(); }
int64_t  ring_stretch_before(const Ring * ring, int64_t end, int64_t max) { return ring->stretch_before(end, max); }

// -1: all can be read; else the first position that cannot.
int64_t ring_require(const Ring * ring, int64_t start, int64_t count) {
    try {
        ring->require(start, count);
    } catch (const gm::Error & error) {
        return error.info.position;
    }
    return -1;
}

// What is told of the range: how many, in `positions` and `versions` of `room`.
int64_t ring_changed(const Ring * ring, int64_t start, int64_t count, uint64_t since, int64_t room, int64_t * positions, uint64_t * versions) {
    std::vector<Ring::Version> out;
    ring->changed(start, count, since, out);
    for (size_t i = 0; i < out.size() && int64_t(i) < room; ++i) {
        positions[i] = out[i].position;
        versions[i]  = out[i].version;
    }
    return int64_t(out.size());
}

} // extern "C"
