// Typed failures inside the library, and the one place where they become status codes at the C ABI.
#pragma once

#include "ggml_mirror.h"

#include <exception>

namespace gm {

class Error : public std::exception {
  public:
    gm_error_info info{};
    const char *  what() const noexcept override { return info.message; }
    Error &       at(int64_t position) { info.position = position; return *this; }
    Error &       tap(int32_t tap) { info.tap = tap; return *this; }
    Error &       bytes(uint64_t needed, uint64_t free) { info.bytes_needed = needed; info.bytes_free = free; return *this; }
};

__attribute__((format(printf, 2, 3))) Error error(gm_status status, const char * format, ...);

// Records the exception in flight as this thread's last error.
gm_status record_current_exception() noexcept;

// A function of this ABI that was called inside the library has failed: throws what it recorded.
[[noreturn]] void rethrow_last_error();

// Every function of the ABI that can fail runs its body in here: no exception crosses the boundary.
template <class Body> gm_status guard(Body && body) noexcept {
    try {
        body();
        return GM_OK;
    } catch (...) {
        return record_current_exception();
    }
}

template <class T> T & required(T * pointer, const char * name) {
    if (!pointer) throw error(GM_ERR_ARGUMENT, "%s must not be NULL", name);
    return *pointer;
}

} // namespace gm
