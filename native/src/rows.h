// What moves rows into and out of a ring on a device: ggml's operations (rows_device), or kernels of this library's own (rows_kernels).
#pragma once

#include "bus.h"
#include "rows_host.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <algorithm>

namespace gm {

// F32 rows to be written: in host memory, or in a ggml tensor on some device.
struct RowSource {
    const float *       host   = nullptr;
    uint64_t            stride = 0;        // bytes from row to row
    const ggml_tensor * tensor = nullptr;  // rows are its ne[1] * ne[2] * ne[3]
    RowSource           skip(int64_t rows) const;
    int64_t             skipped = 0;       // rows of the tensor passed over
};

class Rows {
  public:
    virtual ~Rows() = default;

    // tap -1: whole rows, and a tally per tap; else one. Tells the bus what crossed between host and device memory. The device may still
    // be at work on source and ring when it returns, until finish() has.
    virtual void write(int32_t tap, int64_t start, int64_t count, const RowSource & source, Tally * tallies, Bus & bus) = 0;

    // The same of all taps at once, a source for each.
    virtual void write_taps(int64_t start, int64_t count, int32_t taps, const RowSource * sources, Tally * tallies, Bus & bus) {
        for (int32_t t = 0; t < taps; ++t) write(t, start, count, sources[t], tallies + t, bus);
    }

    virtual void finish() {}

    virtual void read_host(int64_t start, int64_t count, float * rows, Bus & bus)                       = 0;
    virtual void read_tensor(int64_t start, int64_t count, const ggml_tensor * rows, ggml_backend_buffer_t buffer) = 0;

    // What writes have met, by tap, if they do not say so at once: adds it to the tallies and forgets it.
    virtual void collect(Tally * /*tallies*/) {}
};

// Rows that pass through staging at a time: 8 MiB of F32, which take ten times as long to cross a bus as it takes to start on them.
inline int64_t staged_rows(int64_t width, int64_t cap) {
    return std::clamp<int64_t>(int64_t((uint64_t(8) << 20) / (uint64_t(width) * sizeof(float))), 1, cap);
}

// Device memory for F32 rows that come from or go to other memory. Many rings never see any, so it is taken when the first do.
// Throws GM_ERR_MEMORY.
ggml_backend_buffer_ptr take_staging(ggml_backend_dev_t device, uint64_t bytes);

} // namespace gm
