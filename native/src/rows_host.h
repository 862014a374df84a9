// Conversions between F32 rows and stored rows in host memory: the paths of a mirror on a host device.
#pragma once

#include "dtype.h"

#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

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

// Runs body(first, last) over pieces of 0..n, on the calling thread and on workers that come to help. The caller waits only for pieces that a
// worker has begun: on a busy machine, where a worker is not scheduled in time, it does the work alone and no slower than one thread.
// (A fork-join pool such as ggml's waits for every thread: a conversion of 3 ms then took 32.)
class HostThreads {
  public:
    explicit HostThreads(int n_threads);  // 0: all cores, up to 8: conversions are bound by memory
    ~HostThreads();
    HostThreads(const HostThreads &)             = delete;
    HostThreads & operator=(const HostThreads &) = delete;

    // Small work (`bytes`) is done inline. Bodies do not throw. One call at a time.
    void run(int64_t n, uint64_t bytes, const std::function<void(int64_t, int64_t)> & body);

    int        n_threads() const { return n_threads_; }
    static int resolve(int n_threads);

  private:
    struct Job;
    void help();

    int                      n_threads_;
    std::vector<std::thread> workers_;  // started by the first large job
    std::mutex               mutex_;
    std::condition_variable  begun_, done_;
    Job *                    job_    = nullptr;
    uint64_t                 number_ = 0;  // of the job, so that a worker takes each once
    int                      busy_   = 0;  // workers inside job_
    bool                     stop_   = false;
};

} // namespace gm
