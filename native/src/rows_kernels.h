// Rows by CUDA or HIP kernels of this library's own, if it was built with them.
#pragma once

#include "rows.h"

#include <memory>

namespace gm {

#if defined(GM_CUDA) || defined(GM_HIP)

// Does this library convert rows of the type by kernels of its own on the device?
bool has_row_kernels(ggml_backend_dev_t device, const Dtype & dtype);

// ring: [width, cap] in a buffer of the device, which has_row_kernels. Throws GM_ERR_UNSUPPORTED, GM_ERR_MEMORY, GM_ERR_BACKEND.
std::unique_ptr<Rows> make_row_kernels(ggml_backend_dev_t device, const Dtype & dtype, ggml_tensor * ring, int32_t taps);

// Device scratch: rows on their way from or to host memory, and counts.
uint64_t row_kernels_staging_bytes(int64_t width, int64_t cap);

#else

inline bool                  has_row_kernels(ggml_backend_dev_t, const Dtype &) { return false; }
inline std::unique_ptr<Rows> make_row_kernels(ggml_backend_dev_t, const Dtype &, ggml_tensor *, int32_t) { return nullptr; }
inline uint64_t              row_kernels_staging_bytes(int64_t, int64_t) { return 0; }

#endif

} // namespace gm
