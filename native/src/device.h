// ggml devices by index and name, their free memory, and what they can do with a type.
#pragma once

#include "dtype.h"
#include "ggml-backend.h"

namespace gm {

ggml_backend_dev_t device_at(int32_t index);
bool               device_is_host(ggml_backend_dev_t device);

ggml_backend_dev_t device_of(const ggml_tensor * tensor);

// Free bytes; for host devices what this process may still take: MemAvailable, or less under a cgroup limit.
uint64_t device_memory_free(ggml_backend_dev_t device);

struct Support {
    bool capture;  // set_rows into the type, and the ops that find and replace what it cannot hold
    bool read;     // get_rows back to F32
};
Support device_ggml_ops(ggml_backend_dev_t device, const Dtype & dtype, int64_t n_embd, int64_t width);

} // namespace gm
