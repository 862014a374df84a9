#include "dtype.h"

#ifdef GM_HAVE_GGML_CPU
#    include "ggml-cpu.h"
#endif

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <mutex>
#include <optional>
#include <vector>

namespace gm {

static FromFloat from_float_of(ggml_type type) {
#ifdef GM_HAVE_GGML_CPU
    if (auto f = ggml_get_type_traits_cpu(type)->from_float) return reinterpret_cast<FromFloat>(f);
#endif
    return reinterpret_cast<FromFloat>(ggml_get_type_traits(type)->from_float_ref);
}

static ToFloat to_float_of(ggml_type type) {
#ifdef GM_HAVE_GGML_CPU
    // libggml-base converts these without SIMD; the CPU backend's own get_rows uses the following.
    if (type == GGML_TYPE_F16) return reinterpret_cast<ToFloat>(ggml_cpu_fp16_to_fp32);
    if (type == GGML_TYPE_BF16) return reinterpret_cast<ToFloat>(ggml_cpu_bf16_to_fp32);
#endif
    return reinterpret_cast<ToFloat>(ggml_get_type_traits(type)->to_float);
}

static void copy_from_float(const float * x, void * y, int64_t n) { memcpy(y, x, n * sizeof(float)); }
static void copy_to_float(const void * x, float * y, int64_t n) { memcpy(y, x, n * sizeof(float)); }

static float float_from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

// Does a block survive that holds v, whatever its neighbours are? Smallest |value| given back for v, or -1 if any is not finite.
static float give_back(const Dtype & d, float v) {
    const int64_t        n = d.block;
    std::vector<float>   in(n), out(n);
    std::vector<uint8_t> stored(ggml_row_size(d.type, n));
    float                least = INFINITY;
    const int            steps = n > 1 ? 508 : 0;  // a type that fits its scale (iq4_nl) is worst with neighbours between its levels
    for (float sign : { 1.0f, -1.0f }) {
        for (int step = -steps; step <= steps; ++step) {
            for (int64_t i = 0; i < n; ++i) in[i] = steps ? v * float(step) / float(steps) : 0.0f;
            in[0] = sign * v;
            d.from_float(in.data(), stored.data(), n);
            d.to_float(stored.data(), out.data(), n);
            for (float x : out) {
                if (!std::isfinite(x)) return -1.0f;
            }
            if (step % std::max(steps, 1) == 0) least = std::fmin(least, std::fabs(out[0]));  // beside 0, v and -v
        }
    }
    return least;
}

// The largest float (by its bit pattern, which orders like its value) of which give_back is finite, as it is given back.
static float find_limit(const Dtype & d) {
    uint32_t good = 0x3f800000, bad = 0x7f800000; // 1.0, infinity
    while (bad - good > 1) {
        const uint32_t middle = good + (bad - good) / 2;
        (give_back(d, float_from_bits(middle)) >= 0.0f ? good : bad) = middle;
    }
    const float largest = float_from_bits(good);
    return std::fmin(largest, give_back(d, largest));
}

static std::optional<Dtype> describe(ggml_type type) {
    const auto * traits = ggml_get_type_traits(type);
    if (!traits->type_name || traits->blck_size <= 0 || traits->type_size == 0) return std::nullopt;
    Dtype d{ type, traits->type_name, traits->blck_size, from_float_of(type), to_float_of(type), 0.0f };
    if (type == GGML_TYPE_F32) {
        d.from_float = copy_from_float;
        d.to_float   = copy_to_float;
    }
    if (!d.from_float || !d.to_float) return std::nullopt;
    // Weight formats that search a grid of vectors (iq1, iq2, iq3) assert on values that no weight has.
    if (strncmp(d.name, "iq", 2) == 0 && d.name[2] < '4') return std::nullopt;
    d.limit = find_limit(d);
    if (!(d.limit > 0.0f)) return std::nullopt;  // loses a large value beside others: not for rows
    return d;
}

static void init_conversions() {
#ifdef GM_HAVE_GGML_CPU
    ggml_cpu_init();  // fills the tables behind the CPU backend's scalar F16 conversions
#endif
}

const Dtype & dtype(int32_t type) {
    static std::once_flag initialized;
    std::call_once(initialized, init_conversions);
    static std::array<std::optional<Dtype>, GGML_TYPE_COUNT> known;
    static std::array<std::once_flag, GGML_TYPE_COUNT>       once;
    if (type < 0 || type >= GGML_TYPE_COUNT) {
        throw error(GM_ERR_DTYPE, "%d is no ggml type; the loaded ggml has types 0 to %d", type, GGML_TYPE_COUNT - 1);
    }
    std::call_once(once[type], [&] { known[type] = describe(ggml_type(type)); });
    if (!known[type]) {
        const char * name = ggml_type_name(ggml_type(type));
        throw error(GM_ERR_DTYPE, "ggml type %s (%d) cannot be converted from and to F32", name ? name : "?", type);
    }
    return *known[type];
}

uint64_t row_size(const Dtype & d, int64_t width) {
    // 2^40 values a row is far beyond any model and keeps every product of sizes inside 64 bits.
    if (width <= 0 || width > (int64_t(1) << 40)) {
        throw error(GM_ERR_WIDTH, "width %lld is out of range; a row holds 1 to 2^40 values", (long long) width);
    }
    if (width % d.block != 0) {
        throw error(GM_ERR_WIDTH, "width %lld is not a multiple of %lld, the block size of %s; use f32, f16 or bf16 for this width",
                    (long long) width, (long long) d.block, d.name);
    }
    return ggml_row_size(d.type, width);
}

} // namespace gm

int32_t gm_type_from_name(const char * name) {
    for (int32_t type = 0; name && type < GGML_TYPE_COUNT; ++type) {
        const char * known = ggml_type_name(ggml_type(type));
        if (known && strcmp(known, name) == 0) return type;
    }
    return -1;
}

gm_status gm_type_block_size(int32_t type, int64_t * block_size) {
    return gm::guard([&] { gm::required(block_size, "block_size") = gm::dtype(type).block; });
}

gm_status gm_type_row_size(int32_t type, int64_t width, uint64_t * bytes) {
    return gm::guard([&] { gm::required(bytes, "bytes") = gm::row_size(gm::dtype(type), width); });
}

gm_status gm_type_limit(int32_t type, float * limit) {
    return gm::guard([&] { gm::required(limit, "limit") = gm::dtype(type).limit; });
}
