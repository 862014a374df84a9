#include "device.h"

#include "ggml-cpp.h"
#include "host_memory.h"
#include "rows_device.h"
#include "rows_kernels.h"

#include <cstdio>
#include <string>
#include <strings.h>

namespace gm {

ggml_backend_dev_t device_at(int32_t index) {
    const int64_t n = int64_t(ggml_backend_dev_count());
    if (index < 0 || index >= n) throw error(GM_ERR_DEVICE, "no device %d; ggml has %lld", index, (long long) n);
    return ggml_backend_dev_get(size_t(index));
}

int32_t device_index(ggml_backend_dev_t device) {
    const size_t n = ggml_backend_dev_count();
    for (size_t i = 0; i < n; ++i) {
        if (ggml_backend_dev_get(i) == device) return int32_t(i);
    }
    throw error(GM_ERR_DEVICE, "a device that ggml does not list");
}

bool device_is_host(ggml_backend_dev_t device) {
    return ggml_backend_buft_is_host(ggml_backend_dev_buffer_type(device));
}

ggml_backend_buffer_t buffer_of(const ggml_tensor * t) {
    return t->view_src ? t->view_src->buffer : t->buffer;
}

ggml_backend_ptr start_backend(ggml_backend_dev_t device, int n_threads) {
    ggml_backend_ptr backend(ggml_backend_dev_init(device, nullptr));
    if (!backend) throw error(GM_ERR_DEVICE, "device %s does not start", ggml_backend_dev_name(device));
    using SetThreads = void (*)(ggml_backend_t, int);
    if (auto set_threads = reinterpret_cast<SetThreads>(
            ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), "ggml_backend_set_n_threads"))) {
        set_threads(backend.get(), HostThreads::resolve(n_threads));
    }
    return backend;
}

ggml_backend_dev_t device_of(const ggml_tensor * t) {
    const auto buffer = buffer_of(t);
    if (!buffer) throw error(GM_ERR_ARGUMENT, "tensor %s has no memory", t->name);
    const auto device = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(buffer));
    // Host memory is the CPU's: mapped files are of no device, and memory that a GPU's backend has pinned is its own by name only.
    return device && !ggml_backend_buffer_is_host(buffer) ? device : ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
}

uint64_t device_memory_free(ggml_backend_dev_t device) {
    if (device_is_host(device)) return host_memory().free;
    size_t free = 0, total = 0;
    ggml_backend_dev_memory(device, &free, &total);
    return free;
}

Support device_ggml_ops(ggml_backend_dev_t device, const Dtype & dtype, int64_t n_embd, int64_t width) {
    const int64_t rows = 2;
    ggml_context_ptr ctx(ggml_init({ 64 * ggml_tensor_overhead(), nullptr, true }));
    ggml_tensor * ring    = ggml_new_tensor_2d(ctx.get(), dtype.type, width, rows);
    ggml_tensor * tap     = ggml_new_tensor_2d(ctx.get(), dtype.type, n_embd, rows);
    ggml_tensor * x       = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_embd, rows);
    auto          has     = [&](ggml_tensor * op) { return ggml_backend_dev_supports_op(device, op); };
    ggml_tensor * slots   = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I64, rows);
    ggml_tensor * indices = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, rows);
    Support support;
    support.capture = has(ggml_set_rows(ctx.get(), tap, x, slots)) && DeviceRows::check_ops_supported(ctx.get(), x, has);
    support.read    = has(ggml_get_rows(ctx.get(), ring, indices));
    return support;
}

// In host memory with ggml's own conversions, which dtype() has found to exist; on a GPU by kernels.
static bool converts_rows(ggml_backend_dev_t device, const Dtype & dtype) {
    return device_is_host(device) || has_row_kernels(device, dtype);
}

} // namespace gm

int32_t gm_device_count(void) {
    return int32_t(ggml_backend_dev_count());
}

gm_status gm_device_get(int32_t index, gm_device_info * info) {
    return gm::guard([&] {
        gm_device_info &         out    = gm::required(info, "info");
        const ggml_backend_dev_t device = gm::device_at(index);
        size_t                   free = 0, total = 0;
        ggml_backend_dev_memory(device, &free, &total);
        out = {};
        snprintf(out.name, sizeof(out.name), "%s", ggml_backend_dev_name(device));
        snprintf(out.description, sizeof(out.description), "%s", ggml_backend_dev_description(device));
        snprintf(out.backend, sizeof(out.backend), "%s", ggml_backend_reg_name(ggml_backend_dev_backend_reg(device)));
        out.type         = ggml_backend_dev_type(device);
        out.is_host      = gm::device_is_host(device);
        out.memory_free  = gm::device_memory_free(device);
        out.memory_total = out.is_host ? gm::host_memory().total : total;
    });
}

gm_status gm_device_find(const char * name, int32_t * index) {
    return gm::guard([&] {
        gm::required(index, "index");
        gm::required(name, "name");
        const int32_t n = gm_device_count();
        int32_t       cpu = -1, gpu = -1, found = -1;
        std::string   names;
        for (int32_t i = 0; i < n; ++i) {
            const ggml_backend_dev_t device = ggml_backend_dev_get(size_t(i));
            const auto               type   = ggml_backend_dev_type(device);
            if (found < 0 && strcasecmp(name, ggml_backend_dev_name(device)) == 0) found = i;
            if (cpu < 0 && type == GGML_BACKEND_DEVICE_TYPE_CPU) cpu = i;
            if (gpu < 0 && type == GGML_BACKEND_DEVICE_TYPE_GPU) gpu = i;
            names += std::string(i ? ", " : "") + ggml_backend_dev_name(device);
        }
        if (strcasecmp(name, "auto") == 0) found = gpu >= 0 ? gpu : cpu;
        if (found < 0) {
            throw gm::error(GM_ERR_DEVICE, "no device named '%.60s'; use auto or one of: %.350s", name, names.c_str());
        }
        *index = found;
    });
}

gm_status gm_tensor_device(const struct ggml_tensor * tensor, int32_t * index) {
    return gm::guard([&] { gm::required(index, "index") = gm::device_index(gm::device_of(&gm::required(tensor, "tensor"))); });
}

gm_status gm_device_supports(int32_t index, int32_t type, int64_t n_embd, int64_t width, bool * capture, bool * read) {
    return gm::guard([&] {
        gm::required(capture, "capture");
        gm::required(read, "read");
        const ggml_backend_dev_t device = gm::device_at(index);
        const gm::Dtype &        dtype  = gm::dtype(type);
        if (n_embd == 0) n_embd = dtype.block;
        if (width == 0) width = n_embd;
        gm::row_size(dtype, n_embd);
        const gm::Support support = gm::converts_rows(device, dtype) ? gm::Support{ true, true } : gm::device_ggml_ops(device, dtype, n_embd, width);
        *capture                  = support.capture;
        *read                     = support.read;
    });
}

gm_status gm_device_converts(int32_t index, int32_t type, bool * converts) {
    return gm::guard([&] { gm::required(converts, "converts") = gm::converts_rows(gm::device_at(index), gm::dtype(type)); });
}
