#include "rows_host.h"

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <vector>

// The package is one wheel per platform, so wide vectors are chosen at run time, by the loader.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__SANITIZE_ADDRESS__)
#    define GM_WIDEST __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#    define GM_WIDEST
#endif

namespace gm {

static constexpr int64_t  kChunk           = 1024;        // values checked, then converted: 4 KiB, so that the second look costs nothing (16 KiB: a sixth more)
static constexpr uint64_t kInlineBytes     = 2 << 20;     // below this, waking threads costs more than it saves
static constexpr int32_t  kInfinityBits    = 0x7f800000;

void Tally::add(const Tally & other) {
    nan += other.nan;
    inf += other.inf;
    overflow += other.overflow;
    over_f16 += other.over_f16;
    abs_max = std::max(abs_max, other.abs_max);
}

// Largest bit pattern of |x|: for floats it orders like the value, infinity and NaN above all.
GM_WIDEST static int32_t abs_max_bits(const float * x, int64_t n) {
    int32_t largest = 0;
    for (int64_t i = 0; i < n; ++i) {
        int32_t bits;
        memcpy(&bits, x + i, sizeof(bits));
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

static int32_t bits_of(float x) {
    int32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits;
}

void sanitize(const Dtype & d, float * x, int64_t n, Tally & tally) {
    for (int64_t i = 0; i < n; ++i) {
        const float magnitude = std::fabs(x[i]);
        if (std::isnan(magnitude)) {
            x[i] = 0.0f;
            ++tally.nan;
            continue;
        }
        if (std::isinf(magnitude)) {
            ++tally.inf;
        } else {
            tally.over_f16 += magnitude > 65504.0f;
            tally.overflow += magnitude > d.limit;
            tally.abs_max = std::max(tally.abs_max, magnitude);
        }
        if (magnitude > d.limit) x[i] = std::copysign(d.limit, x[i]);
    }
}

void quantize_checked(const Dtype & d, const float * x, void * y, int64_t n, Tally & tally) {
    static thread_local std::vector<float> copy;
    const int32_t safe  = std::min({ bits_of(d.limit), bits_of(65504.0f), kInfinityBits - 1 });
    const int64_t chunk = kChunk / d.block * d.block;
    uint8_t *     out   = static_cast<uint8_t *>(y);
    for (int64_t i = 0; i < n; i += chunk) {
        const int64_t m       = std::min(chunk, n - i);
        const int32_t largest = abs_max_bits(x + i, m);
        const float * source  = x + i;
        if (largest <= safe) {
            float value;
            memcpy(&value, &largest, sizeof(value));
            tally.abs_max = std::max(tally.abs_max, value);
        } else {
            copy.assign(x + i, x + i + m);
            sanitize(d, copy.data(), m, tally);
            source = copy.data();
        }
        d.from_float(source, out, m);
        out += ggml_row_size(d.type, m);
    }
}

int HostThreads::resolve(int n_threads) {
    const int cores = int(std::max(1u, std::thread::hardware_concurrency()));
    return std::min(n_threads > 0 ? n_threads : std::min(cores, 8), 512);
}

HostThreads::HostThreads(int n_threads) : n_threads_(resolve(n_threads)) {}

HostThreads::~HostThreads() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
    }
    begun_.notify_all();
    for (std::thread & worker : workers_) worker.join();
}

struct HostThreads::Job {
    const std::function<void(int64_t, int64_t)> & body;
    const int64_t                                 n, piece;
    std::atomic<int64_t>                          next{ 0 };

    void work() {
        for (int64_t first; (first = next.fetch_add(piece)) < n;) body(first, std::min(first + piece, n));
    }
};

void HostThreads::help() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (uint64_t seen = 0; !stop_; seen = number_) {
        begun_.wait(lock, [&] { return stop_ || number_ != seen; });
        if (!job_ || stop_) continue;  // over before this thread woke
        Job * job = job_;
        ++busy_;
        lock.unlock();
        job->work();
        lock.lock();
        if (--busy_ == 0) done_.notify_all();
    }
}

void HostThreads::run(int64_t n, uint64_t bytes, const std::function<void(int64_t, int64_t)> & body) {
    if (n_threads_ == 1 || n < 2 || bytes < kInlineBytes) {
        if (n > 0) body(0, n);
        return;
    }
    while (int(workers_.size()) + 1 < n_threads_) workers_.emplace_back([this] { help(); });
    Job job{ body, n, std::max<int64_t>(1, n / (8 * n_threads_)) };
    {
        std::lock_guard<std::mutex> lock(mutex_);
        job_ = &job;
        ++number_;
    }
    begun_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;
    done_.wait(lock, [&] { return busy_ == 0; });
}

} // namespace gm
