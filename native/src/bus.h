// Feature bytes that cross between host memory and the memory of devices, whatever their type: F32 on the way in and out, stored rows of snapshots.
#pragma once

#include "ggml_mirror.h"

#include <atomic>

namespace gm {

class Bus {
  public:
    void to_host(uint64_t bytes) { add(bytes_.to_host, total_to_host, bytes); }
    void to_device(uint64_t bytes) { add(bytes_.to_device, total_to_device, bytes); }
    void reset() { bytes_ = {}; }

    gm_bus_bytes        bytes() const { return bytes_; }
    static gm_bus_bytes total() { return { total_to_host, total_to_device }; }

  private:
    static void add(int64_t & own, std::atomic<int64_t> & total, uint64_t bytes) {
        own += int64_t(bytes);
        total += int64_t(bytes);
    }

    gm_bus_bytes                       bytes_{};
    static inline std::atomic<int64_t> total_to_host{ 0 }, total_to_device{ 0 };  // of this process
};

} // namespace gm
