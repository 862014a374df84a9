// ggml devices by index and name, their free memory, and what they can do with a type.
#pragma once

#include "dtype.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"

namespace gm {

ggml_backend_dev_t device_at(int32_t index);
int32_t            device_index(ggml_backend_dev_t device);
bool               device_is_host(ggml_backend_dev_t device);

ggml_backend_dev_t device_of(const ggml_tensor * tensor);

// The buffer that a tensor's data lies in, also of a view; null: none yet.
ggml_backend_buffer_t buffer_of(const ggml_tensor * tensor);

// A backend of the device, with that many threads if it has any to set. Throws GM_ERR_DEVICE.
ggml_backend_ptr start_backend(ggml_backend_dev_t device, int n_threads);

// Free bytes; for host devices what this process may still take (host_memory.h).
uint64_t device_memory_free(ggml_backend_dev_t device);

struct Support {
    bool capture;  // set_rows into the type, and the ops that find and replace what it cannot hold
    bool read;     // get_rows back to F32
};
Support device_ggml_ops(ggml_backend_dev_t device, const Dtype & dtype, int64_t n_embd, int64_t width);

} // namespace gm
