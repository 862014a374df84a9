// The row kernels alone, without the library around them: device time beside a copy, and what starting and awaiting a kernel costs.
//
//     nvcc -std=c++17 -O3 -arch=native --fmad=false -Inative/src scripts/bench_kernels.cu -o build/bench_kernels && build/bench_kernels
//
// Rows of 5 x 5,120 values, which are random; 8,192 of them by CUDA events, medians of 21; 16 of them by the host's clock, medians of 300.
// Each launch works on other rows than the one before, in a ring of 17 GB, so that none are in the cache.
//
// At the end: ways to start a kernel of 16 rows and to learn that it is done. "stream" is the library's.
#include "row_kernels.h"

#include <cuda.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

using namespace gm;

static void check(cudaError_t status, int line) {
    if (status == cudaSuccess) return;
    printf("line %d: %s\n", line, cudaGetErrorString(status));
    exit(1);
}
#define CHECK(call) check(call, __LINE__)

constexpr int32_t  kTaps = 5;
constexpr int64_t  kEmbd = 5120, kWidth = kTaps * kEmbd, kMany = 8192, kFew = 16;
constexpr int      kSets      = 3;  // of inputs and outputs
constexpr uint64_t kRingBytes = uint64_t(17) << 30;

static cudaStream_t stream;

__global__ void fill(float * x, uint64_t n) {
    for (uint64_t i = blockIdx.x * uint64_t(blockDim.x) + threadIdx.x; i < n; i += uint64_t(gridDim.x) * blockDim.x) {
        uint32_t h = uint32_t(i) * 2654435761u ^ uint32_t(i >> 32);
        h = (h ^ h >> 16) * 0x85ebca6bu;
        h = (h ^ h >> 13) * 0xc2b2ae35u;
        h ^= h >> 16;
        const float sum = float(h & 0xffff) + float(h >> 16);  // of two numbers: -1 to 1 with a peak at 0
        x[i] = (sum / 65536.0f - 1.0f) * (i % 1600 ? 3.0f : 300.0f);
    }
}

__global__ void nothing() {}

__global__ void raise(volatile uint32_t * flag, uint32_t value) {
    if (threadIdx.x) return;
    __threadfence_system();
    *flag = value;
}

static double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}

// Microseconds between two events around the work.
template <class Work> double device_us(int rounds, Work && work) {
    cudaEvent_t before, after;
    CHECK(cudaEventCreate(&before));
    CHECK(cudaEventCreate(&after));
    std::vector<double> us;
    for (int i = -3; i < rounds; ++i) {
        float ms = 0;
        CHECK(cudaEventRecord(before, stream));
        work(i + 3);
        CHECK(cudaEventRecord(after, stream));
        CHECK(cudaEventSynchronize(after));
        CHECK(cudaEventElapsedTime(&ms, before, after));
        if (i >= 0) us.push_back(ms * 1e3);
    }
    CHECK(cudaEventDestroy(before));
    CHECK(cudaEventDestroy(after));
    return median(us);
}

template <class Work> double host_us(int rounds, Work && work) {
    std::vector<double> us;
    for (int i = -10; i < rounds; ++i) {
        const auto start = std::chrono::steady_clock::now();
        work(i + 10);
        if (i >= 0) us.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count());
    }
    return median(us);
}

static void wait() { CHECK(cudaStreamSynchronize(stream)); }

struct Kernels {
    const char * name;
    double       bytes;  // of a stored value
    void (*capture)(CaptureJob);
    void (*read)(ReadJob);
    uint32_t group_bytes;
    float    limit;
};

struct Bench {
    const Kernels & kernels;
    RingPlace       ring;
    const float *   in;
    float *         out;
    Counters *      counters;

    // Taps first .. first + n of `rows` rows, each tap a tensor [n_embd, rows]; the step says which rows and slots.
    CaptureJob capture_job_of(int step, int32_t first, int32_t n, int64_t rows) const {
        const char *  from[kMaxTaps];
        const float * source = in + (step * rows % (kSets * kMany)) * kWidth;
        for (int32_t t = 0; t < n; ++t) from[t] = reinterpret_cast<const char *>(source + (first + t) * rows * kEmbd);
        const int64_t start = step * rows % (ring.cap - rows);
        return capture_job(ring, first, n, start / rows * rows, rows, from, kEmbd * sizeof(float), kernels.limit, counters);
    }

    ReadJob read_job_of(int step, int64_t rows) const {
        const int64_t start = step * rows % (ring.cap - rows) / rows * rows;
        return read_job(ring, start, rows, out + (step * rows % (kSets * kMany)) * kWidth, kernels.group_bytes);
    }

    void capture(int step, int32_t first, int32_t n, int64_t rows) const {
        const CaptureJob job = capture_job_of(step, first, n, rows);
        kernels.capture<<<dim3(capture_blocks(job), n), kCaptureThreads, 0, stream>>>(job);
    }

    void read(int step, int64_t rows) const {
        const ReadJob job = read_job_of(step, rows);
        if (kernels.read) kernels.read<<<dim3(read_blocks(job), job.runs), kReadThreads, 0, stream>>>(job);
        else CHECK(cudaMemcpyAsync(job.run[0].values, job.run[0].stored, job.run[0].n * sizeof(float), cudaMemcpyDefault, stream));
    }
};

// -------------------------------------------------------------------------------------- ways to start and to wait

// Raised by the block that is done last.
struct Done {
    uint32_t *          blocks;  // how many are, in device memory
    volatile uint32_t * flag;    // in host memory
    uint32_t            value;
};

__device__ void raise_if_last(const Done & done) {
    __syncthreads();
    if (threadIdx.x) return;
    __threadfence();
    const uint32_t n = gridDim.x * gridDim.y;
    if (atomicAdd(done.blocks, 1) != n - 1) return;
    *done.blocks = 0;
    __threadfence_system();
    *done.flag = done.value;
}

template <class Format> __global__ void __launch_bounds__(kReadThreads) read_and_raise(const ReadJob job, const Done done) {
    read_group<Format>(job);
    raise_if_last(done);
}

template <class Format> __global__ void __launch_bounds__(kCaptureThreads) capture_and_raise(const CaptureJob job, const Done done) {
    capture_piece<Format>(job);
    raise_if_last(done);
}

// What a launch does lies in host memory, so that a graph can stay as it is.
struct Posted {
    ReadJob  job;
    uint32_t value;
};

template <class Format> __global__ void __launch_bounds__(kReadThreads) read_posted(const volatile Posted * posted, uint32_t * blocks, volatile uint32_t * flag) {
    __shared__ Posted mine;
    if (threadIdx.x < sizeof(Posted) / 4) reinterpret_cast<uint32_t *>(&mine)[threadIdx.x] = reinterpret_cast<const volatile uint32_t *>(posted)[threadIdx.x];
    __syncthreads();
    read_group<Format>(mine.job);
    if (flag) raise_if_last({ blocks, flag, mine.value });
}

// Five pointers in place of 64: how much of a launch is its parameters?
struct FewBytes { char bytes[136]; };
struct ManyBytes { char bytes[sizeof(CaptureJob)]; };
template <class Bytes> __global__ void nothing_of(const Bytes) {}

class Waiting {
  public:
    Waiting() {
        CHECK(cudaHostAlloc(&flag_, 64, cudaHostAllocMapped));
        CHECK(cudaHostGetDevicePointer(reinterpret_cast<void **>(&on_device_), flag_, 0));
        CHECK(cudaMalloc(&blocks_, sizeof(*blocks_)));
        CHECK(cudaMemset(blocks_, 0, sizeof(*blocks_)));
        CHECK(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming));
        void *                         function = nullptr;
        cudaDriverEntryPointQueryResult found;
        if (cudaGetDriverEntryPointByVersion("cuStreamWriteValue32", &function, 12000, cudaEnableDefault, &found) == cudaSuccess) {
            write_value_ = reinterpret_cast<decltype(write_value_)>(function);
        }
        *flag_ = 0;
    }

    Done next() { return { blocks_, on_device_, ++value_ }; }

    void by_stream() { wait(); }
    void by_stream_query() {
        while (cudaStreamQuery(stream) == cudaErrorNotReady) {}
        (void) cudaGetLastError();
    }
    void by_event() {
        CHECK(cudaEventRecord(event_, stream));
        CHECK(cudaEventSynchronize(event_));
    }
    void by_event_query() {
        CHECK(cudaEventRecord(event_, stream));
        while (cudaEventQuery(event_) == cudaErrorNotReady) {}
        (void) cudaGetLastError();
    }
    bool has_write_value() const { return write_value_; }
    void by_write_value() {
        ++value_;
        if (write_value_(stream, CUdeviceptr(uintptr_t(on_device_)), value_, 0) != CUDA_SUCCESS) CHECK(cudaErrorUnknown);
        by_flag();
    }
    void by_flag() const {
        while (*static_cast<volatile uint32_t *>(flag_) != value_) {}
    }

    uint32_t * blocks() const { return blocks_; }
    uint32_t * on_device() const { return on_device_; }

  private:
    uint32_t *  flag_ = nullptr, *on_device_ = nullptr, *blocks_ = nullptr, value_ = 0;
    cudaEvent_t event_ = nullptr;
    CUresult (*write_value_)(CUstream, CUdeviceptr, cuuint32_t, unsigned) = nullptr;
};

template <class Format> void time_waits(const Bench & bench) {
    Waiting    w;
    const auto both = [&](const char * how, auto && awaited) {
        printf("%-5s %lld rows, awaited by %-13s at once %.1f us, read %.1f us\n", bench.kernels.name, (long long) kFew, how,
               host_us(500, [&](int step) { bench.capture(step, 0, kTaps, kFew), awaited(); }),
               host_us(500, [&](int step) { bench.read(step, kFew), awaited(); }));
    };
    both("stream", [&] { w.by_stream(); });
    both("stream query", [&] { w.by_stream_query(); });
    both("event", [&] { w.by_event(); });
    both("event query", [&] { w.by_event_query(); });
    if (w.has_write_value()) both("write value", [&] { w.by_write_value(); });
    both("stream", [&] { w.by_stream(); });  // once more: how much is chance?

    const double capture = host_us(500, [&](int step) {
        const CaptureJob job = bench.capture_job_of(step, 0, kTaps, kFew);
        capture_and_raise<Format><<<dim3(capture_blocks(job), kTaps), kCaptureThreads, 0, stream>>>(job, w.next());
        w.by_flag();
    });
    const double read = host_us(500, [&](int step) {
        const ReadJob job = bench.read_job_of(step, kFew);
        read_and_raise<Format><<<dim3(read_blocks(job), job.runs), kReadThreads, 0, stream>>>(job, w.next());
        w.by_flag();
    });
    printf("%-5s %lld rows, the last block raises a flag: at once %.1f us, read %.1f us\n", bench.kernels.name, (long long) kFew, capture, read);

    // A graph that is never changed: its job is posted in host memory.
    Posted *posted, *there;
    CHECK(cudaHostAlloc(&posted, sizeof(*posted), cudaHostAllocMapped));
    CHECK(cudaHostGetDevicePointer(reinterpret_cast<void **>(&there), posted, 0));
    for (const bool raising : { false, true }) {
        const ReadJob   any = bench.read_job_of(0, kFew);
        cudaGraph_t     graph;
        cudaGraphExec_t run;
        CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        read_posted<Format><<<dim3(read_blocks(any), 1), kReadThreads, 0, stream>>>(there, w.blocks(), raising ? w.on_device() : nullptr);
        CHECK(cudaStreamEndCapture(stream, &graph));
        CHECK(cudaGraphInstantiateWithFlags(&run, graph, 0));
        printf("%-5s %lld rows, a graph whose job is in host memory, %s: read %.1f us\n", bench.kernels.name, (long long) kFew,
               raising ? "the last block raises a flag" : "stream awaited", host_us(500, [&](int step) {
                   posted->job   = bench.read_job_of(step, kFew);
                   posted->value = w.next().value;
                   CHECK(cudaGraphLaunch(run, stream));
                   if (raising) w.by_flag();
                   else wait();
               }));
        wait();
        CHECK(cudaGraphExecDestroy(run));
        CHECK(cudaGraphDestroy(graph));
    }
    CHECK(cudaFreeHost(posted));
    // Device time alone: what remains of the above is starting and learning of the end.
    printf("%-5s %lld rows, device time: at once %.1f us, read %.1f us; one after the other, not awaited: %.1f, %.1f us\n", bench.kernels.name,
           (long long) kFew, device_us(301, [&](int step) { bench.capture(step, 0, kTaps, kFew); }), device_us(301, [&](int step) { bench.read(step, kFew); }),
           device_us(21, [&](int step) { for (int i = 0; i < 100; ++i) bench.capture(step * 100 + i, 0, kTaps, kFew); }) / 100,
           device_us(21, [&](int step) { for (int i = 0; i < 100; ++i) bench.read(step * 100 + i, kFew); }) / 100);
    CHECK(cudaGetLastError());
}

static void time_launches() {
    cudaGraph_t     graph;
    cudaGraphExec_t run;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    nothing<<<1, 32, 0, stream>>>();
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiateWithFlags(&run, graph, 0));
    uint32_t *flag, *on_device, value = 0;
    CHECK(cudaHostAlloc(&flag, sizeof(*flag), cudaHostAllocMapped));
    CHECK(cudaHostGetDevicePointer(reinterpret_cast<void **>(&on_device), flag, 0));
    *flag = 0;
    printf("a kernel that does nothing, started and awaited: %.1f us; as a graph of one node: %.1f us; raising a flag in host memory: %.1f us\n",
           host_us(1000, [](int) { nothing<<<1, 32, 0, stream>>>(); wait(); }), host_us(1000, [&](int) { CHECK(cudaGraphLaunch(run, stream)); wait(); }),
           host_us(1000, [&](int) {
               raise<<<1, 32, 0, stream>>>(on_device, ++value);
               while (*static_cast<volatile uint32_t *>(flag) != value) {}
           }));
    wait();
    printf("parameters of a launch, which does nothing: 0 bytes %.1f us, %zu bytes %.1f us, %zu bytes %.1f us\n",
           host_us(1000, [](int) { nothing<<<1, 32, 0, stream>>>(); wait(); }),
           sizeof(FewBytes), host_us(1000, [](int) { nothing_of<<<1, 32, 0, stream>>>(FewBytes{}); wait(); }),
           sizeof(ManyBytes), host_us(1000, [](int) { nothing_of<<<1, 32, 0, stream>>>(ManyBytes{}); wait(); }));
}

int main() {
    CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    const int64_t n = kMany * kWidth;
    float *       in, *out;
    char *        memory;
    Counters *    counters;
    CHECK(cudaMalloc(&in, kSets * n * sizeof(float)));
    CHECK(cudaMalloc(&out, kSets * n * sizeof(float)));
    CHECK(cudaMalloc(&memory, kRingBytes));
    CHECK(cudaMalloc(&counters, kMaxTaps * sizeof(Counters)));
    CHECK(cudaMemset(counters, 0, kMaxTaps * sizeof(Counters)));
    fill<<<1024, 256, 0, stream>>>(in, kSets * n);

    const double copy = device_us(21, [&](int step) {
        CHECK(cudaMemcpyAsync(out + step % kSets * n, in + step % kSets * n, n * sizeof(float), cudaMemcpyDeviceToDevice, stream));
    });
    printf("%lld rows, copy of F32: %.1f us, %.2f TB/s\n", (long long) kMany, copy, 8e-6 * n / copy);
    time_launches();

    const Kernels formats[] = {
        { "f32", 4, capture_rows<F32>, nullptr, 4, 3.4e38f },
        { "f16", 2, capture_rows<F16>, read_rows<F16>, 8, 65504.0f },
        { "bf16", 2, capture_rows<BF16>, read_rows<BF16>, 8, 3.3e38f },
        { "q8_0", 34 / 32.0, capture_rows<Q8_0>, read_rows<Q8_0>, 2, 127 * 65504.0f },
        { "q4_0", 18 / 32.0, capture_rows<Q4_0>, read_rows<Q4_0>, 2, 8 * 65504.0f },
    };
    for (const Kernels & k : formats) {
        const uint64_t  row_bytes = uint64_t(kWidth * k.bytes);
        const RingPlace ring{ memory, row_bytes, kEmbd, kTaps, int64_t(kRingBytes / row_bytes) };
        const Bench     bench{ k, ring, in, out, counters };
        const double    ideal  = copy * (4 + k.bytes) / 8;  // at the copy's bandwidth
        const double    by_tap = device_us(21, [&](int step) { for (int32_t t = 0; t < kTaps; ++t) bench.capture(step, t, 1, kMany); });
        const double    whole  = device_us(21, [&](int step) { bench.capture(step, 0, kTaps, kMany); });
        const double    read   = device_us(21, [&](int step) { bench.read(step, kMany); });
        printf("%-5s %lld rows: capture by tap %.1f us, %.0f %% of the copy's bandwidth; at once %.1f us, %.0f %%; read %.1f us, %.0f %%, %.2f of its time\n",
               k.name, (long long) kMany, by_tap, 100 * ideal / by_tap, whole, 100 * ideal / whole, read, 100 * ideal / read, read / copy);
        printf("%-5s %lld rows, awaited: five taps, each awaited %.1f us; five taps %.1f us; at once %.1f us; read %.1f us\n", k.name, (long long) kFew,
               host_us(300, [&](int step) { for (int32_t t = 0; t < kTaps; ++t) bench.capture(step, t, 1, kFew), wait(); }),
               host_us(300, [&](int step) { for (int32_t t = 0; t < kTaps; ++t) bench.capture(step, t, 1, kFew); wait(); }),
               host_us(300, [&](int step) { bench.capture(step, 0, kTaps, kFew), wait(); }),
               host_us(300, [&](int step) { bench.read(step, kFew), wait(); }));
        CHECK(cudaGetLastError());
        if (k.read == static_cast<void (*)(ReadJob)>(read_rows<Q8_0>)) time_waits<Q8_0>(bench);
        if (k.read == static_cast<void (*)(ReadJob)>(read_rows<F16>)) time_waits<F16>(bench);
    }
}
