// The row kernels alone, without the library around them: device time beside a copy, and what starting and awaiting a kernel costs.
//
//     nvcc -std=c++17 -O3 -arch=native --fmad=false -Inative/src scripts/bench_kernels.cu -o build/bench_kernels && build/bench_kernels
//
// Rows of 5 x 5,120 values, which are random; 8,192 of them by CUDA events, medians of 21; 16 of them by the host's clock, medians of 300.
// Each launch works on other rows than the one before, in a ring of 17 GB, so that none are in the cache.
#include "row_kernels.h"

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
    void capture(int step, int32_t first, int32_t n, int64_t rows) const {
        const char *  from[kMaxTaps];
        const float * source = in + (step * rows % (kSets * kMany)) * kWidth;
        for (int32_t t = 0; t < n; ++t) from[t] = reinterpret_cast<const char *>(source + (first + t) * rows * kEmbd);
        const int64_t    start = step * rows % (ring.cap - rows);
        const CaptureJob job   = capture_job(ring, first, n, start / rows * rows, rows, from, kEmbd * sizeof(float), kernels.limit, counters);
        kernels.capture<<<dim3(capture_blocks(job), n), kCaptureThreads, 0, stream>>>(job);
    }

    void read(int step, int64_t rows) const {
        const int64_t start = step * rows % (ring.cap - rows) / rows * rows;
        const ReadJob job   = read_job(ring, start, rows, out + (step * rows % (kSets * kMany)) * kWidth, kernels.group_bytes);
        if (kernels.read) kernels.read<<<dim3(read_blocks(job), job.runs), kReadThreads, 0, stream>>>(job);
        else CHECK(cudaMemcpyAsync(job.run[0].values, job.run[0].stored, job.run[0].n * sizeof(float), cudaMemcpyDefault, stream));
    }
};

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
    }
}
