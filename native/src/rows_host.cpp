#include "rows_host.h"

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

// The package is one wheel per platform, so wide vectors are chosen at run time, by the loader.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__SANITIZE_ADDRESS__)
#    define GM_WIDEST __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#    define GM_WIDEST
#endif

namespace gm {

static constexpr int64_t  kChunk           = 4096;        // values checked, then converted, while they are in L1
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
    return std::min(n_threads > 0 ? n_threads : cores, 512);
}

HostThreads::HostThreads(int n_threads) : n_threads_(resolve(n_threads)) {
    if (n_threads_ == 1) return;
    auto * device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    if (device) backend_.reset(ggml_backend_dev_init(device, nullptr));
    using SetThreads = void (*)(ggml_backend_t, int);
    auto set_threads = device ? reinterpret_cast<SetThreads>(ggml_backend_reg_get_proc_address(
                                    ggml_backend_dev_backend_reg(device), "ggml_backend_set_n_threads"))
                              : nullptr;
    if (backend_ && set_threads) {
        set_threads(backend_.get(), n_threads_);
    } else {
        backend_.reset();
        n_threads_ = 1;
    }
}

namespace {
// Work in small pieces, taken by whichever thread is free: a thread that was put to sleep does not hold up its share.
struct Pieces {
    const std::function<void(int64_t, int64_t)> * body;
    int64_t                                       n, piece;
    std::atomic<int64_t>                          next{ 0 };
};

// A ggml custom op. Bodies do not throw.
void run_pieces(ggml_tensor *, int, int, void * user_data) {
    auto & pieces = *static_cast<Pieces *>(user_data);
    for (int64_t first; (first = pieces.next.fetch_add(pieces.piece)) < pieces.n;) {
        (*pieces.body)(first, std::min(first + pieces.piece, pieces.n));
    }
}
} // namespace

void HostThreads::run(int64_t n, uint64_t bytes, const std::function<void(int64_t, int64_t)> & body) {
    if (n_threads_ == 1 || n < 2 || bytes < kInlineBytes) {
        if (n > 0) body(0, n);
        return;
    }
    // Using ggml's own pool keeps the thread count of the process as the user set it.
    Pieces pieces;
    pieces.body  = &body;
    pieces.n     = n;
    pieces.piece = std::max<int64_t>(1, n / (8 * n_threads_));
    const ggml_init_params  params{ 4096 + ggml_graph_overhead_custom(8, false), nullptr, false };
    ggml_context_ptr        ctx(ggml_init(params));
    if (!ctx) throw error(GM_ERR_MEMORY, "out of host memory for a compute graph");
    ggml_tensor * op = ggml_custom_4d(ctx.get(), GGML_TYPE_F32, 1, 1, 1, 1, nullptr, 0, run_pieces, GGML_N_TASKS_MAX, &pieces);
    ggml_cgraph * graph = ggml_new_graph_custom(ctx.get(), 8, false);
    ggml_build_forward_expand(graph, op);
    if (ggml_backend_graph_compute(backend_.get(), graph) != GGML_STATUS_SUCCESS) {
        throw error(GM_ERR_BACKEND, "the ggml CPU backend failed to run its threads");
    }
}

} // namespace gm
