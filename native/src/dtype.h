// What ggml says about a type: row size, block size, conversions. No tables of our own.
#pragma once

#include "error.h"
#include "ggml.h"

namespace gm {

using FromFloat = void (*)(const float * x, void * y, int64_t n);
using ToFloat   = void (*)(const void * x, float * y, int64_t n);

struct Dtype {
    ggml_type    type;
    const char * name;
    int64_t      block;         // values per block
    FromFloat    from_float;    // the CPU backend's own, SIMD where it has it
    ToFloat      to_float;
    float        limit;         // see gm_type_limit
};

// Throws GM_ERR_DTYPE for a number that is no ggml type or a type that is not convertible both ways.
const Dtype & dtype(int32_t type);

// ggml_row_size with its preconditions checked: throws GM_ERR_ARGUMENT, GM_ERR_WIDTH.
uint64_t row_size(const Dtype & dtype, int64_t width);

} // namespace gm
