// Runs CUDA kernels on the CPU: each thread of a block is a fiber, blocks run one after the other. What it shows is that indices, formats and
// rounding are right; races between warps it does not show.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

extern "C" uint16_t ggml_fp32_to_fp16(float x);
extern "C" float    ggml_fp16_to_fp32(uint16_t x);

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)

struct float4 { float x, y, z, w; };
struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
struct Index { uint32_t x, y; };

inline float4 make_float4(float x, float y, float z, float w) { return { x, y, z, w }; }
inline uint2  make_uint2(uint32_t x, uint32_t y) { return { x, y }; }

inline Index threadIdx, blockIdx, gridDim;

using std::max;
using std::min;

inline uint32_t __float_as_uint(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
inline float    __uint_as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }

template <class T> T atomicAdd(T * at, T x) { const T before = *at; *at += x; return before; }
template <class T> T atomicMax(T * at, T x) { const T before = *at; *at = std::max(*at, x); return before; }

namespace gm::emulator {

using Stack = std::unique_ptr<char[]>;
constexpr int kStack = 64 << 10;

struct Block {
    ucontext_t                 scheduler;
    std::vector<ucontext_t>    fibers;
    std::vector<char>          done;
    std::vector<uint32_t>      exchange;          // one word per thread, for shuffles
    std::vector<Stack>         stacks;
    const std::function<void()> * body = nullptr;
    uint32_t                   current = 0, arrived = 0, generation = 0;
};

inline Block block;

// Every fiber runs to its next meeting point before any runs on: threads of a warp, and of a block, meet in the same order.
inline void meet() {
    const uint32_t me = block.current;
    swapcontext(&block.fibers[me], &block.scheduler);
}

inline void meet_all() {
    const uint32_t generation = block.generation;
    if (++block.arrived == block.fibers.size()) {
        block.arrived = 0;
        ++block.generation;
    }
    do meet();
    while (block.generation == generation);
}

inline void fiber() {
    (*block.body)();
    block.done[block.current] = 1;
    swapcontext(&block.fibers[block.current], &block.scheduler);
}

inline void run_block(uint32_t threads, const std::function<void()> & body) {
    block.fibers.resize(threads);
    block.done.assign(threads, 0);
    block.exchange.resize(threads);
    if (block.stacks.size() < threads) block.stacks.resize(threads);
    block.body = &body;
    for (uint32_t t = 0; t < threads; ++t) {
        getcontext(&block.fibers[t]);
        if (!block.stacks[t]) block.stacks[t].reset(new char[kStack]);
        block.fibers[t].uc_stack.ss_sp   = block.stacks[t].get();
        block.fibers[t].uc_stack.ss_size = kStack;
        block.fibers[t].uc_link          = nullptr;
        makecontext(&block.fibers[t], fiber, 0);
    }
    for (bool left = true; left;) {
        left = false;
        for (uint32_t t = 0; t < threads; ++t) {
            if (block.done[t]) continue;
            left          = true;
            block.current = t;
            threadIdx     = { t, 0 };
            swapcontext(&block.scheduler, &block.fibers[t]);
        }
    }
}

template <class Job> void launch(Index grid, uint32_t threads, void (*kernel)(Job), const Job & job) {
    gridDim = grid;
    for (uint32_t y = 0; y < grid.y; ++y) {
        for (uint32_t x = 0; x < grid.x; ++x) {
            blockIdx = { x, y };
            run_block(threads, [&] { kernel(job); });
        }
    }
}

} // namespace gm::emulator

inline void __syncthreads() { gm::emulator::meet_all(); }

namespace gm {

inline uint16_t half_bits(float x) { return ggml_fp32_to_fp16(x); }
inline float    half_value(uint16_t bits) { return ggml_fp16_to_fp32(bits); }

inline void warp_sync() { emulator::meet(); }

template <class T> T shuffle_xor(T x, int mask, int) {
    static_assert(sizeof(T) == 4);
    const uint32_t me = threadIdx.x;
    memcpy(&emulator::block.exchange[me], &x, 4);
    emulator::meet();
    memcpy(&x, &emulator::block.exchange[me ^ uint32_t(mask)], 4);
    emulator::meet();
    return x;
}

} // namespace gm
