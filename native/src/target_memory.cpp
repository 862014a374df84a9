// What llama.cpp itself says a context takes. Its own function for that is C++ and not in an installed header (llama-ext.h, "staging"),
// so it is declared here, and its address comes from whoever has opened libllama.
#include "device.h"
#include "error.h"

#include <cstdio>
#include <map>

namespace {

struct MemoryBreakdown {  // llama_memory_breakdown_data
    size_t model, context, compute;
};

using Breakdown = std::map<ggml_backend_buffer_type_t, MemoryBreakdown> (*)(const void * context);

ggml_backend_dev_t cpu() { return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU); }

// Page-locked host memory belongs to a GPU by its type, and to the host by what it takes.
ggml_backend_dev_t device_taken_from(ggml_backend_buffer_type_t buft) {
    const auto device = ggml_backend_buft_get_device(buft);
    return !device || ggml_backend_buft_is_host(buft) ? cpu() : device;
}

// As llama_model::load_tensors decides it.
bool is_mappable(ggml_backend_buffer_type_t buft) {
    const auto             owner  = ggml_backend_buft_get_device(buft);
    const auto             device = owner ? owner : cpu();
    ggml_backend_dev_props props{};
    ggml_backend_dev_get_props(device, &props);
    return props.caps.buffer_from_host_ptr && buft == ggml_backend_dev_buffer_type(device);
}

} // namespace

gm_status gm_target_memory(const void * breakdown, const void * context, int32_t max, gm_target_bytes * entries, int32_t * count) {
    return gm::guard([&] {
        gm::required(breakdown ? count : nullptr, breakdown ? "count" : "breakdown") = 0;
        if (!context) throw gm::error(GM_ERR_ARGUMENT, "context must not be NULL");
        const auto ask = reinterpret_cast<Breakdown>(const_cast<void *>(breakdown));
        for (const auto & [buft, bytes] : ask(context)) {
            if (bytes.model + bytes.context + bytes.compute == 0) continue;
            if ((*count)++ >= max) continue;
            gm_target_bytes & out = (&gm::required(entries, "entries"))[*count - 1];
            out                   = {};
            out.device            = gm::device_index(device_taken_from(buft));
            out.mappable          = is_mappable(buft);
            snprintf(out.buffer, sizeof(out.buffer), "%s", ggml_backend_buft_name(buft));
            out.weights = bytes.model;
            out.context = bytes.context;
            out.compute = bytes.compute;
        }
    });
}

gm_status gm_device_index(const void * device, int32_t * index) {
    return gm::guard([&] {
        gm::required(index, "index") = gm::device_index(static_cast<ggml_backend_dev_t>(const_cast<void *>(device)));
    });
}
