// The CUDA runtime, under its own names also where the source is compiled for HIP; and what the two languages spell differently.
#pragma once

#include <cstdint>

#if defined(GM_HIP)

#    include <hip/hip_fp16.h>
#    include <hip/hip_runtime.h>

#    define GM_GPU_NAME "ROCm"  // as ggml names the registry of its HIP backend

#    define cudaError_t                       hipError_t
#    define cudaErrorInvalidDeviceFunction    hipErrorInvalidDeviceFunction
#    define cudaErrorNoKernelImageForDevice   hipErrorNoBinaryForGpu
#    define cudaFuncAttributes                hipFuncAttributes
#    define cudaFuncGetAttributes             hipFuncGetAttributes
#    define cudaGetDevice                     hipGetDevice
#    define cudaGetErrorString                hipGetErrorString
#    define cudaGetLastError                  hipGetLastError
#    define cudaMemcpy2DAsync                 hipMemcpy2DAsync
#    define cudaMemcpyAsync                   hipMemcpyAsync
#    define cudaMemcpyDefault                 hipMemcpyDefault
#    define cudaMemsetAsync                   hipMemsetAsync
#    define cudaPointerAttributes             hipPointerAttribute_t
#    define cudaPointerGetAttributes          hipPointerGetAttributes
#    define cudaSetDevice                     hipSetDevice
#    define cudaStreamCreateWithFlags         hipStreamCreateWithFlags
#    define cudaStreamDestroy                 hipStreamDestroy
#    define cudaStreamNonBlocking             hipStreamNonBlocking
#    define cudaStreamSynchronize             hipStreamSynchronize
#    define cudaStream_t                      hipStream_t
#    define cudaSuccess                       hipSuccess

namespace gm {

// The lanes of a wavefront run together; what is left to do is to keep the compiler from moving accesses across.
__device__ inline void warp_sync() {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "wavefront");
    __builtin_amdgcn_wave_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "wavefront");
}

template <class T> __device__ T shuffle_xor(T x, int mask, int width) { return __shfl_xor(x, mask, width); }

} // namespace gm

#elif defined(GM_EMULATED)

#    include "gpu_emulator.h"  // of the tests: runs kernels on the CPU, where there is no GPU

#else

#    include <cuda_fp16.h>
#    include <cuda_runtime.h>

#    define GM_GPU_NAME "CUDA"

namespace gm {

__device__ inline void warp_sync() { __syncwarp(); }

template <class T> __device__ T shuffle_xor(T x, int mask, int width) { return __shfl_xor_sync(0xffffffffu, x, mask, width); }

} // namespace gm

#endif

#if !defined(GM_EMULATED)

namespace gm {

union HalfBits {
    __half   value;
    uint16_t bits;
    __device__ HalfBits() {}
};

__device__ inline uint16_t half_bits(float x) {
    HalfBits h;
    h.value = __float2half_rn(x);
    return h.bits;
}

__device__ inline float half_value(uint16_t bits) {
    HalfBits h;
    h.bits = bits;
    return __half2float(h.value);
}

} // namespace gm

#endif
