#include "pinned.h"

#include "device.h"
#include "host_memory.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

namespace gm {

namespace {

constexpr const char * kVariable = "GGML_MIRROR_PINNED_MIB";

// Bytes that may be pinned for all mirrors of a device.
uint64_t limit() {
    const char * text = getenv(kVariable);
    char *       end  = nullptr;
    const auto   mib  = text ? strtoull(text, &end, 10) : 0;
    const bool   good = text && *text && !*end && *text != '-' && mib < (uint64_t(1) << 40);
    return (good ? mib : uint64_t(2048)) << 20;
}

// Conversations grow by some rows between snapshots: eight sizes per power of two let them use the same memory.
constexpr uint64_t kStep = 4096;

uint64_t rounded(uint64_t bytes) {
    uint64_t step = kStep;
    while (step * 16 < bytes) step *= 2;
    return (bytes + step - 1) / step * step;
}

// One snapshot held and another on its way, each an eighth larger by rounding.
uint64_t for_rings(uint64_t rings) { return std::min(limit(), rings / 4 * 9 + 2 * kStep); }

__attribute__((format(printf, 1, 2))) std::string text(const char * format, ...) {
    char    out[200];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(out, sizeof(out), format, arguments);
    va_end(arguments);
    return out;
}

const char * address(const ggml_backend_buffer_ptr & memory) {
    return static_cast<const char *>(ggml_backend_buffer_get_base(memory.get()));
}

uint64_t size(const ggml_backend_buffer_ptr & memory) { return ggml_backend_buffer_get_size(memory.get()); }

ggml_backend_buffer_type_t host_type(ggml_backend_dev_t device) {
    return device_is_host(device) ? nullptr : ggml_backend_dev_host_buffer_type(device);
}

} // namespace

std::shared_ptr<PinnedPool> PinnedPool::of(ggml_backend_dev_t device) {
    static std::mutex                                                    mutex;
    static std::map<ggml_backend_buffer_type_t, std::weak_ptr<PinnedPool>> pools;
    if (device_is_host(device)) return nullptr;
    const auto                  type = host_type(device);
    std::lock_guard<std::mutex> lock(mutex);
    std::weak_ptr<PinnedPool> & known = pools[type];
    std::shared_ptr<PinnedPool> pool  = known.lock();
    if (!pool) known = pool = std::shared_ptr<PinnedPool>(new PinnedPool(type));
    return pool;
}

uint64_t PinnedPool::most_for(ggml_backend_dev_t device, uint64_t ring) { return ring && host_type(device) ? for_rings(ring) : 0; }

ggml_backend_buffer_ptr PinnedPool::take(uint64_t bytes, Use use, std::string & why) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto                  refuse = [&](std::string reason) {
        why = std::move(reason);
        return nullptr;
    };
    if (!type_) return refuse("the device has no pinned host memory");
    const uint64_t most = for_rings(rings_), need = rounded(std::min(bytes, most));
    if (bytes > most || (use == Use::Array ? bytes + out_bytes_ > most / 2 : need + out_bytes_ > most)) {
        return refuse(text("%llu bytes beside %llu in use are more than the %llu that may be pinned%s (%s)", (unsigned long long) bytes,
                           (unsigned long long) out_bytes_, (unsigned long long) most, use == Use::Array ? ", half of it for arrays" : "", kVariable));
    }
    ggml_backend_buffer_ptr memory;
    for (auto idle = idle_.end(); !memory && idle != idle_.begin();) {
        --idle;
        if (size(*idle) < bytes || size(*idle) > 2 * need) continue;
        memory = std::move(*idle);
        idle   = idle_.erase(idle);
    }
    if (!memory) {
        drop_idle(most - need);
        const uint64_t free = host_memory().free;
        if (need > free / 2) {
            return refuse(text("pinning %llu bytes would take more than half of the %llu that are free in host memory", (unsigned long long) need,
                               (unsigned long long) free));
        }
        memory.reset(ggml_backend_buft_alloc_buffer(type_, need));
        // ggml gives ordinary memory in place of what it cannot pin.
        if (!memory || ggml_backend_buffer_get_type(memory.get()) != type_) {
            return refuse(text("%s did not pin %llu bytes", ggml_backend_buft_name(type_), (unsigned long long) need));
        }
        held_ += size(memory);
    }
    out_[address(memory)] = size(memory);
    out_bytes_ += size(memory);
    why.clear();
    return memory;
}

void PinnedPool::give_back(ggml_backend_buffer_ptr memory) {
    if (!memory) return;
    std::lock_guard<std::mutex> lock(mutex_);
    out_.erase(address(memory));
    out_bytes_ -= size(memory);
    idle_.push_back(std::move(memory));
    drop_idle(mirrors_ ? for_rings(rings_) : 0);
}

void PinnedPool::drop_idle(uint64_t down_to) {
    while (held_ > down_to && !idle_.empty()) {
        held_ -= size(idle_.front());
        idle_.erase(idle_.begin());
    }
}

bool PinnedPool::holds(const void * data, uint64_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    const char *                first = static_cast<const char *>(data);
    auto                        after = out_.upper_bound(first);
    if (after == out_.begin()) return false;
    --after;
    return first + bytes <= after->first + after->second;
}

uint64_t PinnedPool::held() {
    std::lock_guard<std::mutex> lock(mutex_);
    return held_;
}

void PinnedPool::join(uint64_t ring) {
    std::lock_guard<std::mutex> lock(mutex_);
    rings_ += ring;
    ++mirrors_;
}

void PinnedPool::leave(uint64_t ring) {
    std::lock_guard<std::mutex> lock(mutex_);
    rings_ -= ring;
    --mirrors_;
    drop_idle(mirrors_ ? for_rings(rings_) : 0);
}

} // namespace gm

void gm_host_rows_free(gm_host_rows * rows) {
    delete rows;
}
