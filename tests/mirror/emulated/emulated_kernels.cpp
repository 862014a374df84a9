// The row kernels run on the CPU, launch by launch as rows_kernels.cu starts them on a GPU.
#include "row_kernels.h"

using namespace gm;

namespace {

struct Kernels {
    void (*capture)(CaptureJob);
    void (*read)(ReadJob);
    uint32_t group_bytes;
    float    limit;
};

const Kernels * kernels_of(const char * name) {
    static const struct {
        const char * name;
        Kernels      kernels;
    } known[] = {
        { "f32", { capture_rows<F32>, nullptr, 4, 3.4028234663852886e38f } },
        { "f16", { capture_rows<F16>, read_rows<F16>, 8, 65504.0f } },
        { "bf16", { capture_rows<BF16>, read_rows<BF16>, 8, 3.3895313892515355e38f } },
        { "q8_0", { capture_rows<Q8_0>, read_rows<Q8_0>, 2, 127 * 65504.0f } },
        { "q4_0", { capture_rows<Q4_0>, read_rows<Q4_0>, 2, 8 * 65504.0f } },
    };
    for (const auto & k : known) {
        if (strcmp(k.name, name) == 0) return &k.kernels;
    }
    return nullptr;
}

} // namespace

extern "C" void emulate_capture(const char * format, const RingPlace * ring, int32_t first_tap, int32_t n_taps, int64_t start, int64_t count,
                                const char * source, uint64_t row_stride, Counters * counters) {
    const Kernels & k = *kernels_of(format);
    const char *    slices[kMaxTaps];
    for (int32_t t = 0; t < n_taps; ++t) slices[t] = source + uint64_t(t) * uint64_t(ring->n_embd) * sizeof(float);
    const CaptureJob job = capture_job(*ring, first_tap, n_taps, start, count, slices, row_stride, k.limit, counters);
    emulator::launch(Index{ capture_blocks(job), uint32_t(n_taps) }, kCaptureThreads, k.capture, job);
}

extern "C" void emulate_read(const char * format, const RingPlace * ring, int64_t start, int64_t count, float * values) {
    const Kernels & k   = *kernels_of(format);
    const ReadJob   job = read_job(*ring, start, count, values, k.group_bytes);
    emulator::launch(Index{ read_blocks(job), job.runs }, kReadThreads, k.read, job);
}
