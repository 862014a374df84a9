// The row paths of a ring in the memory of a CUDA or HIP device: one launch per call, on a stream of the ring's own.
//
// ggml's streams do not wait for others, and it gives no handle of them away. So a write starts when the caller's data is complete, and the
// host waits until it is done: what the caller computes next, on whatever stream, sees the rows, and may reuse the source.
#include "rows_kernels.h"

#include "device.h"
#include "row_kernels.h"

#include "ggml-cpp.h"

#include <cstring>
#include <vector>

namespace gm {

namespace {

void check(cudaError_t status, const char * what) {
    if (status == cudaSuccess) return;
    (void) cudaGetLastError();  // kept by the runtime until it is asked for
    throw error(GM_ERR_BACKEND, "cannot %s: %s (" GM_GPU_NAME ")", what, cudaGetErrorString(status));
}

// The thread's current device, for as long as this lives.
class OnDevice {
  public:
    explicit OnDevice(int device) {
        check(cudaGetDevice(&before_), "find the current device");
        if (before_ == device) before_ = -1;
        else check(cudaSetDevice(device), "select the mirror's device");
    }
    ~OnDevice() {
        if (before_ >= 0) (void) cudaSetDevice(before_);
    }
    OnDevice(const OnDevice &)             = delete;
    OnDevice & operator=(const OnDevice &) = delete;

  private:
    int before_ = -1;
};

// The kernels of one format.
struct Kernels {
    void (*capture)(CaptureJob);
    void (*read)(ReadJob);  // null: what is stored is F32, and copied
    uint32_t group_bytes;   // of four stored values that are read at once; blocks are read by halves
};

const Kernels * kernels_of(ggml_type type) {
    static const Kernels f32{ capture_rows<F32>, nullptr, 4 };
    static const Kernels f16{ capture_rows<F16>, read_rows<F16>, 8 };
    static const Kernels bf16{ capture_rows<BF16>, read_rows<BF16>, 8 };
    static const Kernels q8_0{ capture_rows<Q8_0>, read_rows<Q8_0>, 2 };
    static const Kernels q4_0{ capture_rows<Q4_0>, read_rows<Q4_0>, 2 };
    switch (type) {
        case GGML_TYPE_F32: return &f32;
        case GGML_TYPE_F16: return &f16;
        case GGML_TYPE_BF16: return &bf16;
        case GGML_TYPE_Q8_0: return &q8_0;
        case GGML_TYPE_Q4_0: return &q4_0;
        default: return nullptr;
    }
}

bool of_this_backend(ggml_backend_dev_t device) {
    return device && strcmp(ggml_backend_reg_name(ggml_backend_dev_backend_reg(device)), GM_GPU_NAME) == 0;
}

class KernelRows final : public Rows {
  public:
    KernelRows(ggml_backend_dev_t device, const Dtype & dtype, ggml_tensor * ring, int32_t taps);
    ~KernelRows() override;

    void write(int32_t tap, int64_t start, int64_t count, const RowSource & source, Tally * tallies, Bus & bus) override;
    void write_taps(int64_t start, int64_t count, int32_t taps, const RowSource * sources, Tally * tallies, Bus & bus) override;
    void finish() override;
    void read_host(int64_t start, int64_t count, float * rows, Bus & bus) override;
    void read_tensor(int64_t start, int64_t count, const ggml_tensor * rows, ggml_backend_buffer_t buffer) override;
    void collect(Tally * tallies) override;

  private:
    struct Place {
        const char * data;
        uint64_t     stride;
    };
    bool  is_here(const ggml_tensor * t) const;
    Place stage(const RowSource & source, int64_t width, int64_t count, Bus & bus);
    float * staged();
    void  copy_rows(const void * from, uint64_t stride, uint64_t row, int64_t count);
    void  capture(int32_t first_tap, int32_t n_taps, int64_t start, int64_t count, const char ** source, uint64_t row_stride);
    void  read(int64_t start, int64_t count, float * rows);
    void  wait() { check(cudaStreamSynchronize(stream_), "convert rows"); }

    int64_t width() const { return place_.n_embd * place_.taps; }

    ggml_backend_dev_t      device_;
    const Dtype &           dtype_;
    const Kernels &         kernels_;
    RingPlace               place_;
    int64_t                 chunk_;   // rows that fit into the staging
    ggml_backend_buffer_ptr counts_, staging_;
    Counters *              counters_ = nullptr;  // [kMaxTaps], device memory
    int                     ordinal_  = 0;        // of the device, in the runtime's numbering
    cudaStream_t            stream_   = nullptr;
};

KernelRows::KernelRows(ggml_backend_dev_t device, const Dtype & dtype, ggml_tensor * ring, int32_t taps)
    : device_(device), dtype_(dtype), kernels_(*kernels_of(dtype.type)),
      place_{ static_cast<char *>(ring->data), ring->nb[1], ring->ne[0] / taps, taps, ring->ne[1] }, chunk_(staged_rows(ring->ne[0], ring->ne[1])) {
    if (place_.n_embd > INT32_MAX) throw error(GM_ERR_WIDTH, "n_embd is %lld; kernels take up to %d values", (long long) place_.n_embd, INT32_MAX);
    const uint64_t bytes = kMaxTaps * sizeof(Counters);
    counts_.reset(ggml_backend_buft_alloc_buffer(ggml_backend_dev_buffer_type(device), bytes));
    if (!counts_) {
        throw error(GM_ERR_MEMORY, "device %s has no room for %llu bytes of counts", ggml_backend_dev_name(device), (unsigned long long) bytes)
            .bytes(bytes, device_memory_free(device));
    }
    counters_ = static_cast<Counters *>(ggml_backend_buffer_get_base(counts_.get()));

    // ggml numbers its devices in its own way; the memory it gave knows where it is.
    cudaPointerAttributes where{};
    check(cudaPointerGetAttributes(&where, ring->data), "find the ring's device");
    ordinal_ = where.device;
    OnDevice           on(ordinal_);
    cudaFuncAttributes attributes{};
    const cudaError_t  image = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void *>(kernels_.capture));
    if (image == cudaErrorNoKernelImageForDevice || image == cudaErrorInvalidDeviceFunction) {
        (void) cudaGetLastError();
        throw error(GM_ERR_UNSUPPORTED, "this build has no kernels for %s (%s): rebuild ggml-mirror with the device's architecture in "
                    "CMAKE_CUDA_ARCHITECTURES or CMAKE_HIP_ARCHITECTURES, or make the mirror with ggml_ops",
                    ggml_backend_dev_name(device), ggml_backend_dev_description(device));
    }
    check(image, "load the kernels");
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "make a stream");
    try {
        check(cudaMemsetAsync(counters_, 0, kMaxTaps * sizeof(Counters), stream_), "clear the counts");
        wait();
    } catch (...) {
        (void) cudaStreamDestroy(stream_);
        throw;
    }
}

KernelRows::~KernelRows() {
    (void) cudaStreamDestroy(stream_);
}

// Can this device's kernels read the tensor where it is?
bool KernelRows::is_here(const ggml_tensor * t) const {
    const auto buffer = buffer_of(t);
    return !ggml_backend_buffer_is_host(buffer) && ggml_backend_buft_get_device(ggml_backend_buffer_get_type(buffer)) == device_;
}

float * KernelRows::staged() {
    if (!staging_) staging_ = take_staging(device_, uint64_t(chunk_) * uint64_t(width()) * sizeof(float));
    return static_cast<float *>(ggml_backend_buffer_get_base(staging_.get()));
}

// Rows of host memory, or of another device, to the staging.
void KernelRows::copy_rows(const void * from, uint64_t stride, uint64_t row, int64_t count) {
    float * const to = staged();
    if (stride == row || count == 1) {
        check(cudaMemcpyAsync(to, from, row * uint64_t(count), cudaMemcpyDefault, stream_), "copy rows to the device");
    } else if (stride > row && stride <= uint64_t(INT32_MAX)) {
        check(cudaMemcpy2DAsync(to, row, from, stride, row, size_t(count), cudaMemcpyDefault, stream_), "copy rows to the device");
    } else {
        // Rows that overlap, or lie further apart than the runtime can count: one by one.
        for (int64_t i = 0; i < count; ++i) {
            check(cudaMemcpyAsync(reinterpret_cast<char *>(to) + uint64_t(i) * row, static_cast<const char *>(from) + uint64_t(i) * stride, row,
                                  cudaMemcpyDefault, stream_), "copy rows to the device");
        }
    }
}

// The source's rows as kernels can read them; copied to staging only if they lie elsewhere.
KernelRows::Place KernelRows::stage(const RowSource & source, int64_t width, int64_t count, Bus & bus) {
    const uint64_t row    = uint64_t(width) * sizeof(float);
    const void *   data   = source.host;
    uint64_t       stride = source.stride;
    bool           host   = true;
    if (source.tensor) {
        const ggml_tensor * t      = source.tensor;
        const auto          buffer = buffer_of(t);
        const auto          device = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(buffer));
        data                       = static_cast<const char *>(t->data) + uint64_t(source.skipped) * t->nb[1];
        stride                     = t->nb[1];
        host                       = ggml_backend_buffer_is_host(buffer);
        if (is_here(t)) return { static_cast<const char *>(data), stride };
        if (!host && !of_this_backend(device)) {
            std::vector<float> packed(size_t(width * count));
            ggml_backend_tensor_get_2d(t, packed.data(), uint64_t(source.skipped) * stride, row, size_t(count), stride, row);
            copy_rows(packed.data(), row, row, count);
            wait();  // before the host's copy goes
            bus.to_host(row * uint64_t(count));
            bus.to_device(row * uint64_t(count));
            return { reinterpret_cast<const char *>(staged()), row };
        }
    }
    copy_rows(data, stride, row, count);
    if (host) bus.to_device(row * uint64_t(count));
    return { reinterpret_cast<const char *>(staged()), row };
}

void KernelRows::capture(int32_t first_tap, int32_t n_taps, int64_t start, int64_t count, const char ** source, uint64_t row_stride) {
    while (count > 0) {
        const CaptureJob job = capture_job(place_, first_tap, n_taps, start, count, source, row_stride, dtype_.limit, counters_);
        kernels_.capture<<<dim3(capture_blocks(job), uint32_t(n_taps)), kCaptureThreads, 0, stream_>>>(job);
        check(cudaGetLastError(), "start a capture");
        start += job.rows;
        count -= job.rows;
        for (int32_t t = 0; t < n_taps; ++t) source[t] += job.rows * row_stride;
    }
}

void KernelRows::write(int32_t tap, int64_t start, int64_t count, const RowSource & source, Tally *, Bus & bus) {
    if (count == 0) return;
    const OnDevice on(ordinal_);
    const int32_t  first_tap = std::max(tap, 0), n_taps = tap < 0 ? place_.taps : 1;
    const int64_t  n_values  = width() / place_.taps * n_taps;
    const bool     in_place  = source.tensor && is_here(source.tensor);
    const int64_t  chunk     = in_place ? count : chunk_;
    for (int64_t i = 0; i < count; i += chunk) {
        const int64_t n = std::min(chunk, count - i);
        const Place   from = stage(source.skip(i), n_values, n, bus);
        const char *  slices[kMaxTaps];
        for (int32_t t = 0; t < n_taps; ++t) slices[t] = from.data + uint64_t(t) * uint64_t(place_.n_embd) * sizeof(float);
        capture(first_tap, n_taps, start + i, n, slices, from.stride);
    }
}

// One launch, if each tap's rows can be read where they are, at one stride.
void KernelRows::write_taps(int64_t start, int64_t count, int32_t taps, const RowSource * sources, Tally * tallies, Bus & bus) {
    const char * slices[kMaxTaps];
    bool         together = true;
    for (int32_t t = 0; t < taps; ++t) {
        const ggml_tensor * rows = sources[t].tensor;
        together = together && rows && is_here(rows) && rows->nb[1] == sources[0].tensor->nb[1];
        if (together) slices[t] = static_cast<const char *>(rows->data) + uint64_t(sources[t].skipped) * rows->nb[1];
    }
    if (!together) return Rows::write_taps(start, count, taps, sources, tallies, bus);
    const OnDevice on(ordinal_);
    capture(0, taps, start, count, slices, sources[0].tensor->nb[1]);
}

void KernelRows::finish() {
    const OnDevice on(ordinal_);
    wait();
}

// One launch for both runs of a range that wraps.
void KernelRows::read(int64_t start, int64_t count, float * rows) {
    const ReadJob job = read_job(place_, start, count, rows, kernels_.group_bytes);
    if (kernels_.read) {
        kernels_.read<<<dim3(read_blocks(job), job.runs), kReadThreads, 0, stream_>>>(job);
        check(cudaGetLastError(), "start a read");
        return;
    }
    for (uint32_t i = 0; i < job.runs; ++i) {
        const ReadRun & run = job.run[i];
        check(cudaMemcpyAsync(run.values, run.stored, run.n * sizeof(float), cudaMemcpyDefault, stream_), "copy rows");
    }
}

void KernelRows::read_tensor(int64_t start, int64_t count, const ggml_tensor * rows, ggml_backend_buffer_t) {
    if (count == 0) return;
    const OnDevice on(ordinal_);
    read(start, count, static_cast<float *>(rows->data));
    wait();
}

void KernelRows::read_host(int64_t start, int64_t count, float * rows, Bus & bus) {
    if (count == 0) return;
    const OnDevice on(ordinal_);
    const int64_t  chunk = kernels_.read ? chunk_ : count;  // what is F32 already goes straight to the host
    for (int64_t i = 0; i < count; i += chunk) {
        const int64_t  n     = std::min(chunk, count - i);
        const uint64_t bytes = uint64_t(n) * uint64_t(width()) * sizeof(float);
        float * const  to    = kernels_.read ? staged() : rows;
        read(start + i, n, to);
        if (to != rows) check(cudaMemcpyAsync(rows + i * width(), to, bytes, cudaMemcpyDefault, stream_), "copy rows to the host");
        bus.to_host(bytes);
    }
    wait();
}

void KernelRows::collect(Tally * tallies) {
    const OnDevice        on(ordinal_);
    std::vector<Counters> counts(static_cast<size_t>(place_.taps));
    const size_t          bytes = counts.size() * sizeof(Counters);
    check(cudaMemcpyAsync(counts.data(), counters_, bytes, cudaMemcpyDefault, stream_), "read the counts");
    check(cudaMemsetAsync(counters_, 0, bytes, stream_), "clear the counts");
    wait();
    for (size_t t = 0; t < counts.size(); ++t) {
        Tally met;
        met.nan      = int64_t(counts[t].nan);
        met.inf      = int64_t(counts[t].inf);
        met.overflow = int64_t(counts[t].overflow);
        met.over_f16 = int64_t(counts[t].over_f16);
        memcpy(&met.abs_max, &counts[t].abs_max, sizeof(met.abs_max));
        tallies[t].add(met);
    }
}

} // namespace

bool has_row_kernels(ggml_backend_dev_t device, const Dtype & dtype) {
    return of_this_backend(device) && kernels_of(dtype.type);
}

std::unique_ptr<Rows> make_row_kernels(ggml_backend_dev_t device, const Dtype & dtype, ggml_tensor * ring, int32_t taps) {
    return std::make_unique<KernelRows>(device, dtype, ring, taps);
}

uint64_t row_kernels_staging_bytes(int64_t width, int64_t cap) {
    return kMaxTaps * sizeof(Counters) + uint64_t(staged_rows(width, cap)) * uint64_t(width) * sizeof(float);
}

} // namespace gm
