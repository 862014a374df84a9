// A ggml context for tensors and graphs without data.
#pragma once

#include "error.h"

#include "ggml-cpp.h"

#include <memory>
#include <new>

namespace gm {

// In memory of its own: ggml ends the process if it gets none, and this throws GM_ERR_MEMORY.
class Context {
  public:
    Context() = default;
    explicit Context(size_t bytes) : memory_(new (std::nothrow) uint8_t[bytes]) {
        if (!memory_) throw error(GM_ERR_MEMORY, "host memory was refused: %llu bytes that describe tensors", (unsigned long long) bytes).bytes(bytes, 0);
        ctx_.reset(ggml_init({ bytes, memory_.get(), true }));
    }

    ggml_context * get() const { return ctx_.get(); }

  private:
    std::unique_ptr<uint8_t[]> memory_;  // freed after the context
    ggml_context_ptr           ctx_;
};

} // namespace gm
