// How much host memory this process may still take, and what sets the limit.
#pragma once

#include "ggml_mirror.h"

#include <string>

namespace gm {

// The least of what the machine has available, the control groups around this process allow, and ulimit -v leaves.
// Where none of these is known, ggml's own number for the CPU counts. root: prefix of /proc and /sys (for tests).
gm_host_memory host_memory(const std::string & root = "");

} // namespace gm
