// Time spent in a scope.
#pragma once

#include <chrono>
#include <cstdint>

namespace gm {

// Adds the time it lives to a counter of nanoseconds.
class Stopwatch {
  public:
    explicit Stopwatch(int64_t & ns) : ns_(ns), start_(std::chrono::steady_clock::now()) {}
    ~Stopwatch() {
        ns_ += std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - start_).count();
    }

  private:
    int64_t &                             ns_;
    std::chrono::steady_clock::time_point start_;
};

} // namespace gm
