#include "rows_device.h"

#include "device.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

namespace gm {

static constexpr int kGraphNodes = 64;

uint64_t DeviceRows::staging_bytes(int64_t width, int64_t cap) {
    const uint64_t rows = uint64_t(staged_rows(width, cap));
    // The staging rows, and at most three temporaries of that size in a graph that replaces values; slots and indices.
    return 4 * rows * uint64_t(width) * sizeof(float) + rows * (sizeof(int64_t) + 2 * sizeof(int32_t)) + 4096;
}

ggml_backend_buffer_ptr take_staging(ggml_backend_dev_t device, uint64_t bytes) {
    ggml_backend_buffer_ptr buffer(ggml_backend_buft_alloc_buffer(ggml_backend_dev_buffer_type(device), bytes));
    if (!buffer) {
        const uint64_t free = device_memory_free(device);
        throw error(GM_ERR_MEMORY, "rows cross to or from device %s through %llu bytes of staging, for which it has no room (%llu free)",
                    ggml_backend_dev_name(device), (unsigned long long) bytes, (unsigned long long) free).bytes(bytes, free);
    }
    return buffer;
}

RowSource RowSource::skip(int64_t rows) const {
    RowSource rest = *this;
    if (host) rest.host = reinterpret_cast<const float *>(reinterpret_cast<const char *>(host) + uint64_t(rows) * stride);
    rest.skipped += rows;
    return rest;
}

// [1, n]: how many values of each row are within +-limit; NaN is not. Exact up to 2^24 values a row.
static ggml_tensor * count_within(ggml_context * ctx, ggml_tensor * magnitude, float limit) {
    const float next = std::nextafter(limit, INFINITY);
    return ggml_sum_rows(ctx, ggml_step(ctx, ggml_scale_bias(ctx, magnitude, -1.0f, next)));
}

// [1, n]: how many are above the limit; infinity is, NaN is not.
static ggml_tensor * count_above(ggml_context * ctx, ggml_tensor * magnitude, float limit) {
    return ggml_sum_rows(ctx, ggml_step(ctx, ggml_scale_bias(ctx, magnitude, 0.5f, -0.5f * limit)));
}

// The rule for values that the dtype cannot hold. A clamp makes some finite value of NaN; |NaN| + 1 is not above 0, so it is then
// multiplied by 0, and everything else by 1, which keeps signed zeros.
static ggml_tensor * replace(ggml_context * ctx, ggml_tensor * x, float limit) {
    ggml_tensor * is_number = ggml_step(ctx, ggml_scale_bias(ctx, ggml_abs(ctx, x), 1.0f, 1.0f));
    return ggml_mul(ctx, ggml_clamp(ctx, x, -limit, limit), is_number);
}

bool DeviceRows::check_ops_supported(ggml_context * ctx, ggml_tensor * x, const std::function<bool(ggml_tensor *)> & has) {
    // step, scale, abs, sum_rows, then mul and clamp: each chain's ops follow on in src[0].
    ggml_tensor * replaced = replace(ctx, x, 1.0f);
    for (ggml_tensor * op : { count_within(ctx, ggml_abs(ctx, x), 1.0f), replaced, replaced->src[1] }) {
        for (; op->op != GGML_OP_NONE; op = op->src[0]) {
            if (!has(op)) return false;
        }
    }
    return true;
}

DeviceRows::DeviceRows(ggml_backend_dev_t device, const Dtype & dtype, ggml_tensor * ring, int32_t taps, int n_threads)
    : device_(device), dtype_(dtype), ring_(ring), taps_(taps), chunk_(staged_rows(ring->ne[0], ring->ne[1])) {
    const Support support = device_ggml_ops(device, dtype, ring->ne[0] / taps, ring->ne[0]);
    if (!support.capture || !support.read) {
        throw error(GM_ERR_UNSUPPORTED, "device %s cannot %s %s rows of %d x %lld with its ggml ops; `ggml-mirror doctor` lists the dtypes that it can hold",
                    ggml_backend_dev_name(device), support.capture ? "read" : "capture", dtype.name, taps, (long long) (ring->ne[0] / taps));
    }
    backend_ = start_backend(device, n_threads);
    ctx_.reset(ggml_init({ 2 * ggml_tensor_overhead(), nullptr, true }));
    slots_   = ggml_new_tensor_1d(ctx_.get(), GGML_TYPE_I64, chunk_);
    indices_ = ggml_new_tensor_1d(ctx_.get(), GGML_TYPE_I32, chunk_);
    buffer_.reset(ggml_backend_alloc_ctx_tensors(ctx_.get(), backend_.get()));
    if (!buffer_) {
        const uint64_t bytes = uint64_t(chunk_) * (sizeof(int64_t) + sizeof(int32_t));
        throw error(GM_ERR_MEMORY, "device %s has no room for the numbers of %lld slots", ggml_backend_dev_name(device), (long long) chunk_)
            .bytes(bytes, device_memory_free(device));
    }
    staging_ctx_.reset(ggml_init({ ggml_tensor_overhead(), nullptr, true }));
    rows_ = ggml_new_tensor_2d(staging_ctx_.get(), GGML_TYPE_F32, ring->ne[0], chunk_);
    allocr_.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend_.get())));
}

void DeviceRows::take_rows() {
    if (staging_) return;
    staging_ = take_staging(device_, ggml_backend_buft_get_alloc_size(ggml_backend_dev_buffer_type(device_), rows_));
    if (ggml_backend_tensor_alloc(staging_.get(), rows_, ggml_backend_buffer_get_base(staging_.get())) != GGML_STATUS_SUCCESS) {
        throw error(GM_ERR_BACKEND, "device %s cannot place rows in its staging", ggml_backend_dev_name(device_));
    }
}

void DeviceRows::compute(ggml_cgraph * graph) {
    if (!ggml_gallocr_alloc_graph(allocr_.get(), graph)) {
        throw error(GM_ERR_MEMORY, "device %s has no room for the temporaries of a row conversion", ggml_backend_dev_name(device_));
    }
    const ggml_status status = ggml_backend_graph_compute(backend_.get(), graph);
    if (status != GGML_STATUS_SUCCESS) {
        throw error(GM_ERR_BACKEND, "device %s failed to convert rows: %s", ggml_backend_dev_name(device_), ggml_status_to_string(status));
    }
}

// A tensor that stands for data which is already there, without the graph that made it.
static ggml_tensor * leaf(ggml_context * ctx, int64_t width, int64_t count, uint64_t stride, void * data, ggml_backend_buffer_t buffer) {
    ggml_tensor * t = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, width, count);
    t->nb[1] = stride;
    t->nb[2] = t->nb[3] = stride * uint64_t(count);
    t->data   = data;
    t->buffer = buffer;
    return t;
}

// Room in staging for rows of this width.
ggml_tensor * DeviceRows::staged(ggml_context * ctx, int64_t width, int64_t count) {
    take_rows();
    return leaf(ctx, width, count, uint64_t(width) * sizeof(float), rows_->data, rows_->buffer);
}

// The source rows as a tensor that this device can compute on; copied to staging only if they lie elsewhere.
ggml_tensor * DeviceRows::source_leaf(ggml_context * ctx, const RowSource & source, int64_t width, int64_t count, Bus & bus) {
    const uint64_t row       = uint64_t(width) * sizeof(float);
    const bool     host_ring = ggml_backend_buffer_is_host(ring_->buffer);
    const float *  host      = source.host;
    uint64_t       stride    = source.stride;
    if (source.tensor) {
        const ggml_tensor *         t      = source.tensor;
        const ggml_backend_buffer_t buffer = buffer_of(t);
        char *                      data   = static_cast<char *>(t->data) + uint64_t(source.skipped) * t->nb[1];
        const bool same_device = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(buffer)) == device_;
        if (same_device && !ggml_backend_buffer_is_host(buffer)) return leaf(ctx, width, count, t->nb[1], data, buffer);
        if (!ggml_backend_buffer_is_host(buffer)) {
            // Another device: one copy of the whole run into staging, by the devices themselves where they can.
            ggml_tensor * from = leaf(ctx, width, count, t->nb[1], data, buffer);
            ggml_tensor * to   = staged(ctx, width, count);
            if (t->nb[1] == row) {
                ggml_backend_tensor_copy(from, to);
            } else {
                std::vector<float> packed(size_t(width * count));
                ggml_backend_tensor_get_2d(from, packed.data(), 0, row, size_t(count), t->nb[1], row);
                ggml_backend_tensor_set(to, packed.data(), 0, row * uint64_t(count));
                bus.to_host(row * uint64_t(count));
                bus.to_device(row * uint64_t(count));
            }
            return to;
        }
        host   = reinterpret_cast<const float *>(data);
        stride = t->nb[1];
    }
    void * data = const_cast<float *>(host);
    if (host_ring) return leaf(ctx, width, count, stride, data, ring_->buffer);
    ggml_tensor * to = staged(ctx, width, count);
    if (stride == row) {
        ggml_backend_tensor_set(to, data, 0, row * uint64_t(count));
    } else {
        ggml_backend_tensor_set_2d(to, data, 0, row, size_t(count), row, stride);
    }
    bus.to_device(row * uint64_t(count));
    return to;
}

// counts: [1, taps * rows], a row's taps side by side. Sums per tap.
static std::vector<int64_t> per_tap(const ggml_tensor * counts, int32_t taps) {
    std::vector<float> values(size_t(ggml_nelements(counts)));
    ggml_backend_tensor_get(counts, values.data(), 0, ggml_nbytes(counts));
    std::vector<int64_t> sums(size_t(taps), 0);
    for (size_t i = 0; i < values.size(); ++i) sums[i % size_t(taps)] += int64_t(values[i]);
    return sums;
}

void DeviceRows::write_chunk(int32_t tap, int64_t start, int64_t count, const RowSource & source, Tally * tallies, Bus & bus) {
    const int64_t        n_embd = ring_->ne[0] / taps_;
    const int32_t        n_taps = tap < 0 ? taps_ : 1;
    const int64_t        width  = n_embd * n_taps;
    const uint64_t       offset = tap < 0 ? 0 : uint64_t(tap) * ggml_row_size(dtype_.type, n_embd);
    std::vector<int64_t> slots(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) slots[size_t(i)] = (start + i) % ring_->ne[1];
    ggml_backend_tensor_set(slots_, slots.data(), 0, slots.size() * sizeof(int64_t));

    ggml_context_ptr ctx(ggml_init({ kGraphNodes * ggml_tensor_overhead() + 3 * ggml_graph_overhead_custom(kGraphNodes, false), nullptr, true }));
    ggml_tensor * x = source_leaf(ctx.get(), source, width, count, bus);

    // [n_embd, n_taps * count]: counts come per tap.
    const auto by_tap = [&](ggml_tensor * t) {
        return ggml_reshape_2d(ctx.get(), ggml_is_contiguous(t) ? t : ggml_cont(ctx.get(), t), n_embd, n_taps * count);
    };
    const int64_t n     = n_embd * count;
    const float   safe  = std::min(dtype_.limit, 65504.0f);
    ggml_tensor * check = count_within(ctx.get(), ggml_abs(ctx.get(), by_tap(x)), safe);
    ggml_set_output(check);
    ggml_cgraph * graph = ggml_new_graph_custom(ctx.get(), kGraphNodes, false);
    ggml_build_forward_expand(graph, check);
    compute(graph);
    const auto good  = per_tap(check, n_taps);
    const bool clean = std::all_of(good.begin(), good.end(), [&](int64_t g) { return g == n; });

    bool replaced = false;
    if (!clean) {
        graph = ggml_new_graph_custom(ctx.get(), kGraphNodes, false);
        ggml_tensor * magnitude = ggml_abs(ctx.get(), by_tap(x));
        ggml_tensor * counts[]  = { count_above(ctx.get(), magnitude, FLT_MAX), count_above(ctx.get(), magnitude, dtype_.limit),
                                    count_above(ctx.get(), magnitude, 65504.0f), count_within(ctx.get(), magnitude, dtype_.limit) };
        for (ggml_tensor * t : counts) {
            ggml_set_output(t);
            ggml_build_forward_expand(graph, t);
        }
        compute(graph);
        const auto inf = per_tap(counts[0], n_taps), above = per_tap(counts[1], n_taps), above_f16 = per_tap(counts[2], n_taps),
                   within = per_tap(counts[3], n_taps);
        for (size_t t = 0; t < size_t(n_taps); ++t) {
            tallies[t].inf += inf[t];
            tallies[t].overflow += above[t] - inf[t];
            tallies[t].over_f16 += above_f16[t] - inf[t];
            tallies[t].nan += n - above[t] - within[t];
            replaced |= within[t] != n;
        }
    }

    graph = ggml_new_graph_custom(ctx.get(), kGraphNodes, false);
    if (replaced) x = ggml_reshape_2d(ctx.get(), replace(ctx.get(), by_tap(x), dtype_.limit), width, count);
    ggml_tensor * view  = ggml_view_2d(ctx.get(), ring_, width, ring_->ne[1], ring_->nb[1], offset);
    ggml_tensor * where = ggml_view_1d(ctx.get(), slots_, count, 0);
    ggml_build_forward_expand(graph, ggml_set_rows(ctx.get(), view, x, where));
    compute(graph);
}

void DeviceRows::write(int32_t tap, int64_t start, int64_t count, const RowSource & source, Tally * tallies, Bus & bus) {
    for (int32_t t = 0; t < (tap < 0 ? taps_ : 1); ++t) tallies[t].abs_max = NAN;  // ggml has no op for it
    for (int64_t i = 0; i < count; i += chunk_) {
        write_chunk(tap, start + i, std::min(chunk_, count - i), source.skip(i), tallies, bus);
    }
}

void DeviceRows::read_chunk(int64_t start, int64_t count, void * data, ggml_backend_buffer_t buffer) {
    std::vector<int32_t> indices(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) indices[size_t(i)] = int32_t((start + i) % ring_->ne[1]);
    ggml_backend_tensor_set(indices_, indices.data(), 0, indices.size() * sizeof(int32_t));
    ggml_context_ptr ctx(ggml_init({ 8 * ggml_tensor_overhead() + ggml_graph_overhead_custom(8, false), nullptr, true }));
    ggml_tensor * rows = ggml_get_rows(ctx.get(), ring_, ggml_view_1d(ctx.get(), indices_, count, 0));
    rows->data   = data;  // the op writes straight to where the rows are wanted
    rows->buffer = buffer;
    ggml_cgraph * graph = ggml_new_graph_custom(ctx.get(), 8, false);
    ggml_build_forward_expand(graph, rows);
    compute(graph);
}

void DeviceRows::read_tensor(int64_t start, int64_t count, const ggml_tensor * rows, ggml_backend_buffer_t buffer) {
    for (int64_t i = 0; i < count; i += chunk_) {
        char * data = static_cast<char *>(rows->data) + uint64_t(i) * uint64_t(ring_->ne[0]) * sizeof(float);
        read_chunk(start + i, std::min(chunk_, count - i), data, buffer);
    }
}

void DeviceRows::read_host(int64_t start, int64_t count, float * rows, Bus & bus) {
    const int64_t width = ring_->ne[0];
    for (int64_t i = 0; i < count; i += chunk_) {
        const int64_t n     = std::min(chunk_, count - i);
        const size_t  bytes = size_t(n) * size_t(width) * sizeof(float);
        if (ggml_backend_buffer_is_host(ring_->buffer)) {
            read_chunk(start + i, n, rows + i * width, ring_->buffer);
        } else {
            take_rows();
            read_chunk(start + i, n, rows_->data, rows_->buffer);
            ggml_backend_tensor_get(rows_, rows + i * width, 0, bytes);
            bus.to_host(bytes);
        }
    }
}

} // namespace gm
