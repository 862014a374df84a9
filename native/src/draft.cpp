#include "draft.h"

#include "stopwatch.h"

#include <algorithm>
#include <cmath>
#include <cstring>

using gm::device_of;
using gm::error;
using gm::start_backend;
using gm::Stopwatch;

namespace {

constexpr int64_t kProjectRows = 256;  // rows per projection graph; a GPU takes as long for half of them
constexpr int64_t kKvStep      = 256;  // attention spans begin and grow by this much, so that graphs are reused between steps

const gm_draft_params & checked(const gm_draft_params & p) {
    const auto within = [](int64_t value, int64_t low, int64_t high, const char * name) {
        if (value < low || value > high) {
            throw error(GM_ERR_ARGUMENT, "draft: %s is %lld; %lld to %lld is possible", name, (long long) value, (long long) low, (long long) high);
        }
    };
    within(p.n_layer, 1, 64, "n_layer");
    within(p.n_embd, 1, 1 << 20, "n_embd");
    within(p.n_embd_target, 1, 1 << 20, "n_embd of the target");
    within(p.n_taps, 1, 64, "n_taps");
    within(p.n_head, 1, 4096, "n_head");
    within(p.n_head_kv, 1, p.n_head, "n_head_kv");
    within(p.head_dim, 2, 4096, "head_dim");
    within(p.n_rot, 2, p.head_dim, "n_rot");
    within(p.block_size, 2, 64, "block_size");
    within(p.n_vocab, 1, 1 << 26, "n_vocab");
    within(p.mask_token, 0, p.n_vocab - 1, "mask_token");
    within(p.window, 1, int64_t(1) << 30, "window");
    within(p.n_ctx, 0, int64_t(1) << 31, "n_ctx");
    const auto number = [](float value, float low, const char * name) {
        if (!std::isfinite(value) || value < low) throw error(GM_ERR_ARGUMENT, "draft: %s is %g; a number from %g is possible", name, double(value), double(low));
    };
    number(p.rms_eps, 0.0f, "rms_eps");
    number(p.rope_base, 1.0f, "rope_base");
    number(p.rope_scale, 0.0f, "rope_scale");
    within(p.n_swa, 0, INT32_MAX, "n_swa");
    if (p.n_rot % 2) throw error(GM_ERR_ARGUMENT, "draft: n_rot is %d; rotation takes pairs of values", p.n_rot);
    const ggml_type_traits * kv = p.kv_type >= 0 && p.kv_type < GGML_TYPE_COUNT ? ggml_get_type_traits(ggml_type(p.kv_type)) : nullptr;
    if (!kv || kv->blck_size < 1 || !kv->to_float || p.head_dim % kv->blck_size) {
        throw error(GM_ERR_DTYPE, "draft: keys and values of %d a head cannot be kept as type %s", p.head_dim, kv ? kv->type_name : "unknown");
    }
    if (p.n_head % p.n_head_kv) throw error(GM_ERR_ARGUMENT, "draft: %d heads do not share %d key heads evenly", p.n_head, p.n_head_kv);
    return p;
}

int64_t round_down(int64_t n) { return n / kKvStep * kKvStep; }
int64_t round_up(int64_t n) { return round_down(n + kKvStep - 1); }

// Keys and values lie in the order of their positions: attention sums them as in a cache that never wrapped. The window, the block
// and what lies before the window in its first kKvStep slots have room; the rest is slack. When it is used up, the window's rows move
// to the front, more than an eighth of the window further: at most 9 rows are copied for each that was filled. A context that is
// shorter than that has all its positions in one place.
int64_t within_context(const gm_draft_params & p, int64_t slots) { return p.n_ctx ? std::min(slots, round_up(p.n_ctx)) : slots; }
int64_t slots_for(const gm_draft_params & p) { return within_context(p, round_up(p.window + p.block_size + kKvStep - 1 + p.window / 8)); }

// What attention reads at most: the window, the block, and what lies before the window in its first kKvStep slots.
int64_t most_span(const gm_draft_params & p) { return within_context(p, round_up(p.window + p.block_size + kKvStep - 1)); }

bool on_host(const ggml_tensor * t) {
    return ggml_backend_buffer_is_host(gm::buffer_of(t));
}

void set(ggml_tensor * t, const void * data) {
    ggml_backend_tensor_set(t, data, 0, ggml_nbytes(t));
}

template <class Body> void for_tensors(const gm::Context & ctx, Body && body) {
    for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); t; t = ggml_get_next_tensor(ctx.get(), t)) body(t);
}

} // namespace

// ------------------------------------------------------------------------------------------------ memory

gm_draft::gm_draft(const gm_draft_params & params, Only) : params_(checked(params)), kv_slots_(slots_for(params)) {
    main_.device = gm::device_at(params_.device);
    weights_     = gm::DraftWeights::lay_out(params_);
    tok_embd_    = weights_.tok_embd ? weights_.tok_embd : params_.tok_embd;
    output_      = weights_.output ? weights_.output : params_.output;
}

gm_draft_bytes gm_draft::size_of(const gm_draft_params & params) {
    gm_draft draft(params, Only::sizes);
    // Matrices of a target that is not there are as good as any on the draft's device: only their results take scratch.
    draft.stand_in_ctx_ = gm::Context(2 * ggml_tensor_overhead());
    const auto stand_in = [&] { return ggml_new_tensor_2d(draft.stand_in_ctx_.get(), GGML_TYPE_F16, params.n_embd, params.n_vocab); };
    if (!draft.tok_embd_) draft.tok_embd_ = stand_in();
    if (!draft.output_) draft.output_ = stand_in();
    draft.lay_out();
    return draft.total_size();
}

gm_draft::gm_draft(const gm_draft_params & params) : gm_draft(params, Only::sizes) {
    if (!tok_embd_ || !output_) throw error(GM_ERR_ARGUMENT, "the draft has no %s of its own and the target's was not found", tok_embd_ ? "output matrix" : "token embedding");
    lay_out();
    allocate();
}

// Tensors of keys and values, and what all will take; still without memory.
void gm_draft::lay_out() {
    for (const ggml_tensor * t : { tok_embd_, output_ }) {
        if (t->ne[0] != params_.n_embd) {
            throw error(GM_ERR_WIDTH, "%s is %lld wide, the draft's hidden state %d", t->name, (long long) t->ne[0], params_.n_embd);
        }
    }
    const int64_t n_output = weights_.target_token.empty() ? params_.n_vocab : int64_t(weights_.target_token.size());
    if (tok_embd_->ne[1] < params_.n_vocab || output_->ne[1] != n_output) {
        throw error(GM_ERR_WIDTH, "%s has %lld rows and %s %lld; a vocabulary of %d was expected", tok_embd_->name, (long long) tok_embd_->ne[1],
                    output_->name, (long long) output_->ne[1], params_.n_vocab);
    }
    if (tok_embd_ == params_.tok_embd && device_of(tok_embd_) != main_.device) {
        if (!on_host(tok_embd_)) {
            throw error(GM_ERR_UNSUPPORTED, "%s lies on %s, which is neither the draft's device nor host memory", tok_embd_->name,
                        ggml_backend_dev_name(device_of(tok_embd_)));
        }
        embedding_here_ = false;
        if (tok_embd_->type != GGML_TYPE_F32 && !ggml_get_type_traits(tok_embd_->type)->to_float) {
            throw error(GM_ERR_UNSUPPORTED, "%s is %s, which ggml does not convert to F32", tok_embd_->name, ggml_type_name(tok_embd_->type));
        }
    }
    if (output_ == params_.output && device_of(output_) != main_.device) head_.device = device_of(output_);

    kv_ctx_ = gm::Context(size_t(2 * params_.n_layer + 1) * ggml_tensor_overhead());
    for (int32_t il = 0; il < params_.n_layer; ++il) {
        const int64_t width = int64_t(params_.n_head_kv) * params_.head_dim;
        const auto    type  = ggml_type(params_.kv_type);
        kv_.push_back({ ggml_new_tensor_2d(kv_ctx_.get(), type, width, kv_slots_), ggml_new_tensor_2d(kv_ctx_.get(), type, width, kv_slots_) });
    }
    logits_ctx_ = gm::Context(ggml_tensor_overhead());
    logits_     = ggml_new_tensor_2d(logits_ctx_.get(), GGML_TYPE_F32, output_->ne[1], params_.block_size);

    mask_ctx_ = gm::Context(2 * ggml_tensor_overhead());
    const auto mask = [&] { return ggml_new_tensor_1d(mask_ctx_.get(), GGML_TYPE_F16, most_span(params_) * params_.block_size); };
    if (swa_layers() != all_layers()) mask_ = mask();
    if (swa_layers()) mask_swa_ = mask();

    const auto     buft   = ggml_backend_dev_buffer_type(main_.device);
    const uint64_t logits = ggml_backend_alloc_ctx_tensors_from_buft_size(logits_ctx_.get(), ggml_backend_dev_buffer_type(last().device));
    size_.weights   = ggml_backend_alloc_ctx_tensors_from_buft_size(weights_.ctx.get(), buft);
    size_.kv        = ggml_backend_alloc_ctx_tensors_from_buft_size(kv_ctx_.get(), buft);

    // Scratch is measured around tensors that have their memory: for that it is enough that they seem to.
    const auto seem = [&](void * data) {
        for (const auto * ctx : { &weights_.ctx, &kv_ctx_, &logits_ctx_, &mask_ctx_, &stand_in_ctx_ }) {
            if (ctx->get()) for_tensors(*ctx, [&](ggml_tensor * t) { t->data = data; });
        }
    };
    const auto scratch = [](const Graph & g, ggml_backend_dev_t device) {
        ggml_gallocr_ptr allocr(ggml_gallocr_new(ggml_backend_dev_buffer_type(device)));
        size_t           size = 0;
        ggml_gallocr_reserve_n_size(allocr.get(), g.graph, nullptr, nullptr, &size);
        return uint64_t(size);
    };
    seem(this);
    size_.compute = std::max(scratch(build_project(most_project_rows()), main_.device),
                             scratch(build_block(params_.block_size, most_span(params_)), main_.device));
    if (params_.fused_rows) {
        size_.compute = std::max({ size_.compute, scratch(build_fuse(GM_FUSE_ROWS, true), main_.device), scratch(build_fuse(params_.block_size, false), main_.device) });
    }
    if (head_.device) head_size_ = scratch(build_head(params_.block_size), head_.device);
    seem(nullptr);
    (head_.device ? head_size_ : size_.compute) += logits;
    size_.compute += ggml_backend_alloc_ctx_tensors_from_buft_size(mask_ctx_.get(), buft);
}

void gm_draft::allocate() {
    const uint64_t need = size_.weights + size_.kv + size_.compute, free = gm::device_memory_free(main_.device);
    const auto     too_big = [&](const char * why) {
        return error(GM_ERR_MEMORY, "the draft needs %llu bytes (weights %llu, keys and values %llu for window %lld, scratch %llu) on %s, which has %llu free%s",
                     (unsigned long long) need, (unsigned long long) size_.weights, (unsigned long long) size_.kv, (long long) params_.window,
                     (unsigned long long) size_.compute, ggml_backend_dev_name(main_.device), (unsigned long long) free, why).bytes(need, free);
    };
    if (need > free) throw too_big("");
    if (!weights_.load(main_.device)) throw too_big(", but its allocator refused the weights");
    kv_buffer_.reset(ggml_backend_alloc_ctx_tensors_from_buft(kv_ctx_.get(), ggml_backend_dev_buffer_type(main_.device)));
    if (!kv_buffer_) throw too_big(", but its allocator refused the keys and values");
    // A masked slot still enters sums with weight 0: it must hold no NaN.
    ggml_backend_buffer_clear(kv_buffer_.get(), 0);
    versions_.resize(size_t(kv_slots_));
    logits_buffer_.reset(ggml_backend_alloc_ctx_tensors_from_buft(logits_ctx_.get(), ggml_backend_dev_buffer_type(last().device)));
    if (!logits_buffer_) throw too_big(", but its allocator refused the logits");
    mask_buffer_.reset(ggml_backend_alloc_ctx_tensors_from_buft(mask_ctx_.get(), ggml_backend_dev_buffer_type(main_.device)));
    if (!mask_buffer_) throw too_big(", but its allocator refused the masks");

    for (Place * p : { &main_, &head_ }) {
        if (!p->device) continue;
        p->backend = start_backend(p->device, params_.n_threads);
        p->allocr.reset(ggml_gallocr_new(ggml_backend_dev_buffer_type(p->device)));
    }
    // The largest graphs now: what the device lacks shows here, memory or operations, and not in the middle of a text.
    if (params_.fused_rows) {
        fuse_graph(GM_FUSE_ROWS);
        Graph read = build_fuse(params_.block_size, false);
        place(read, main_);
    }
    project_graph(most_project_rows());
    block_graph(params_.block_size, most_span(params_));
    if (head_.device) head_graph(params_.block_size);
}

gm_draft_bytes gm_draft::total_size() const { return { size_.weights, size_.kv, size_.compute + head_size_ }; }

gm_draft_bytes gm_draft::bytes() const {
    const auto scratch = [](const Place & p) { return p.allocr ? ggml_gallocr_get_buffer_size(p.allocr.get(), 0) : 0; };
    return { ggml_backend_buffer_get_size(weights_.buffer.get()), ggml_backend_buffer_get_size(kv_buffer_.get()),
             scratch(main_) + scratch(head_) + ggml_backend_buffer_get_size(logits_buffer_.get()) + ggml_backend_buffer_get_size(mask_buffer_.get()) };
}

int64_t gm_draft::most_project_rows() const { return std::min(kProjectRows, params_.window); }

// Gives a graph's tensors the place's memory, unless they have it.
void gm_draft::place(Graph & g, Place & p) {
    if (p.holds == g.id) return;
    for (ggml_tensor * t : g.own) {
        t->data   = nullptr;
        t->buffer = nullptr;
        t->extra  = nullptr;
    }
    for (ggml_tensor * t : g.views) t->buffer = nullptr;
    p.holds = 0;
    if (!ggml_gallocr_alloc_graph(p.allocr.get(), g.graph)) {
        const uint64_t need = &p == &head_ ? head_size_ : size_.compute, free = gm::device_memory_free(p.device);
        throw error(GM_ERR_MEMORY, "device %s refused %llu bytes of scratch for the draft; it has %llu free", ggml_backend_dev_name(p.device),
                    (unsigned long long) need, (unsigned long long) free).bytes(need, free);
    }
    p.holds = g.id;
}

void gm_draft::compute(const Graph & g, const Place & p) {
    const ggml_status status = ggml_backend_graph_compute(p.backend.get(), g.graph);
    if (status != GGML_STATUS_SUCCESS) {
        throw error(GM_ERR_BACKEND, "device %s failed to run the draft: %s", ggml_backend_dev_name(p.device), ggml_status_to_string(status));
    }
}

// -------------------------------------------------------------------------------------------------- step

// Slots for positions start..end-1, of which those from n_past on are the block's; rows that are still good are kept.
void gm_draft::make_room(int64_t start, int64_t n_past, int64_t end) {
    if (start >= first_ && end - first_ <= kv_slots_) return;
    Stopwatch             watch(times.project_ns);
    const int64_t         shift = round_down(start) - first_;
    std::vector<uint64_t> kept;
    if (shift > 0 && shift < kv_slots_) {
        kept.assign(versions_.begin() + shift, versions_.begin() + std::clamp<int64_t>(n_past - first_, shift, kv_slots_));
        while (!kept.empty() && kept.back() == 0) kept.pop_back();
    }
    const int64_t held_from = held_from_, held_to = held_to_;
    first_ += shift;
    std::fill(versions_.begin(), versions_.end(), 0);
    held_to_ = held_from_;
    if (kept.empty()) return;
    Graph move = build_move(shift, int64_t(kept.size()));
    place(move, main_);
    compute(move, main_);
    std::copy(kept.begin(), kept.end(), versions_.begin());
    held_from_ = std::max(held_from, first_);
    held_to_   = std::max(held_to, held_from_);
    times.rows_moved += int64_t(kept.size());
}

// Where the attention of a block graph begins to read.
void gm_draft::place_span(const Graph & g, int64_t slot) {
    for (ggml_tensor * t : g.spans) {
        t->view_offs = size_t(slot) * t->nb[1];
        t->data      = static_cast<char *>(t->view_src->data) + t->view_offs;
    }
}

void gm_draft::project(gm_mirror & mirror, int64_t start, int64_t count, const gm::Ring::Version * versions) {
    Graph   direct;
    Graph * g     = nullptr;
    void *  lies  = mirror.device() == main_.device ? mirror.in_place(start, count) : nullptr;
    if (lies && count > params_.block_size) {
        // A long stretch of an F32 ring is used where it lies.
        direct = build_project(count, lies, mirror.buffer());
        place(direct, main_);
        g = &direct;
    } else {
        Stopwatch watch(times.read_ns);
        g = &project_graph(count);
        mirror.read_tensor(start, count, *g->rows);
    }
    Stopwatch            watch(times.project_ns);
    std::vector<int32_t> positions(static_cast<size_t>(count));
    std::vector<int64_t> slots(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) {
        positions[size_t(i)] = int32_t(start + i);
        slots[size_t(i)]     = start + i - first_;
    }
    const auto held = versions_.begin() + (start - first_);
    std::fill_n(held, count, 0);
    set(g->positions, positions.data());
    set(g->slots, slots.data());
    compute(*g, main_);
    std::transform(versions, versions + count, held, [](const gm::Ring::Version & v) { return v.version; });
    times.rows_projected += count;
}

// Projects the rows of the range whose keys are missing, or of an older version of the row.
void gm_draft::project_changed(gm_mirror & mirror, int64_t start, int64_t count) {
    // What is held is asked for changes only; so a step's work does not grow with its context.
    const int64_t end = start + count, from = std::clamp(held_from_, start, end), to = std::clamp(held_to_, from, end);
    changed_.clear();
    // Versions are taken before rows are read: a row that is rewritten meanwhile is projected again at the next step.
    const uint64_t seen = mirror.changed(start, from - start, 0, changed_);
    mirror.changed(from, to - from, seen_, changed_);
    mirror.changed(to, end - to, 0, changed_);
    times.rows_checked += int64_t(changed_.size());
    const auto fresh = [&](const gm::Ring::Version & v) { return v.version != 0 && versions_[size_t(v.position - first_)] == v.version; };
    for (size_t i = 0, n; i < changed_.size(); i += n) {
        n = 1;
        if (fresh(changed_[i])) continue;
        const auto next = [&](size_t k) { return changed_[k].position == changed_[i].position + int64_t(k - i); };
        while (n < size_t(kProjectRows) && i + n < changed_.size() && next(i + n) && !fresh(changed_[i + n])) ++n;
        project(mirror, changed_[i].position, int64_t(n), &changed_[i]);
    }
    held_from_ = start;
    held_to_   = end;
    seen_      = seen;
}

void gm_draft::require_rows(gm_mirror & mirror, bool fused) const {
    const int32_t taps = fused ? 1 : params_.n_taps, n_embd = fused ? params_.n_embd : params_.n_embd_target;
    if (mirror.taps() != taps || mirror.n_embd() != n_embd) {
        throw error(GM_ERR_WIDTH, "the draft reads %s rows of %d x %d, the mirror holds %d x %lld", fused ? "fused" : "raw", taps, n_embd, mirror.taps(),
                    (long long) mirror.n_embd());
    }
}

void gm_draft::fuse(gm_mirror & raw, int64_t start, int64_t count, gm_mirror & fused) {
    require_rows(raw, false);
    require_rows(fused, true);
    if (!params_.fused_rows) throw error(GM_ERR_ARGUMENT, "this draft was made for raw rows");
    for (int64_t done = 0, n; done < count; done += n) {
        const int64_t first = start + done;
        // F32 rows are multiplied where they lie, up to the ring's end. Others are read, a block at a time: room for more would only be kept for them.
        n = std::min({ int64_t(GM_FUSE_ROWS), count - done, raw.cap() - first % raw.cap() });
        Graph   read;
        Graph * g    = nullptr;
        void *  lies = raw.device() == main_.device ? raw.in_place(first, n) : nullptr;
        if (lies) {
            g               = &fuse_graph(n);
            g->rows->data   = lies;
            g->rows->buffer = raw.buffer();
        } else {
            Stopwatch watch(times.read_ns);
            n    = std::min<int64_t>(params_.block_size, count - done);
            read = build_fuse(n, false);
            place(read, main_);
            raw.read_tensor(first, n, *read.rows);
            g = &read;
        }
        Stopwatch watch(times.fuse_ns);
        compute(*g, main_);
        gm::RowSource source;
        source.tensor = g->fused;
        fused.write(0, first, n, source);
    }
}

// The first position that token i of the block sees. The last is the block's own, or its end: inside the block all see all.
int64_t gm_draft::first_seen(bool swa, const Sight & sight, int64_t i) const {
    return swa ? std::max(sight.start, sight.n_past + i - params_.n_swa + 1) : sight.start;
}

// Columns of positions from..to-1.
void gm_draft::fill_mask(ggml_tensor * mask, bool swa, const Sight & now, int64_t from, int64_t to) {
    if (from >= to) return;
    const uint16_t open = 0, shut = ggml_fp32_to_fp16(-INFINITY);
    const int64_t  width = to - from;
    mask_data_.assign(size_t(width * now.n), shut);
    for (int64_t i = 0; i < now.n; ++i) {
        const int64_t first = std::max(first_seen(swa, now, i), from), end = std::min(now.n_past + (params_.causal ? i + 1 : now.n), to);
        if (first < end) std::fill_n(mask_data_.begin() + i * width + (first - from), end - first, open);
    }
    const size_t cell = sizeof(uint16_t);
    ggml_backend_tensor_set_2d(mask, mask_data_.data(), size_t(from - now.span) * cell, size_t(width) * cell, size_t(now.n), mask->nb[1], size_t(width) * cell);
    times.mask_cells += width * now.n;
}

void gm_draft::fill_masks(const Graph & g, const Sight & now) {
    const Sight was = drawn_;
    drawn_          = {};  // until all is written
    for (ggml_tensor * mask : { g.mask, g.mask_swa }) {
        if (!mask) continue;
        const bool swa = mask == g.mask_swa;
        if (!now.same_shape(was)) {
            fill_mask(mask, swa, now, now.span, now.span + now.n_kv);
            continue;
        }
        // Where the first position that a token sees lies, was or will be; and where the last does.
        const auto [low, high] = std::minmax({ first_seen(swa, was, 0), first_seen(swa, now, 0), first_seen(swa, was, was.n - 1), first_seen(swa, now, now.n - 1) });
        const int64_t ends = std::min(was.n_past, now.n_past), end = std::max(was.n_past, now.n_past) + now.n;
        fill_mask(mask, swa, now, low, std::min(high, ends));
        fill_mask(mask, swa, now, ends, end);
    }
    drawn_ = now;
}

void gm_draft::set_embeddings(ggml_tensor * embeddings, const std::vector<int32_t> & tokens) {
    // ggml's own conversion, for there are types of weights that no mirror can store.
    const auto         to_float = ggml_get_type_traits(tok_embd_->type)->to_float;
    std::vector<float> rows(tokens.size() * size_t(params_.n_embd));
    for (size_t i = 0; i < tokens.size(); ++i) {
        const char * row = static_cast<const char *>(tok_embd_->data) + size_t(tokens[i]) * tok_embd_->nb[1];
        float *      out = rows.data() + i * size_t(params_.n_embd);
        if (to_float) {
            to_float(row, out, params_.n_embd);
        } else {
            memcpy(out, row, size_t(params_.n_embd) * sizeof(float));
        }
    }
    set(embeddings, rows.data());
}

int64_t gm_draft::step(gm_mirror & mirror, int64_t n_past, int32_t last_token, int32_t n_tokens, int32_t * tokens) {
    const int64_t n = int64_t(n_tokens) + 1;
    if (n_tokens < 1 || n > params_.block_size) {
        throw error(GM_ERR_ARGUMENT, "%d tokens cannot be drafted; this draft's block gives 1 to %d", n_tokens, params_.block_size - 1);
    }
    if (last_token < 0 || last_token >= params_.n_vocab) throw error(GM_ERR_ARGUMENT, "token %d is not in a vocabulary of %d", last_token, params_.n_vocab);
    if (n_past < 0 || n_past > INT32_MAX - n) throw error(GM_ERR_ARGUMENT, "position %lld is out of range", (long long) n_past);
    if (params_.n_ctx && n_past + n > params_.n_ctx) {
        throw error(GM_ERR_ARGUMENT, "a block of %lld at position %lld ends beyond the context of %lld", (long long) n, (long long) n_past, (long long) params_.n_ctx);
    }
    require_rows(mirror, params_.fused_rows);
    last_logits_ = nullptr;
    if (source_ != mirror.id() || !params_.keep_kv) {
        std::fill(versions_.begin(), versions_.end(), 0);
        held_to_ = held_from_;
    }
    source_ = mirror.id();

    const int64_t context = mirror.stretch_before(n_past, params_.window);
    const int64_t start   = n_past - context;
    const int64_t end     = n_past + n;
    make_room(start, n_past, end);
    project_changed(mirror, start, context);

    Stopwatch            watch(times.block_ns);
    const int64_t        span = round_down(start);
    const int64_t        n_kv = round_up(end - span);
    Graph &              g    = block_graph(n, n_kv);
    std::vector<int32_t> block(size_t(n), params_.mask_token), positions(static_cast<size_t>(n));
    std::vector<int64_t> slots(static_cast<size_t>(n));
    block[0] = last_token;
    for (int64_t i = 0; i < n; ++i) {
        positions[size_t(i)] = int32_t(n_past + i);
        slots[size_t(i)]     = n_past + i - first_;
        versions_[size_t(slots[size_t(i)])] = 0;  // noise is nobody's context
    }
    held_to_ = std::min(held_to_, n_past);
    if (g.tokens) set(g.tokens, block.data());
    if (g.embeddings) set_embeddings(g.embeddings, block);
    set(g.positions, positions.data());
    set(g.slots, slots.data());
    place_span(g, span - first_);
    fill_masks(g, { n, n_kv, span, start, n_past });
    compute(g, main_);

    Graph * head = &g;
    if (head_.device) {
        head = &head_graph(n);
        ggml_backend_tensor_copy(g.hidden, head->hidden);
        compute(*head, head_);
    }
    std::vector<int32_t> best(static_cast<size_t>(n));
    ggml_backend_tensor_get(head->argmax, best.data(), 0, best.size() * sizeof(int32_t));
    for (int64_t i = 1; i < n; ++i) {
        // Some backends find no largest logit where none is a number.
        if (best[size_t(i)] < 0 || best[size_t(i)] >= output_->ne[1]) throw error(GM_ERR_BACKEND, "the draft's logits are not numbers");
        tokens[i - 1] = weights_.target_token.empty() ? best[size_t(i)] : int32_t(weights_.target_token[size_t(best[size_t(i)])]);
    }
    last_logits_ = head->logits;
    times.steps += 1;
    return context;
}

void gm_draft::logits(int64_t n_values, float * out) {
    if (!last_logits_) throw error(GM_ERR_ARGUMENT, "there was no draft step whose logits could be read");
    const int64_t n = last_logits_->ne[1], n_vocab = params_.n_vocab;
    if (n_values != n * n_vocab) {
        throw error(GM_ERR_ARGUMENT, "the last step gave %lld logits, not %lld", (long long) (n * n_vocab), (long long) n_values);
    }
    if (weights_.target_token.empty()) {
        ggml_backend_tensor_get(last_logits_, out, 0, ggml_nbytes(last_logits_));
        return;
    }
    // A reduced vocabulary: the target's tokens that the draft cannot propose have no probability.
    std::vector<float> own(static_cast<size_t>(ggml_nelements(last_logits_)));
    ggml_backend_tensor_get(last_logits_, own.data(), 0, ggml_nbytes(last_logits_));
    std::fill(out, out + n_values, -INFINITY);
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t t = 0; t < last_logits_->ne[0]; ++t) out[i * n_vocab + weights_.target_token[size_t(t)]] = own[size_t(i * last_logits_->ne[0] + t)];
    }
}

// ------------------------------------------------------------------------------------------------- C ABI

gm_status gm_draft_size_of(const gm_draft_params * params, gm_draft_bytes * bytes) {
    return gm::guard([&] { gm::required(bytes, "bytes") = gm_draft::size_of(gm::required(params, "params")); });
}

gm_status gm_draft_new(const gm_draft_params * params, gm_draft ** out) {
    return gm::guard([&] {
        gm_draft *& made = gm::required(out, "out");
        made             = new gm_draft(gm::required(params, "params"));
    });
}

void gm_draft_free(gm_draft * draft) {
    delete draft;
}

gm_status gm_draft_step(gm_draft * draft, gm_mirror * mirror, int64_t n_past, int32_t last_token, int32_t n_tokens, int32_t * tokens, int64_t * n_context) {
    return gm::guard([&] {
        int64_t & context = gm::required(n_context, "n_context");
        context           = gm::required(draft, "draft").step(gm::required(mirror, "mirror"), n_past, last_token, n_tokens, &gm::required(tokens, "tokens"));
    });
}

gm_status gm_draft_logits(gm_draft * draft, int64_t n_values, float * logits) {
    return gm::guard([&] { gm::required(draft, "draft").logits(n_values, &gm::required(logits, "logits")); });
}

gm_status gm_draft_fuse(gm_draft * draft, gm_mirror * raw, int64_t start, int64_t count, gm_mirror * fused) {
    return gm::guard([&] {
        gm::required(draft, "draft").fuse(gm::required(raw, "raw"), start, count, gm::required(fused, "fused"));
    });
}

gm_status gm_draft_get_bytes(gm_draft * draft, gm_draft_bytes * bytes) {
    return gm::guard([&] { gm::required(bytes, "bytes") = gm::required(draft, "draft").bytes(); });
}

gm_status gm_draft_get_times(gm_draft * draft, gm_draft_times * times) {
    return gm::guard([&] { gm::required(times, "times") = gm::required(draft, "draft").times; });
}

gm_status gm_draft_reset_times(gm_draft * draft) {
    return gm::guard([&] { gm::required(draft, "draft").times = gm_draft_times{}; });
}
