// Conversions between F32 rows and stored rows in host memory: the paths of a mirror on a host device.
#pragma once

#include "dtype.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <functional>

namespace gm {

// What a write met: values that the type cannot hold are replaced (NaN by 0, the rest by the limit, sign kept) and counted.
struct Tally {
    int64_t nan = 0, inf = 0, overflow = 0, over_f16 = 0;
    float   abs_max = 0.0f;  // largest finite |x|
    void    add(const Tally & other);
};

// Stores n values (a multiple of the block size) of x at y.
void quantize_checked(const Dtype & dtype, const float * x, void * y, int64_t n, Tally & tally);

// Counts and replaces in x what the dtype cannot hold; the slow path behind quantize_checked.
void sanitize(const Dtype & dtype, float * x, int64_t n, Tally & tally);

// Runs body(first, last) over slices of 0..n on the threads of a ggml CPU backend; inline when `bytes` is small.
class HostThreads {
  public:
    explicit HostThreads(int n_threads);  // 0: all cores
    void run(int64_t n, uint64_t bytes, const std::function<void(int64_t, int64_t)> & body);
    int  n_threads() const { return n_threads_; }
    static int resolve(int n_threads);  // 0 -> all cores

  private:
    int                n_threads_;
    ggml_backend_ptr   backend_;
};

} // namespace gm
