#include "error.h"

#include <cstdarg>
#include <cstdio>
#include <new>

namespace gm {

static thread_local gm_error_info last_error = { GM_OK, -1, -1, 0, 0, "" };

Error error(gm_status status, const char * format, ...) {
    Error e;
    e.info.status   = status;
    e.info.tap      = -1;
    e.info.position = -1;
    va_list args;
    va_start(args, format);
    vsnprintf(e.info.message, sizeof(e.info.message), format, args);
    va_end(args);
    return e;
}

void rethrow_last_error() {
    Error e;
    e.info = last_error;
    throw e;
}

gm_status record_current_exception() noexcept {
    try {
        throw;
    } catch (const Error & e) {
        last_error = e.info;
    } catch (const std::bad_alloc &) {
        last_error = error(GM_ERR_MEMORY, "out of host memory").info;
    } catch (const std::exception & e) {
        last_error = error(GM_ERR_INTERNAL, "unexpected C++ exception: %s", e.what()).info;
    } catch (...) {
        last_error = error(GM_ERR_INTERNAL, "unexpected C++ exception of unknown type").info;
    }
    return gm_status(last_error.status);
}

} // namespace gm

const gm_error_info * gm_last_error(void) {
    return &gm::last_error;
}
