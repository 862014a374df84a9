#include "mirror.h"

#include "device.h"
#include "rows_device.h"
#include "rows_kernels.h"
#include "stopwatch.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <new>

using gm::error;
using gm::Stopwatch;

namespace {

constexpr int64_t kMaxPosition = int64_t(1) << 62;

std::atomic<uint64_t> mirrors_made{ 0 };

const gm_mirror_params & checked(const gm_mirror_params & p) {
    if (p.taps < 1 || p.taps > 64) throw error(GM_ERR_ARGUMENT, "taps is %d; a mirror has 1 to 64", p.taps);
    if (p.n_embd < 1) throw error(GM_ERR_WIDTH, "n_embd is %lld; it must be positive", (long long) p.n_embd);
    if (p.cap < 1 || p.cap > INT32_MAX) {
        throw error(GM_ERR_ARGUMENT, "cap is %lld; a mirror has 1 to %d slots", (long long) p.cap, INT32_MAX);
    }
    if (p.n_threads < 0) throw error(GM_ERR_ARGUMENT, "n_threads is %d; it must be positive, or 0 for all cores", p.n_threads);
    return p;
}

} // namespace

gm_mirror_size gm_mirror::size_of(const gm_mirror_params & params) {
    const gm_mirror_params & p     = checked(params);
    const gm::Dtype &        dtype = gm::dtype(p.type);
    const uint64_t           tap   = gm::row_size(dtype, p.n_embd);
    gm_mirror_size           size{};
    // tap <= 2^43, taps <= 2^6, cap < 2^31: only the last product can pass 64 bits.
    size.row = tap * uint64_t(p.taps);
    if (size.row > UINT64_MAX / 4 / uint64_t(p.cap)) {
        throw error(GM_ERR_ARGUMENT, "%lld slots of %llu bytes are beyond any memory", (long long) p.cap, (unsigned long long) size.row);
    }
    size.ring = size.row * uint64_t(p.cap);
    const auto    device = gm::device_at(p.device);
    const int64_t width  = p.n_embd * p.taps;
    if (p.ggml_ops || (!gm::device_is_host(device) && !gm::has_row_kernels(device, dtype))) {
        size.staging = gm::DeviceRows::staging_bytes(width, p.cap);
    } else if (gm::has_row_kernels(device, dtype)) {
        size.staging = gm::row_kernels_staging_bytes(width, p.cap);
    }
    size.bookkeeping = gm::Ring::bytes(p.cap);
    size.pinned      = gm::PinnedPool::most_for(device, size.ring);
    return size;
}

gm_mirror::gm_mirror(const gm_mirror_params & params)
    : params_(checked(params)), id_(++mirrors_made), dtype_(gm::dtype(params.type)), row_bytes_(size_of(params).row), device_(gm::device_at(params.device)),
      slots_(0, params.taps), threads_(params.n_threads), stats_(size_t(params.taps)), pinned_(device_, size_of(params).ring) {
    const gm_mirror_size size = size_of(params_);
    const bool           host = gm::device_is_host(device_);
    const uint64_t       free = gm::device_memory_free(device_);
    const uint64_t       need = size.ring + size.staging + (host ? size.bookkeeping : 0);
    const auto           too_big = [&](const char * why) {
        return error(GM_ERR_MEMORY, "%lld rows of %llu bytes (%s) need %llu bytes on %s, which has %llu free%s", (long long) params_.cap,
                     (unsigned long long) size.row, dtype_.name, (unsigned long long) need, ggml_backend_dev_name(device_),
                     (unsigned long long) free, why).bytes(need, free);
    };
    if (need > free) throw too_big("");
    try {
        slots_ = gm::Ring(params_.cap, params_.taps);
    } catch (const std::bad_alloc &) {
        throw too_big(", but host memory for its slots was refused");
    }

    const auto buft = ggml_backend_dev_buffer_type(device_);
    ctx_.reset(ggml_init({ ggml_tensor_overhead(), nullptr, true }));
    ring_ = ggml_new_tensor_2d(ctx_.get(), dtype_.type, width(), params_.cap);
    ggml_set_name(ring_, "feature_mirror");
    const size_t bytes = ggml_backend_buft_get_alloc_size(buft, ring_);
    if (bytes > ggml_backend_buft_get_max_size(buft)) throw too_big(", but no buffer of that size");
    buffer_.reset(ggml_backend_buft_alloc_buffer(buft, bytes));
    if (!buffer_) throw too_big(", but its allocator refused");
    if (ggml_backend_tensor_alloc(buffer_.get(), ring_, ggml_backend_buffer_get_base(buffer_.get())) != GGML_STATUS_SUCCESS) {
        throw error(GM_ERR_BACKEND, "device %s cannot place the ring in its buffer", ggml_backend_dev_name(device_));
    }
    if (!params_.ggml_ops && gm::has_row_kernels(device_, dtype_)) {
        rows_ = gm::make_row_kernels(device_, dtype_, ring_, params_.taps);
    } else if (!host || params_.ggml_ops) {
        rows_ = std::make_unique<gm::DeviceRows>(device_, dtype_, ring_, params_.taps, threads_.n_threads());
    }
    reset_stats();
}

void gm_mirror::check_range(int64_t start, int64_t count) const {
    if (start < 0 || count < 0 || start > kMaxPosition || count > kMaxPosition - start) {
        throw error(GM_ERR_ARGUMENT, "start %lld and count %lld are out of range; positions are 0 to 2^62", (long long) start, (long long) count);
    }
}

// ------------------------------------------------------------------------------------ the one write path

void gm_mirror::write(int32_t tap, int64_t start, int64_t count, const gm::RowSource & source) {
    write_sources(tap, start, count, 1, &source);
}

void gm_mirror::write_taps(int64_t start, int64_t count, const gm::RowSource * sources) {
    write_sources(-1, start, count, params_.taps, sources);
}

// One source of a tap (tap >= 0) or of whole rows, or one for each tap.
void gm_mirror::write_sources(int32_t tap, int64_t start, int64_t count, int32_t n_sources, const gm::RowSource * sources) {
    check_range(start, count);
    if (tap < -1 || tap >= params_.taps) {
        throw error(GM_ERR_ARGUMENT, "tap %d is out of range; this mirror has taps 0 to %d", tap, params_.taps - 1).tap(tap);
    }
    std::lock_guard<std::mutex> lock(mutex_);
    Stopwatch                   watch(times_.write_ns);
    const int64_t               dropped = std::max<int64_t>(count - params_.cap, 0);  // a prefill longer than the ring keeps its tail
    const int64_t               kept    = count - dropped;
    const int64_t               first   = start + dropped;
    const uint64_t              taps    = tap < 0 ? slots_.all_taps() : uint64_t(1) << tap;
    std::vector<gm::Tally>      tallies(size_t(params_.taps));

    std::vector<gm::RowSource>  rest(sources, sources + n_sources);
    for (gm::RowSource & source : rest) source = source.skip(dropped);

    try {
        if (rows_ && n_sources > 1) {
            rows_->write_taps(first, kept, n_sources, rest.data(), tallies.data(), bus_);
        } else if (rows_) {
            rows_->write(tap, first, kept, rest[0], &tallies[size_t(std::max(tap, 0))], bus_);
        } else {
            for (int32_t i = 0; i < n_sources; ++i) write_host(n_sources > 1 ? i : tap, first, kept, rest[size_t(i)], tallies);
        }
        // A device is at work on the rows meanwhile.
        slots_.begin_write(first, kept, taps);
        slots_.end_write(first, kept, taps);
        if (rows_) rows_->finish();
    } catch (...) {
        slots_.begin_write(first, kept, taps);  // nobody knows what was stored
        try {
            if (rows_) rows_->finish();  // the source is the caller's again
        } catch (...) {
        }
        throw;
    }

    for (int32_t t = 0; t < params_.taps; ++t) {
        if (tap >= 0 && t != tap) continue;
        stats_[size_t(t)].values += kept * params_.n_embd;
        add_to_stats(t, tallies[size_t(t)]);
    }
    times_.write_calls += 1;
    written_slices_ += kept * (tap < 0 ? params_.taps : 1);
    times_.write_rows = written_slices_ / params_.taps;
}

void gm_mirror::write_host(int32_t tap, int64_t start, int64_t count, const gm::RowSource & source, std::vector<gm::Tally> & tallies) {
    const int32_t first_tap = tap < 0 ? 0 : tap;
    const int32_t n_taps    = tap < 0 ? params_.taps : 1;
    const char *  rows      = reinterpret_cast<const char *>(source.host);
    uint64_t      stride    = source.stride;
    std::vector<float> fetched;
    if (source.tensor) {
        const ggml_tensor & t = *source.tensor;
        stride                = t.nb[1];
        rows                  = static_cast<const char *>(t.data) + uint64_t(source.skipped) * stride;
        if (!ggml_backend_buffer_is_host(gm::buffer_of(&t))) {
            // The target's tap lies on another device: its rows cross once, together.
            const uint64_t row = uint64_t(n_taps) * uint64_t(params_.n_embd) * sizeof(float);
            fetched.resize(size_t(count) * row / sizeof(float));
            ggml_backend_tensor_get_2d(&t, fetched.data(), uint64_t(source.skipped) * stride, row, size_t(count), stride, row);
            bus_.to_host(row * uint64_t(count));
            rows   = reinterpret_cast<const char *>(fetched.data());
            stride = row;
        }
    }
    std::mutex merge;
    for (const gm::Run & run : slots_.runs(start, count)) {
        const uint64_t bytes = uint64_t(run.count) * uint64_t(n_taps) * uint64_t(params_.n_embd) * sizeof(float);
        threads_.run(run.count, bytes, [&](int64_t from, int64_t to) {
            gm::Tally mine[64];
            for (int64_t i = from; i < to; ++i) {
                const float * x = reinterpret_cast<const float *>(rows + uint64_t(run.offset + i) * stride);
                char *        y = host_row(run.slot + i) + uint64_t(first_tap) * tap_bytes();
                for (int32_t t = 0; t < n_taps; ++t) {
                    gm::quantize_checked(dtype_, x + t * params_.n_embd, y + uint64_t(t) * tap_bytes(), params_.n_embd, mine[t]);
                }
            }
            std::lock_guard<std::mutex> lock(merge);
            for (int32_t t = 0; t < n_taps; ++t) tallies[size_t(first_tap + t)].add(mine[t]);
        });
    }
}

// ------------------------------------------------------------------------------------- the one read path

void gm_mirror::read_rows(int64_t start, int64_t count, float * rows) {
    for (const gm::Run & run : slots_.runs(start, count)) {
        // Rows of a run are contiguous on both sides, and a row is a whole number of blocks.
        threads_.run(run.count, uint64_t(run.count) * uint64_t(width()) * sizeof(float), [&](int64_t from, int64_t to) {
            dtype_.to_float(host_row(run.slot + from), rows + (run.offset + from) * width(), (to - from) * width());
        });
    }
}

void gm_mirror::read(int64_t start, int64_t count, float * rows) {
    check_range(start, count);
    std::lock_guard<std::mutex> lock(mutex_);
    Stopwatch watch(times_.read_ns);
    slots_.require(start, count);
    if (rows_) {
        rows_->read_host(start, count, rows, bus_);
    } else {
        read_rows(start, count, rows);
    }
    times_.read_calls += 1;
    times_.read_rows += count;
}

void gm_mirror::read_tensor(int64_t start, int64_t count, const ggml_tensor & rows) {
    check_range(start, count);
    const auto buffer = gm::buffer_of(&rows);
    if (rows.type != GGML_TYPE_F32 || !ggml_is_contiguous(&rows) || rows.ne[0] != width() || ggml_nrows(&rows) < count || !rows.data || !buffer) {
        throw error(GM_ERR_WIDTH, "rows must be an allocated, contiguous F32 tensor [%lld, >= %lld]; this is %s [%lld, %lld]", (long long) width(),
                    (long long) count, ggml_type_name(rows.type), (long long) rows.ne[0], (long long) ggml_nrows(&rows));
    }
    const bool host      = ggml_backend_buffer_is_host(buffer);
    const auto of_buffer = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(buffer));
    if (host != ggml_backend_buffer_is_host(ring_->buffer) || (!host && of_buffer != device_)) {
        throw error(GM_ERR_DEVICE, "rows must be on the mirror's device %s, not on %s", ggml_backend_dev_name(device_), ggml_backend_buffer_name(buffer));
    }
    std::lock_guard<std::mutex> lock(mutex_);
    Stopwatch watch(times_.read_ns);
    slots_.require(start, count);
    if (rows_) {
        rows_->read_tensor(start, count, &rows, buffer);
    } else {
        read_rows(start, count, static_cast<float *>(rows.data));
    }
    times_.read_calls += 1;
    times_.read_rows += count;
}

const float * gm_mirror::view(int64_t start, int64_t count) {
    check_range(start, count);
    std::lock_guard<std::mutex> lock(mutex_);
    slots_.require(start, count);
    if (dtype_.type != GGML_TYPE_F32) throw error(GM_ERR_VIEW, "a %s ring cannot be used in place, only f32; read the rows instead", dtype_.name);
    if (!ggml_backend_buffer_is_host(ring_->buffer)) {
        throw error(GM_ERR_VIEW, "the ring is on %s, not in host memory; read the rows instead", ggml_backend_dev_name(device_));
    }
    if (slots_.runs(start, count).n > 1) {
        throw error(GM_ERR_VIEW, "positions %lld..%lld wrap around the ring's end (cap %lld); read the rows instead", (long long) start,
                    (long long) (start + count - 1), (long long) params_.cap);
    }
    return reinterpret_cast<const float *>(host_row(slots_.slot(start)));
}

int64_t gm_mirror::stretch_before(int64_t end, int64_t max) {
    std::lock_guard<std::mutex> lock(mutex_);
    return slots_.stretch_before(end, max);
}

uint64_t gm_mirror::changed(int64_t start, int64_t count, uint64_t since, std::vector<gm::Ring::Version> & out) {
    std::lock_guard<std::mutex> lock(mutex_);
    slots_.changed(start, count, since, out);
    return slots_.version();
}

uint64_t gm_mirror::exchanged() {
    std::lock_guard<std::mutex> lock(mutex_);
    return exchanged_;
}

void * gm_mirror::in_place(int64_t start, int64_t count) {
    check_range(start, count);
    std::lock_guard<std::mutex> lock(mutex_);
    slots_.require(start, count);
    return dtype_.type == GGML_TYPE_F32 && slots_.runs(start, count).n == 1 ? host_row(slots_.slot(start)) : nullptr;
}

// ---------------------------------------------------------------------------------- validity, save, load

void gm_mirror::truncate(int64_t from) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (from < 0) throw error(GM_ERR_ARGUMENT, "cannot truncate to %lld; positions start at 0", (long long) from);
    slots_.truncate(from);
}

void gm_mirror::clear() {
    std::lock_guard<std::mutex> lock(mutex_);
    ++exchanged_;
    slots_.clear();
}

int64_t gm_mirror::live(bool complete_only, int64_t max, int64_t * positions, uint64_t * tap_masks) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (max <= 0) return slots_.count_live(complete_only);
    const auto                  live = slots_.live(complete_only);
    for (int64_t i = 0; i < std::min<int64_t>(max, int64_t(live.size())); ++i) {
        if (positions) positions[i] = live[size_t(i)].position;
        if (tap_masks) tap_masks[i] = live[size_t(i)].taps;
    }
    return int64_t(live.size());
}

// Runs body(slot, row, n) for stretches of rows that lie in neighbouring slots: for a range, two at most.
template <class Body> static void for_stretches(const gm::Ring & slots, int64_t count, const int64_t * positions, Body && body) {
    for (int64_t i = 0, n; i < count; i += n) {
        const int64_t slot = slots.slot(positions[i]);
        for (n = 1; i + n < count && slot + n < slots.cap() && slots.slot(positions[i + n]) == slot + n;) ++n;
        body(slot, i, n);
    }
}

std::unique_ptr<gm_host_rows> gm_mirror::host_rows(uint64_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!pinned_.pool() || bytes == 0) return nullptr;
    auto memory = pinned_.pool()->take(bytes, gm::PinnedPool::Use::Array, unpinned_);
    return memory ? std::unique_ptr<gm_host_rows>(new gm_host_rows{ pinned_.pool(), std::move(memory) }) : nullptr;
}

// Pinned memory between the device and rows that are not in any; null: they are, or there is none.
std::unique_ptr<gm_host_rows> gm_mirror::staging_for(const uint8_t * rows, uint64_t bytes) {
    if (!pinned_.pool() || pinned_.pool()->holds(rows, bytes)) return nullptr;
    auto memory = pinned_.pool()->take(bytes, gm::PinnedPool::Use::Staging, unpinned_);
    return memory ? std::unique_ptr<gm_host_rows>(new gm_host_rows{ pinned_.pool(), std::move(memory) }) : nullptr;
}

void gm_mirror::copy_bytes(uint64_t bytes, const uint8_t * from, uint8_t * to) {
    constexpr uint64_t piece = 1 << 20;
    threads_.run(int64_t((bytes + piece - 1) / piece), bytes, [&](int64_t first, int64_t last) {
        const uint64_t begin = uint64_t(first) * piece, end = std::min(uint64_t(last) * piece, bytes);
        memcpy(to + begin, from + begin, end - begin);
    });
}

static uint8_t * base_of(const gm_host_rows & rows) {
    return static_cast<uint8_t *>(ggml_backend_buffer_get_base(rows.memory.get()));
}

void gm_mirror::save(int64_t count, const int64_t * positions, uint8_t * rows) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (int64_t i = 0; i < count; ++i) {
        if (positions[i] < 0 || !slots_.taps_at(positions[i])) {
            throw error(GM_ERR_STALE, "cannot save position %lld: it is not in the ring", (long long) positions[i]).at(positions[i]);
        }
    }
    const uint64_t  bytes   = uint64_t(count) * row_bytes_;
    const auto      staging = staging_for(rows, bytes);
    uint8_t * const out     = staging ? base_of(*staging) : rows;
    const bool      pinned  = pinned_.pool() && pinned_.pool()->holds(out, bytes);
    for_stretches(slots_, count, positions, [&](int64_t slot, int64_t row, int64_t n) {
        ggml_backend_tensor_get(ring_, out + uint64_t(row) * row_bytes_, uint64_t(slot) * row_bytes_, uint64_t(n) * row_bytes_);
        transfers_.save_copies += 1;
        transfers_.pinned_copies += pinned;
    });
    if (!ggml_backend_buffer_is_host(buffer())) bus_.to_host(bytes);
    if (staging) copy_bytes(bytes, out, rows);
    for (int64_t i = 0; i < count; ++i) {
        const uint64_t written = slots_.taps_at(positions[i]);
        for (int32_t t = 0; written != slots_.all_taps() && t < params_.taps; ++t) {
            // Old bytes of a slot are nobody's business, and equal mirrors must give equal snapshots.
            if (!(written >> t & 1)) memset(rows + uint64_t(i) * row_bytes_ + uint64_t(t) * tap_bytes(), 0, tap_bytes());
        }
    }
    transfers_.save_calls += 1;
    transfers_.save_bytes += int64_t(bytes);
}

void gm_mirror::load(int64_t count, const int64_t * positions, const uint64_t * tap_masks, const uint8_t * rows) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (count > params_.cap) {
        throw error(GM_ERR_ARGUMENT, "%lld rows do not fit into %lld slots", (long long) count, (long long) params_.cap);
    }
    std::vector<bool> taken(size_t(params_.cap));
    for (int64_t i = 0; i < count; ++i) {
        if (positions[i] < 0 || positions[i] >= kMaxPosition) {
            throw error(GM_ERR_ARGUMENT, "row %lld has position %lld, out of range", (long long) i, (long long) positions[i]).at(positions[i]);
        }
        if (tap_masks[i] == 0 || (tap_masks[i] & ~slots_.all_taps())) {
            throw error(GM_ERR_ARGUMENT, "position %lld has tap mask %llu; this mirror has %d taps", (long long) positions[i],
                        (unsigned long long) tap_masks[i], params_.taps).at(positions[i]);
        }
        const size_t slot = size_t(slots_.slot(positions[i]));
        if (taken[slot]) {
            throw error(GM_ERR_ARGUMENT, "position %lld and an earlier one share a slot of %lld", (long long) positions[i], (long long) params_.cap)
                .at(positions[i]);
        }
        taken[slot] = true;
    }
    const uint64_t bytes   = uint64_t(count) * row_bytes_;
    const auto     staging = staging_for(rows, bytes);
    if (staging) copy_bytes(bytes, rows, base_of(*staging));
    const uint8_t * const in     = staging ? base_of(*staging) : rows;
    const bool            pinned = pinned_.pool() && pinned_.pool()->holds(in, bytes);

    ++exchanged_;
    slots_.clear();
    for_stretches(slots_, count, positions, [&](int64_t slot, int64_t row, int64_t n) {
        ggml_backend_tensor_set(ring_, in + uint64_t(row) * row_bytes_, uint64_t(slot) * row_bytes_, uint64_t(n) * row_bytes_);
        transfers_.load_copies += 1;
        transfers_.pinned_copies += pinned;
    });
    if (!ggml_backend_buffer_is_host(buffer())) bus_.to_device(bytes);
    for (int64_t i = 0, n; i < count; i += n) {
        for (n = 1; i + n < count && positions[i + n] == positions[i] + n && tap_masks[i + n] == tap_masks[i];) ++n;
        slots_.begin_write(positions[i], n, tap_masks[i]);
        slots_.end_write(positions[i], n, tap_masks[i]);
    }
    transfers_.load_calls += 1;
    transfers_.load_bytes += int64_t(bytes);
}

gm_mirror_transfers gm_mirror::transfers() {
    std::lock_guard<std::mutex> lock(mutex_);
    gm_mirror_transfers         out = transfers_;
    if (pinned_.pool()) out.pinned_bytes = pinned_.pool()->held();
    snprintf(out.unpinned, sizeof(out.unpinned), "%s", unpinned_.c_str());
    return out;
}

// --------------------------------------------------------------------------------------------- statistics

void gm_mirror::add_to_stats(int32_t tap, const gm::Tally & tally) {
    gm_tap_stats & s = stats_[size_t(tap)];
    s.nan += tally.nan;
    s.inf += tally.inf;
    s.overflow += tally.overflow;
    s.over_f16 += tally.over_f16;
    s.abs_max = std::isnan(tally.abs_max) || std::isnan(s.abs_max) ? NAN : std::max(s.abs_max, tally.abs_max);
}

// Kernels count on their device; what they counted is fetched when someone asks.
void gm_mirror::collect() {
    if (!rows_) return;
    std::vector<gm::Tally> tallies(size_t(params_.taps));
    rows_->collect(tallies.data());
    for (int32_t t = 0; t < params_.taps; ++t) add_to_stats(t, tallies[size_t(t)]);
}

gm_tap_stats gm_mirror::tap_stats(int32_t tap) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (tap < 0 || tap >= params_.taps) {
        throw error(GM_ERR_ARGUMENT, "tap %d is out of range; this mirror has taps 0 to %d", tap, params_.taps - 1).tap(tap);
    }
    collect();
    return stats_[size_t(tap)];
}

gm_mirror_times gm_mirror::times() {
    std::lock_guard<std::mutex> lock(mutex_);
    return times_;
}

gm_bus_bytes gm_mirror::bus() {
    std::lock_guard<std::mutex> lock(mutex_);
    return bus_.bytes();
}

void gm_mirror::reset_stats() {
    std::lock_guard<std::mutex> lock(mutex_);
    collect();
    stats_.assign(size_t(params_.taps), gm_tap_stats{});
    times_          = {};
    transfers_      = {};
    bus_.reset();
    written_slices_ = 0;
}

// ------------------------------------------------------------------------------------------------- C ABI

gm_status gm_mirror_size_of(const gm_mirror_params * params, gm_mirror_size * size) {
    return gm::guard([&] { gm::required(size, "size") = gm_mirror::size_of(gm::required(params, "params")); });
}

gm_status gm_mirror_new(const gm_mirror_params * params, gm_mirror ** out) {
    return gm::guard([&] { gm::required(out, "out") = new gm_mirror(gm::required(params, "params")); });
}

void gm_mirror_free(gm_mirror * mirror) {
    delete mirror;
}

gm_status gm_mirror_write(gm_mirror * mirror, int32_t tap, int64_t start, int64_t count, const float * rows, uint64_t stride) {
    return gm::guard([&] {
        if (count > 0) gm::required(rows, "rows");
        gm::RowSource source;
        source.host   = rows;
        source.stride = stride;
        gm::required(mirror, "mirror").write(tap, start, count, source);
    });
}

// F32 rows, `width` wide, as the write path takes them.
static gm::RowSource tensor_rows(const ggml_tensor & t, int64_t width) {
    // ne[2], ne[3] are folded into rows, which needs them to follow on at the same stride.
    const bool even = t.ne[2] * t.ne[3] == 1 || (t.nb[2] == t.nb[1] * size_t(t.ne[1]) && (t.ne[3] == 1 || t.nb[3] == t.nb[2] * size_t(t.ne[2])));
    if (t.type != GGML_TYPE_F32 || t.ne[0] != width || t.nb[0] != sizeof(float) || !even) {
        throw error(GM_ERR_WIDTH, "rows must be an F32 tensor [%lld, n] of contiguous rows; this is %s [%lld, %lld, %lld, %lld]", (long long) width,
                    ggml_type_name(t.type), (long long) t.ne[0], (long long) t.ne[1], (long long) t.ne[2], (long long) t.ne[3]);
    }
    if (!t.data || !gm::buffer_of(&t)) throw error(GM_ERR_ARGUMENT, "tensor %s holds no data yet", t.name);
    gm::RowSource source;
    source.tensor = &t;
    return source;
}

gm_status gm_mirror_write_tensor(gm_mirror * mirror, int32_t tap, int64_t start, const struct ggml_tensor * rows) {
    return gm::guard([&] {
        gm_mirror &         m = gm::required(mirror, "mirror");
        const ggml_tensor & t = gm::required(rows, "rows");
        m.write(tap, start, ggml_nrows(&t), tensor_rows(t, tap < 0 ? m.taps() * m.n_embd() : m.n_embd()));
    });
}

std::vector<gm::RowSource> gm_mirror::tap_sources(const ggml_tensor * const * rows) const {
    gm::required(rows, "rows");
    std::vector<gm::RowSource> sources;
    for (int32_t tap = 0; tap < taps(); ++tap) {
        const ggml_tensor & t = gm::required(rows[tap], "rows");
        sources.push_back(tensor_rows(t, n_embd()));
        if (ggml_nrows(&t) != ggml_nrows(rows[0])) {
            throw error(GM_ERR_WIDTH, "tap %d has %lld rows, tap 0 has %lld", tap, (long long) ggml_nrows(&t), (long long) ggml_nrows(rows[0])).tap(tap);
        }
    }
    return sources;
}

gm_status gm_mirror_write_taps(gm_mirror * mirror, int64_t start, const struct ggml_tensor * const * rows) {
    return gm::guard([&] {
        gm_mirror & m       = gm::required(mirror, "mirror");
        const auto  sources = m.tap_sources(rows);
        m.write_taps(start, ggml_nrows(rows[0]), sources.data());
    });
}

gm_status gm_mirror_read(gm_mirror * mirror, int64_t start, int64_t count, float * rows) {
    return gm::guard([&] {
        if (count > 0) gm::required(rows, "rows");
        gm::required(mirror, "mirror").read(start, count, rows);
    });
}

gm_status gm_mirror_read_tensor(gm_mirror * mirror, int64_t start, int64_t count, struct ggml_tensor * rows) {
    return gm::guard([&] { gm::required(mirror, "mirror").read_tensor(start, count, gm::required(rows, "rows")); });
}

gm_status gm_mirror_view(gm_mirror * mirror, int64_t start, int64_t count, const float ** rows) {
    return gm::guard([&] { gm::required(rows, "rows") = gm::required(mirror, "mirror").view(start, count); });
}

gm_status gm_mirror_truncate(gm_mirror * mirror, int64_t from) {
    return gm::guard([&] { gm::required(mirror, "mirror").truncate(from); });
}

gm_status gm_mirror_clear(gm_mirror * mirror) {
    return gm::guard([&] { gm::required(mirror, "mirror").clear(); });
}

gm_status gm_mirror_live(gm_mirror * mirror, bool complete_only, int64_t max, int64_t * positions, uint64_t * tap_masks, int64_t * count) {
    return gm::guard([&] { gm::required(count, "count") = gm::required(mirror, "mirror").live(complete_only, max, positions, tap_masks); });
}

gm_status gm_host_rows_new(gm_mirror * mirror, uint64_t bytes, gm_host_rows ** rows, uint8_t ** data) {
    return gm::guard([&] {
        gm_host_rows *& out     = gm::required(rows, "rows");
        uint8_t *&      address = gm::required(data, "data");
        auto            memory  = gm::required(mirror, "mirror").host_rows(bytes);
        address                 = memory ? base_of(*memory) : nullptr;
        out                     = memory.release();
    });
}

gm_status gm_mirror_get_transfers(gm_mirror * mirror, gm_mirror_transfers * transfers) {
    return gm::guard([&] { gm::required(transfers, "transfers") = gm::required(mirror, "mirror").transfers(); });
}

gm_status gm_mirror_save(gm_mirror * mirror, int64_t count, const int64_t * positions, uint8_t * rows) {
    return gm::guard([&] {
        gm_mirror & m = gm::required(mirror, "mirror");
        if (count > 0) m.save(count, &gm::required(positions, "positions"), &gm::required(rows, "rows"));
    });
}

gm_status gm_mirror_load(gm_mirror * mirror, int64_t count, const int64_t * positions, const uint64_t * tap_masks, const uint8_t * rows) {
    return gm::guard([&] {
        gm_mirror & m = gm::required(mirror, "mirror");
        if (count < 0) throw gm::error(GM_ERR_ARGUMENT, "count is %lld", (long long) count);
        if (count == 0) return m.clear();
        m.load(count, &gm::required(positions, "positions"), &gm::required(tap_masks, "tap_masks"), &gm::required(rows, "rows"));
    });
}

gm_status gm_mirror_tap_stats(gm_mirror * mirror, int32_t tap, gm_tap_stats * stats) {
    return gm::guard([&] { gm::required(stats, "stats") = gm::required(mirror, "mirror").tap_stats(tap); });
}

gm_status gm_mirror_get_times(gm_mirror * mirror, gm_mirror_times * times) {
    return gm::guard([&] { gm::required(times, "times") = gm::required(mirror, "mirror").times(); });
}

gm_status gm_mirror_get_bus(gm_mirror * mirror, gm_bus_bytes * bytes) {
    return gm::guard([&] { gm::required(bytes, "bytes") = gm::required(mirror, "mirror").bus(); });
}

gm_bus_bytes gm_bus_total(void) {
    return gm::Bus::total();
}

gm_status gm_mirror_reset_stats(gm_mirror * mirror) {
    return gm::guard([&] { gm::required(mirror, "mirror").reset_stats(); });
}
