// Device code of the two row paths, CUDA and HIP: F32 activations into ring slots of a format, and ring slots back to F32.
//
// A lane works on groups of four neighbouring values: one 16-byte access on the F32 side. In the block formats eight lanes share a block of
// 32 values. `Format` says how a group, or a block, is stored; the kernels know nothing else about it.
//
// What is stored is what ggml's reference conversions store, bit for bit: this source is compiled without fused multiply-add.
#pragma once

#include "gpu_runtime.h"
#include "row_jobs.h"

namespace gm {

// ----------------------------------------------------------------------------------------------- formats

__device__ inline uint32_t magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

struct F32 {
    static constexpr int block = 1, bytes = 4;  // of a block
    using Element = float;
    using Group   = float4;
    __device__ static float  encode(float x) { return x; }
    __device__ static float4 encode(float4 x) { return x; }
    __device__ static float  decode(float x) { return x; }
    __device__ static float4 decode(float4 x) { return x; }
};

template <class Half> struct Plain16 {
    static constexpr int block = 1, bytes = 2;
    using Element = uint16_t;
    using Group   = uint2;
    __device__ static uint16_t encode(float x) { return Half::bits(x); }
    __device__ static uint2    encode(float4 x) {
        return make_uint2(Half::bits(x.x) | uint32_t(Half::bits(x.y)) << 16, Half::bits(x.z) | uint32_t(Half::bits(x.w)) << 16);
    }
    __device__ static float  decode(uint16_t x) { return Half::value(x); }
    __device__ static float4 decode(uint2 x) {
        return make_float4(Half::value(uint16_t(x.x)), Half::value(uint16_t(x.x >> 16)), Half::value(uint16_t(x.y)), Half::value(uint16_t(x.y >> 16)));
    }
};

struct Ieee {
    __device__ static uint16_t bits(float x) { return half_bits(x); }
    __device__ static float    value(uint16_t x) { return half_value(x); }
};

struct Brain {
    // To nearest, ties to even. x is finite, and so is what becomes of it: capture has seen to both.
    __device__ static uint16_t bits(float x) {
        const uint32_t b = __float_as_uint(x);
        return uint16_t((b + 0x7fffu + (b >> 16 & 1u)) >> 16);
    }
    __device__ static float value(uint16_t x) { return __uint_as_float(uint32_t(x) << 16); }
};

using F16  = Plain16<Ieee>;
using BF16 = Plain16<Brain>;

// An F16 scale, then 32 signed bytes.
struct Q8_0 {
    static constexpr int block = 32, bytes = 34;

    // Eight lanes store a block at `to` (2-byte aligned), lane j values 4j..4j+3.
    __device__ static void encode(float4 x, int j, uint16_t * to) {
        uint32_t largest = max(max(magnitude_bits(x.x), magnitude_bits(x.y)), max(magnitude_bits(x.z), magnitude_bits(x.w)));
        for (int mask = 1; mask < 8; mask *= 2) largest = max(largest, shuffle_xor(largest, mask, 8));
        const float    d  = __uint_as_float(largest) / 127.0f;
        const float    id = d != 0.0f ? 1.0f / d : 0.0f;
        const uint32_t q0 = quantize(x.x * id), q1 = quantize(x.y * id), q2 = quantize(x.z * id), q3 = quantize(x.w * id);
        to[1 + 2 * j] = uint16_t(q0 | q1 << 8);
        to[2 + 2 * j] = uint16_t(q2 | q3 << 8);
        if (j == 0) to[0] = half_bits(d);
    }

    // Half away from zero: 0.5 less its last bit, so that no sum below a half rounds up to one.
    __device__ static uint32_t quantize(float x) { return uint32_t(int(x + copysignf(0.49999997f, x))) & 0xffu; }

    __device__ static float4 decode(const uint16_t * block, int j) {
        const float    d = half_value(block[0]);
        const uint32_t low = block[1 + 2 * j], high = block[2 + 2 * j];
        return make_float4(d * int8_t(low), d * int8_t(low >> 8), d * int8_t(high), d * int8_t(high >> 8));
    }
};

// An F16 scale, then 16 bytes: values 0..15 in the low halves, 16..31 in the high ones.
struct Q4_0 {
    static constexpr int block = 32, bytes = 18;

    __device__ static void encode(float4 x, int j, uint16_t * to) {
        // The first of the largest |x|, with its sign.
        float largest = x.x;
        largest       = fabsf(x.y) > fabsf(largest) ? x.y : largest;
        largest       = fabsf(x.z) > fabsf(largest) ? x.z : largest;
        largest       = fabsf(x.w) > fabsf(largest) ? x.w : largest;
        for (int mask = 1; mask < 8; mask *= 2) {
            const float other = shuffle_xor(largest, mask, 8);
            const bool  first = j & mask;  // the other lanes' values come before
            if (fabsf(other) > fabsf(largest) || (first && fabsf(other) == fabsf(largest))) largest = other;
        }
        const float    d    = largest / -8.0f;
        const float    id   = d != 0.0f ? 1.0f / d : 0.0f;
        const uint32_t q    = quantize(x.x * id) | quantize(x.y * id) << 8 | quantize(x.z * id) << 16 | quantize(x.w * id) << 24;
        const uint32_t high = shuffle_xor(q, 4, 8);
        if (j < 4) {
            to[1 + 2 * j] = uint16_t(q | high << 4);
            to[2 + 2 * j] = uint16_t((q | high << 4) >> 16);
        }
        if (j == 0) to[0] = half_bits(d);
    }

    __device__ static uint32_t quantize(float x) { return uint32_t(min(15, int(x + 8.5f))); }

    __device__ static float4 decode(const uint16_t * block, int j) {
        const float    d = half_value(block[0]);
        const uint32_t q = (block[1 + 2 * (j & 3)] | uint32_t(block[2 + 2 * (j & 3)]) << 16) >> (j & 4);
        return make_float4(d * (int(q & 15) - 8), d * (int(q >> 8 & 15) - 8), d * (int(q >> 16 & 15) - 8), d * (int(q >> 24 & 15) - 8));
    }
};

// ----------------------------------------------------------------------------------------------- capture

// The rule for values that the format cannot hold, for one value.
__device__ inline float replace(float x, float limit, uint32_t * counts, uint32_t & largest) {
    const uint32_t bits = magnitude_bits(x), most = __float_as_uint(limit);
    if (bits > 0x7f800000u) {
        ++counts[0];
        return 0.0f;
    }
    if (bits == 0x7f800000u) {
        ++counts[1];
    } else {
        counts[2] += bits > most;
        counts[3] += bits > 0x477fe000u;  // 65504
        largest = max(largest, bits);
    }
    return bits > most ? copysignf(limit, x) : x;
}

// For a lane's groups, of which one value at least deserves a look; returns the largest finite |x|. Rare, so it counts straight in memory.
__device__ inline uint32_t replace_all(float4 * x, float limit, Counters & counters) {
    uint32_t counts[4] = { 0, 0, 0, 0 }, largest = 0;
#pragma unroll
    for (int g = 0; g < kPieceGroups; ++g) {
        x[g].x = replace(x[g].x, limit, counts, largest);
        x[g].y = replace(x[g].y, limit, counts, largest);
        x[g].z = replace(x[g].z, limit, counts, largest);
        x[g].w = replace(x[g].w, limit, counts, largest);
    }
    if (counts[0]) atomicAdd(&counters.nan, (unsigned long long) counts[0]);
    if (counts[1]) atomicAdd(&counters.inf, (unsigned long long) counts[1]);
    if (counts[2]) atomicAdd(&counters.overflow, (unsigned long long) counts[2]);
    if (counts[3]) atomicAdd(&counters.over_f16, (unsigned long long) counts[3]);
    return largest;
}

// A lane's groups of a piece; what lies beyond the slice is 0.
__device__ inline void load_piece(const float * source, uint32_t rest, int lane, uint32_t unit, float4 * x) {
    if (unit == 16 && rest >= kPiece) {
#pragma unroll
        for (int g = 0; g < kPieceGroups; ++g) x[g] = reinterpret_cast<const float4 *>(source)[g * kLanes + lane];
        return;
    }
#pragma unroll
    for (int g = 0; g < kPieceGroups; ++g) {
        const uint32_t at = uint32_t(g * kLanes + lane) * 4;
        x[g].x = at + 0 < rest ? source[at + 0] : 0.0f;
        x[g].y = at + 1 < rest ? source[at + 1] : 0.0f;
        x[g].z = at + 2 < rest ? source[at + 2] : 0.0f;
        x[g].w = at + 3 < rest ? source[at + 3] : 0.0f;
    }
}

// The piece of a slice at `to`, of which `rest` values are left.
template <class Format> struct StorePiece {
    static constexpr int stage_bytes = 0;

    __device__ static void run(const float4 * x, char * to, uint32_t rest, int lane, uint32_t unit, uint16_t *) {
#pragma unroll
        for (int g = 0; g < kPieceGroups; ++g) {
            const uint32_t at = uint32_t(g * kLanes + lane) * 4;
            if (unit >= sizeof(typename Format::Group) && at + 4 <= rest) {
                reinterpret_cast<typename Format::Group *>(to)[at / 4] = Format::encode(x[g]);
            } else {
                auto * elements = reinterpret_cast<typename Format::Element *>(to);
                if (at + 0 < rest) elements[at + 0] = Format::encode(x[g].x);
                if (at + 1 < rest) elements[at + 1] = Format::encode(x[g].y);
                if (at + 2 < rest) elements[at + 2] = Format::encode(x[g].z);
                if (at + 3 < rest) elements[at + 3] = Format::encode(x[g].w);
            }
        }
    }
};

// Blocks are put together in shared memory, where their odd size costs little, and leave it in wide stores.
template <class Format> struct StoreBlocks {
    static constexpr int stage_bytes = kPiece / Format::block * Format::bytes;

    __device__ static void run(const float4 * x, char * to, uint32_t rest, int lane, uint32_t unit, uint16_t * stage) {
#pragma unroll
        for (int g = 0; g < kPieceGroups; ++g) {
            const int block = (g * kLanes + lane) / 8;
            Format::encode(x[g], lane % 8, stage + block * (Format::bytes / 2));
        }
        warp_sync();
        const int bytes = int(min(rest, uint32_t(kPiece))) / Format::block * Format::bytes;
        int       done  = 0;
        if (unit == 16) {
            done = bytes & ~15;
            for (int i = lane; i < done / 16; i += kLanes) reinterpret_cast<uint4 *>(to)[i] = reinterpret_cast<const uint4 *>(stage)[i];
        } else if (unit >= 4) {
            done = bytes & ~3;
            for (int i = lane; i < done / 4; i += kLanes) reinterpret_cast<uint32_t *>(to)[i] = reinterpret_cast<const uint32_t *>(stage)[i];
        }
        for (int i = done / 2 + lane; i < bytes / 2; i += kLanes) reinterpret_cast<uint16_t *>(to)[i] = stage[i];
    }
};

template <> struct StorePiece<Q8_0> : StoreBlocks<Q8_0> {};
template <> struct StorePiece<Q4_0> : StoreBlocks<Q4_0> {};

template <class Format> __device__ inline void capture_piece(const CaptureJob & job) {
    using Store = StorePiece<Format>;
    constexpr int warps = kCaptureThreads / kLanes;
    __shared__ uint4 stages[warps][Store::stage_bytes ? (Store::stage_bytes + 15) / 16 : 1];

    const int      lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const uint32_t i    = blockIdx.x * warps + warp;
    if (i >= job.rows * job.pieces) return;
    Counters &     counters = job.counters[blockIdx.y];
    const uint32_t known    = counters.abs_max;  // asked for early; it may be more by now
    const uint32_t row = i / job.pieces, piece = i - row * job.pieces, rest = job.n_embd - piece * kPiece;
    float4         x[kPieceGroups];
    load_piece(reinterpret_cast<const float *>(job.source[blockIdx.y] + row * job.row_stride) + piece * kPiece, rest, lane, job.source_unit, x);

    uint32_t largest = 0;
#pragma unroll
    for (int g = 0; g < kPieceGroups; ++g) {
        largest = max(largest, max(max(magnitude_bits(x[g].x), magnitude_bits(x[g].y)), max(magnitude_bits(x[g].z), magnitude_bits(x[g].w))));
    }
    if (largest > job.safe) largest = replace_all(x, job.limit, counters);

    uint32_t slot = job.slot + row;
    if (slot >= job.cap) slot -= job.cap;
    char * to = job.ring + blockIdx.y * job.tap_bytes + slot * job.row_bytes + piece * uint64_t(kPiece / Format::block * Format::bytes);
    Store::run(x, to, rest, lane, job.ring_unit, reinterpret_cast<uint16_t *>(stages[warp]));

    for (int mask = kLanes / 2; mask; mask /= 2) largest = max(largest, shuffle_xor(largest, mask, kLanes));
    if (lane == 0 && largest > known) atomicMax(&counters.abs_max, largest);
}

// Grid: [pieces of all rows, taps]; 32 lanes to a piece.
template <class Format> __global__ void __launch_bounds__(kCaptureThreads) capture_rows(const CaptureJob job) { capture_piece<Format>(job); }

// -------------------------------------------------------------------------------------------------- read

// Group i of four stored values; value v alone.
template <class Format> struct LoadGroup {
    __device__ static float4 group(const char * stored, uint64_t i) {
        return Format::decode(reinterpret_cast<const typename Format::Group *>(stored)[i]);
    }
    __device__ static float one(const char * stored, uint64_t v) {
        return Format::decode(reinterpret_cast<const typename Format::Element *>(stored)[v]);
    }
};

template <class Format> struct LoadBlockGroup {
    __device__ static float4 group(const char * stored, uint64_t i) {
        return Format::decode(reinterpret_cast<const uint16_t *>(stored + i / 8 * Format::bytes), int(i % 8));
    }
    __device__ static float one(const char * stored, uint64_t v) {
        const float4 x = group(stored, v / 4);
        return v % 4 == 0 ? x.x : v % 4 == 1 ? x.y : v % 4 == 2 ? x.z : x.w;
    }
};

template <> struct LoadGroup<Q8_0> : LoadBlockGroup<Q8_0> {};
template <> struct LoadGroup<Q4_0> : LoadBlockGroup<Q4_0> {};

template <class Format> __device__ inline void read_group(const ReadJob & job) {
    using Load = LoadGroup<Format>;
    const ReadRun  run = blockIdx.y ? job.run[1] : job.run[0];
    const uint64_t i   = uint64_t(blockIdx.x) * kReadThreads + threadIdx.x;
    if (4 * i >= run.n) return;
    if (job.unit == 16 && 4 * i + 4 <= run.n) {
        reinterpret_cast<float4 *>(run.values)[i] = Load::group(run.stored, i);
        return;
    }
    for (uint64_t v = 4 * i; v < run.n && v < 4 * i + 4; ++v) run.values[v] = Load::one(run.stored, v);
}

// Grid: [groups of the longer run, runs]; a lane to a group.
template <class Format> __global__ void __launch_bounds__(kReadThreads) read_rows(const ReadJob job) { read_group<Format>(job); }

} // namespace gm
