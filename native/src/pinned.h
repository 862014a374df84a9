// Pinned host memory: a device copies to and from it at its full rate. Pinning takes longer than such a copy, so what was pinned is kept.
#pragma once

#include "error.h"

#include "ggml-cpp.h"

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace gm {

// All that a device's mirrors have pinned, in snapshots or idle. Safe to use from several threads.
class PinnedPool : public std::enable_shared_from_this<PinnedPool> {
  public:
    // One for all devices of a host buffer type; null for host devices.
    static std::shared_ptr<PinnedPool> of(ggml_backend_dev_t device);

    // Most bytes that a device's pool takes for a mirror with such a ring; 0 if there is none.
    static uint64_t most_for(ggml_backend_dev_t device, uint64_t ring);

    enum class Use { Array, Staging };  // arrays stay with the caller, and leave half of the pool to staging

    // Null: there is none, and `why` says why.
    ggml_backend_buffer_ptr take(uint64_t bytes, Use use, std::string & why);
    void                    give_back(ggml_backend_buffer_ptr memory);

    // Does all of it lie in memory that the pool has given out?
    bool holds(const void * data, uint64_t bytes);

    uint64_t held();

    // A mirror comes, and goes: without any, nothing is kept.
    void join(uint64_t ring);
    void leave(uint64_t ring);

  private:
    explicit PinnedPool(ggml_backend_buffer_type_t type) : type_(type) {}
    void drop_idle(uint64_t down_to);

    ggml_backend_buffer_type_t           type_;  // null: the device has none
    std::mutex                           mutex_;
    std::vector<ggml_backend_buffer_ptr> idle_;  // the one used longest ago first
    std::map<const char *, uint64_t>     out_;   // address -> bytes
    uint64_t                             held_ = 0, out_bytes_ = 0, rings_ = 0;
    int                                  mirrors_ = 0;
};

// A mirror's part in the pool of its device.
class PinnedShare {
  public:
    PinnedShare() = default;
    PinnedShare(ggml_backend_dev_t device, uint64_t ring) : pool_(PinnedPool::of(device)), ring_(ring) {
        if (pool_) pool_->join(ring_);
    }
    ~PinnedShare() {
        if (pool_) pool_->leave(ring_);
    }
    PinnedShare(const PinnedShare &)             = delete;
    PinnedShare & operator=(const PinnedShare &) = delete;

    const std::shared_ptr<PinnedPool> & pool() const { return pool_; }

  private:
    std::shared_ptr<PinnedPool> pool_;
    uint64_t                    ring_ = 0;
};

} // namespace gm

// Memory of the pool while a caller has it; may outlive the mirror.
struct gm_host_rows {
    std::shared_ptr<gm::PinnedPool> pool;
    ggml_backend_buffer_ptr         memory;
    ~gm_host_rows() { pool->give_back(std::move(memory)); }
};
