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

constexpr int64_t kProjectRows = 256;  // rows per projection graph
constexpr int64_t kKvStep      = 256;  // attention spans begin and grow by this much, so that graphs are reused between steps
constexpr size_t  kBlockGraphs = 8;    // cached, for block sizes and spans in use

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
    const auto number = [](float value, float low, const char * name) {
        if (!std::isfinite(value) || value < low) throw error(GM_ERR_ARGUMENT, "draft: %s is %g; a number from %g is possible", name, double(value), double(low));
    };
    number(p.rms_eps, 0.0f, "rms_eps");
    number(p.rope_base, 1.0f, "rope_base");
    number(p.rope_scale, 0.0f, "rope_scale");
    within(p.n_swa, 0, INT32_MAX, "n_swa");
    if (p.n_rot % 2) throw error(GM_ERR_ARGUMENT, "draft: n_rot is %d; rotation takes pairs of values", p.n_rot);
    if (p.n_head % p.n_head_kv) throw error(GM_ERR_ARGUMENT, "draft: %d heads do not share %d key heads evenly", p.n_head, p.n_head_kv);
    return p;
}

int64_t round_down(int64_t n) { return n / kKvStep * kKvStep; }
int64_t round_up(int64_t n) { return round_down(n + kKvStep - 1); }

// Keys and values lie in the order of their positions: attention sums them as in a cache that never wrapped. The window, the block
// and what lies before the window in its first kKvStep slots have room; the rest is slack. When it is used up, the window's rows move
// to the front, more than an eighth of the window further: at most 9 rows are copied for each that was filled.
int64_t slots_for(const gm_draft_params & p) { return round_up(p.window + p.block_size + kKvStep - 1 + p.window / 8); }

uint64_t kv_bytes(const gm_draft_params & p) {
    return uint64_t(2) * uint64_t(p.n_layer) * ggml_row_size(GGML_TYPE_F16, int64_t(p.n_head_kv) * p.head_dim) * uint64_t(slots_for(p));
}

bool on_host(const ggml_tensor * t) {
    return ggml_backend_buffer_is_host(gm::buffer_of(t));
}

ggml_tensor * input(ggml_tensor * t, const char * name) {
    ggml_set_name(t, name);
    ggml_set_input(t);
    return t;
}

void set(ggml_tensor * t, const void * data) {
    ggml_backend_tensor_set(t, data, 0, ggml_nbytes(t));
}

} // namespace

gm_draft_bytes gm_draft::size_of(const gm_draft_params & params) {
    const gm_draft_params & p = checked(params);
    return { gm::DraftWeights::bytes(p), kv_bytes(p), 0 };
}

gm_draft::gm_draft(const gm_draft_params & params)
    : params_(checked(params)), device_(gm::device_at(params.device)), kv_slots_(slots_for(params)) {
    const gm_draft_bytes need = size_of(params_);
    const uint64_t       free = gm::device_memory_free(device_);
    if (need.weights + need.kv > free) {
        throw error(GM_ERR_MEMORY, "the draft needs %llu bytes of weights and %llu of keys and values (window %lld) on %s, which has %llu free",
                    (unsigned long long) need.weights, (unsigned long long) need.kv, (long long) params_.window, ggml_backend_dev_name(device_),
                    (unsigned long long) free).bytes(need.weights + need.kv, free);
    }
    backend_ = start_backend(device_, params_.n_threads);
    weights_ = gm::DraftWeights::load(params_, device_);

    tok_embd_ = weights_.tok_embd ? weights_.tok_embd : params_.tok_embd;
    output_   = weights_.output ? weights_.output : params_.output;
    if (!tok_embd_ || !output_) throw error(GM_ERR_ARGUMENT, "the draft has no %s of its own and the target's was not found", tok_embd_ ? "output matrix" : "token embedding");
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
    if (device_of(tok_embd_) != device_ && !on_host(tok_embd_)) {
        throw error(GM_ERR_UNSUPPORTED, "%s lies on %s, which is neither the draft's device nor host memory", tok_embd_->name,
                    ggml_backend_dev_name(device_of(tok_embd_)));
    }
    if (device_of(output_) != device_) head_backend_ = start_backend(device_of(output_), params_.n_threads);

    kv_ctx_.reset(ggml_init({ size_t(2 * params_.n_layer + 1) * ggml_tensor_overhead(), nullptr, true }));
    for (int32_t il = 0; il < params_.n_layer; ++il) {
        const int64_t width = int64_t(params_.n_head_kv) * params_.head_dim;
        kv_.push_back({ ggml_new_tensor_2d(kv_ctx_.get(), GGML_TYPE_F16, width, kv_slots_), ggml_new_tensor_2d(kv_ctx_.get(), GGML_TYPE_F16, width, kv_slots_) });
    }
    kv_buffer_.reset(ggml_backend_alloc_ctx_tensors_from_buft(kv_ctx_.get(), ggml_backend_dev_buffer_type(device_)));
    if (!kv_buffer_) {
        throw error(GM_ERR_MEMORY, "device %s has no room for %llu bytes of keys and values; use a smaller draft window than %lld",
                    ggml_backend_dev_name(device_), (unsigned long long) need.kv, (long long) params_.window).bytes(need.kv, gm::device_memory_free(device_));
    }
    // A masked slot still enters sums with weight 0: it must hold no NaN.
    ggml_backend_buffer_clear(kv_buffer_.get(), 0);
    versions_.resize(size_t(kv_slots_));
}

gm_draft_bytes gm_draft::bytes() const {
    gm_draft_bytes b{ 0, ggml_backend_buffer_get_size(kv_buffer_.get()), 0 };
    if (weights_.buffer) b.weights = ggml_backend_buffer_get_size(weights_.buffer.get());
    const auto add = [&](const auto & graphs) {
        for (const auto & [shape, g] : graphs) b.compute += ggml_gallocr_get_buffer_size(g.allocr.get(), 0);
    };
    add(project_graphs_);
    add(block_graphs_);
    add(head_graphs_);
    return b;
}

// ------------------------------------------------------------------------------------------------ graphs

ggml_tensor * gm_draft::norm(ggml_context * ctx, ggml_tensor * x, ggml_tensor * weight) const {
    return ggml_mul(ctx, ggml_rms_norm(ctx, x, params_.rms_eps), weight);
}

ggml_tensor * gm_draft::rope(ggml_context * ctx, ggml_tensor * x, ggml_tensor * positions) const {
    return ggml_rope_ext(ctx, x, positions, weights_.rope_freqs, params_.n_rot, GGML_ROPE_TYPE_NEOX, 0, params_.rope_base, params_.rope_scale, 0.0f,
                         1.0f, 32.0f, 1.0f);
}

// x: [n_embd, n] -> [n_head_kv * head_dim, n]
ggml_tensor * gm_draft::key(ggml_context * ctx, const gm::DraftLayer & l, ggml_tensor * x, ggml_tensor * positions) const {
    ggml_tensor * k = ggml_reshape_3d(ctx, ggml_mul_mat(ctx, l.attn_k, x), params_.head_dim, params_.n_head_kv, x->ne[1]);
    k               = rope(ctx, norm(ctx, k, l.attn_k_norm), positions);
    return ggml_reshape_2d(ctx, k, int64_t(params_.head_dim) * params_.n_head_kv, x->ne[1]);
}

ggml_tensor * gm_draft::value(ggml_context * ctx, const gm::DraftLayer & l, ggml_tensor * x) const {
    if (l.attn_v) return ggml_mul_mat(ctx, l.attn_v, x);
    ggml_tensor * v = ggml_reshape_3d(ctx, ggml_mul_mat(ctx, l.attn_k, x), params_.head_dim, params_.n_head_kv, x->ne[1]);
    return ggml_reshape_2d(ctx, ggml_rms_norm(ctx, v, params_.rms_eps), int64_t(params_.head_dim) * params_.n_head_kv, x->ne[1]);
}

void gm_draft::start(Graph & g, ggml_backend_t backend) {
    g.allocr.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend)));
    if (!ggml_gallocr_alloc_graph(g.allocr.get(), g.graph)) {
        throw error(GM_ERR_MEMORY, "device %s has no room for the draft's graph", ggml_backend_name(backend)).bytes(0, gm::device_memory_free(ggml_backend_get_device(backend)));
    }
    for (int i = 0; i < ggml_graph_n_nodes(g.graph); ++i) {
        ggml_tensor * node = ggml_graph_node(g.graph, i);
        if (!ggml_backend_supports_op(backend, node)) {
            throw error(GM_ERR_UNSUPPORTED, "device %s lacks %s on %s, which the draft needs", ggml_backend_name(backend), ggml_op_name(node->op),
                        ggml_type_name(node->src[0] ? node->src[0]->type : node->type));
        }
    }
}

void gm_draft::compute(const Graph & g, ggml_backend_t backend) {
    const ggml_status status = ggml_backend_graph_compute(backend, g.graph);
    if (status != GGML_STATUS_SUCCESS) throw error(GM_ERR_BACKEND, "device %s failed to run the draft: %s", ggml_backend_name(backend), ggml_status_to_string(status));
}

static size_t nodes_of(int32_t n_layer) { return 64 + size_t(n_layer) * 64; }

static ggml_context_ptr graph_context(size_t nodes, ggml_cgraph ** graph) {
    ggml_context_ptr ctx(ggml_init({ 2 * nodes * ggml_tensor_overhead() + ggml_graph_overhead_custom(nodes, false), nullptr, true }));
    if (!ctx) throw error(GM_ERR_MEMORY, "out of host memory for a graph");
    *graph = ggml_new_graph_custom(ctx.get(), nodes, false);
    return ctx;
}

// Rows -> keys and values of every layer. in_place: where the rows lie in an F32 ring; else they are read into g.rows.
gm_draft::Graph gm_draft::build_project(int64_t n, void * in_place, ggml_backend_buffer_t buffer) {
    Graph g;
    g.ctx              = graph_context(nodes_of(params_.n_layer), &g.graph);
    ggml_context * ctx = g.ctx.get();
    g.rows             = input(ggml_new_tensor_2d(ctx, GGML_TYPE_F32, int64_t(params_.n_taps) * params_.n_embd_target, n), "target_hidden_cat");
    if (in_place) {
        g.rows->data   = in_place;
        g.rows->buffer = buffer;
    }
    g.positions        = input(ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n), "positions");
    g.slots            = input(ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n), "slots");
    ggml_tensor * fused = norm(ctx, ggml_mul_mat(ctx, weights_.fc, g.rows), weights_.hidden_norm);
    for (size_t il = 0; il < weights_.layers.size(); ++il) {
        const gm::DraftLayer & l = weights_.layers[il];
        ggml_build_forward_expand(g.graph, ggml_set_rows(ctx, kv_[il].k, key(ctx, l, fused, g.positions), g.slots));
        ggml_build_forward_expand(g.graph, ggml_set_rows(ctx, kv_[il].v, value(ctx, l, fused), g.slots));
    }
    start(g, backend_.get());
    return g;
}

// Noise block -> hidden states (and tokens, where the output matrix lies on this device), over n_kv slots: see place_span.
gm_draft::Graph gm_draft::build_block(int64_t n, int64_t n_kv) {
    Graph g;
    g.ctx              = graph_context(nodes_of(params_.n_layer), &g.graph);
    ggml_context * ctx = g.ctx.get();
    const int64_t  hd = params_.head_dim, n_head = params_.n_head, n_head_kv = params_.n_head_kv;
    g.positions = input(ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n), "positions");
    g.slots     = input(ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n), "slots");
    // Only the masks that a layer uses: the graph gives no other tensor memory.
    const uint64_t all = ~uint64_t(0) >> (64 - params_.n_layer), swa_layers = params_.n_swa > 0 ? params_.swa_layers & all : 0;
    if (swa_layers != all) g.mask = input(ggml_new_tensor_2d(ctx, GGML_TYPE_F16, n_kv, n), "mask");
    if (swa_layers) g.mask_swa = input(ggml_new_tensor_2d(ctx, GGML_TYPE_F16, n_kv, n), "mask_swa");
    ggml_tensor * x = nullptr;
    if (device_of(tok_embd_) == device_) {
        g.tokens = input(ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n), "tokens");
        x        = ggml_get_rows(ctx, tok_embd_, g.tokens);
    } else {
        x = g.embeddings = input(ggml_new_tensor_2d(ctx, GGML_TYPE_F32, params_.n_embd, n), "embeddings");
    }
    if (params_.embedding_scale != 0.0f) x = ggml_scale(ctx, x, params_.embedding_scale);
    const float kq_scale = params_.attention_scale != 0.0f ? params_.attention_scale : 1.0f / std::sqrt(float(hd));

    for (size_t il = 0; il < weights_.layers.size(); ++il) {
        const gm::DraftLayer & l    = weights_.layers[il];
        const bool             swa  = swa_layers >> il & 1;
        ggml_tensor *          cur  = norm(ctx, x, l.attn_norm);
        ggml_tensor *          q    = ggml_reshape_3d(ctx, ggml_mul_mat(ctx, l.attn_q, cur), hd, n_head, n);
        q                           = rope(ctx, norm(ctx, q, l.attn_q_norm), g.positions);
        // The block's keys go into the slots behind the context's, so attention reads one span.
        ggml_tensor * k = ggml_set_rows(ctx, kv_[il].k, key(ctx, l, cur, g.positions), g.slots);
        ggml_tensor * v = ggml_set_rows(ctx, kv_[il].v, value(ctx, l, cur), g.slots);
        k = ggml_view_3d(ctx, k, hd, n_kv, n_head_kv, k->nb[1], ggml_row_size(k->type, hd), 0);
        v = ggml_view_3d(ctx, v, hd, n_kv, n_head_kv, v->nb[1], ggml_row_size(v->type, hd), 0);
        g.spans.insert(g.spans.end(), { k, v });
        cur = ggml_flash_attn_ext(ctx, ggml_permute(ctx, q, 0, 2, 1, 3), k, v, swa ? g.mask_swa : g.mask, kq_scale, 0.0f, 0.0f);
        if (l.attn_sinks) ggml_flash_attn_ext_add_sinks(cur, l.attn_sinks);
        ggml_prec_set_acc(cur, GGML_PREC_F32);
        cur = ggml_mul_mat(ctx, l.attn_output, ggml_reshape_2d(ctx, cur, hd * n_head, n));
        if (params_.attention_value_scale != 0.0f) cur = ggml_scale(ctx, cur, params_.attention_value_scale);
        if (l.attn_post_norm) cur = norm(ctx, cur, l.attn_post_norm);
        ggml_tensor * residual = ggml_add(ctx, cur, x);
        cur                    = norm(ctx, residual, l.ffn_norm);
        ggml_tensor * gate     = ggml_mul_mat(ctx, l.ffn_gate, cur);
        ggml_tensor * up       = ggml_mul_mat(ctx, l.ffn_up, cur);
        cur = ggml_mul_mat(ctx, l.ffn_down, params_.gelu ? ggml_geglu_split(ctx, gate, up) : ggml_swiglu_split(ctx, gate, up));
        if (l.ffn_post_norm) cur = norm(ctx, cur, l.ffn_post_norm);
        x = ggml_add(ctx, cur, residual);
        if (l.out_scale) x = ggml_mul(ctx, x, l.out_scale);
    }
    g.hidden = norm(ctx, x, weights_.output_norm);
    ggml_set_output(g.hidden);
    if (!head_backend_) {
        g.logits = ggml_mul_mat(ctx, output_, g.hidden);
        g.argmax = ggml_argmax(ctx, g.logits);
        ggml_set_output(g.logits);
        ggml_set_output(g.argmax);
        ggml_build_forward_expand(g.graph, g.argmax);
    }
    ggml_build_forward_expand(g.graph, g.hidden);
    start(g, backend_.get());
    return g;
}

// Rows [shift, shift + count) of keys and values -> rows from 0, in pieces that do not overlap with where they go.
gm_draft::Graph gm_draft::build_move(int64_t shift, int64_t count) {
    const int64_t pieces = (count + shift - 1) / shift;
    Graph         g;
    g.ctx = graph_context(6 * size_t(pieces) * kv_.size(), &g.graph);
    for (int64_t to = 0; to < count; to += shift) {
        const int64_t n = std::min(shift, count - to);
        for (const Keys & keys : kv_) {
            for (ggml_tensor * t : { keys.k, keys.v }) {
                const auto rows = [&](int64_t first) { return ggml_view_2d(g.ctx.get(), t, t->ne[0], n, t->nb[1], size_t(first) * t->nb[1]); };
                ggml_build_forward_expand(g.graph, ggml_cpy(g.ctx.get(), rows(to + shift), rows(to)));
            }
        }
    }
    start(g, backend_.get());
    return g;
}

// The last product where the target's output matrix lies on another device: only hidden states of one block cross.
gm_draft::Graph gm_draft::build_head(int64_t n) {
    Graph g;
    g.ctx    = graph_context(nodes_of(0), &g.graph);
    g.hidden = input(ggml_new_tensor_2d(g.ctx.get(), GGML_TYPE_F32, params_.n_embd, n), "hidden");
    g.logits = ggml_mul_mat(g.ctx.get(), output_, g.hidden);
    g.argmax = ggml_argmax(g.ctx.get(), g.logits);
    ggml_set_output(g.logits);
    ggml_set_output(g.argmax);
    ggml_build_forward_expand(g.graph, g.argmax);
    start(g, head_backend_.get());
    return g;
}

gm_draft::Graph & gm_draft::project_graph(int64_t n) {
    auto it = project_graphs_.find(n);
    if (it == project_graphs_.end()) {
        // Small counts recur each step and full chunks each prefill; any other count is met once.
        if (project_graphs_.size() > size_t(params_.block_size) + 1) project_graphs_.erase(std::prev(project_graphs_.end()));
        it = project_graphs_.emplace(n, build_project(n, nullptr, nullptr)).first;
    }
    return it->second;
}

gm_draft::Graph & gm_draft::block_graph(int64_t n, int64_t n_kv) {
    const auto shape = std::make_pair(n, n_kv);
    auto       it    = block_graphs_.find(shape);
    if (it == block_graphs_.end()) {
        if (block_graphs_.size() >= kBlockGraphs) block_graphs_.clear();
        it = block_graphs_.emplace(shape, build_block(n, n_kv)).first;
    }
    return it->second;
}

gm_draft::Graph & gm_draft::head_graph(int64_t n) {
    auto it = head_graphs_.find(n);
    if (it == head_graphs_.end()) it = head_graphs_.emplace(n, build_head(n)).first;
    return it->second;
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
    first_ += shift;
    std::fill(versions_.begin(), versions_.end(), 0);
    if (kept.empty()) return;
    compute(build_move(shift, int64_t(kept.size())), backend_.get());
    std::copy(kept.begin(), kept.end(), versions_.begin());
    times.rows_moved += int64_t(kept.size());
}

// Where the attention of a block graph begins to read.
void gm_draft::place_span(const Graph & g, int64_t slot) {
    for (ggml_tensor * t : g.spans) {
        t->view_offs = size_t(slot) * t->nb[1];
        t->data      = static_cast<char *>(t->view_src->data) + t->view_offs;
    }
}

void gm_draft::project(gm_mirror & mirror, int64_t start, int64_t count, const uint64_t * versions) {
    Graph   direct;
    Graph * g     = nullptr;
    void *  place = mirror.device() == device_ ? mirror.in_place(start, count) : nullptr;
    if (place && count > params_.block_size) {
        // A long stretch of an F32 ring is used where it lies.
        direct = build_project(count, place, mirror.buffer());
        g      = &direct;
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
    compute(*g, backend_.get());
    std::copy_n(versions, count, held);
    times.rows_projected += count;
}

// Projects the rows of the range whose keys are missing, or of an older version of the row.
void gm_draft::project_changed(gm_mirror & mirror, int64_t start, int64_t count) {
    // Taken before the rows are read: a row that is rewritten meanwhile is projected again at the next step.
    const auto versions = mirror.versions(start, count);
    const auto fresh    = [&](int64_t i) { return versions_[size_t(start + i - first_)] == versions[size_t(i)]; };
    for (int64_t i = 0, n; i < count; i += n) {
        n = 1;
        if (fresh(i)) continue;
        while (n < kProjectRows && i + n < count && !fresh(i + n)) ++n;
        project(mirror, start + i, n, versions.data() + i);
    }
}

// span: the position of the mask's first column.
void gm_draft::fill_masks(const Graph & g, int64_t n, int64_t n_kv, int64_t span, int64_t context_start, int64_t n_past) {
    const uint16_t open = 0, shut = ggml_fp32_to_fp16(-INFINITY);
    for (ggml_tensor * mask : { g.mask, g.mask_swa }) {
        if (!mask) continue;
        mask_data_.assign(size_t(n_kv * n), shut);
        for (int64_t i = 0; i < n; ++i) {
            uint16_t *    row   = mask_data_.data() + i * n_kv;
            const int64_t query = n_past + i;
            const int64_t first = mask == g.mask_swa ? std::max(context_start, query - params_.n_swa + 1) : context_start;
            const int64_t last  = params_.causal ? query : n_past + n - 1;  // bidirectional inside the block
            for (int64_t p = first; p <= last; ++p) row[p - span] = open;
        }
        set(mask, mask_data_.data());
    }
}

void gm_draft::set_embeddings(ggml_tensor * embeddings, const std::vector<int32_t> & tokens) {
    const gm::Dtype &  dtype = gm::dtype(tok_embd_->type);
    std::vector<float> rows(tokens.size() * size_t(params_.n_embd));
    for (size_t i = 0; i < tokens.size(); ++i) {
        dtype.to_float(static_cast<const char *>(tok_embd_->data) + size_t(tokens[i]) * tok_embd_->nb[1], rows.data() + i * size_t(params_.n_embd), params_.n_embd);
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
    if (mirror.taps() != params_.n_taps || mirror.n_embd() != params_.n_embd_target) {
        throw error(GM_ERR_WIDTH, "the draft reads rows of %d x %d, the mirror holds %d x %lld", params_.n_taps, params_.n_embd_target, mirror.taps(), (long long) mirror.n_embd());
    }
    last_logits_ = nullptr;
    if (source_ != mirror.id()) std::fill(versions_.begin(), versions_.end(), 0);
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
    if (g.tokens) set(g.tokens, block.data());
    if (g.embeddings) set_embeddings(g.embeddings, block);
    set(g.positions, positions.data());
    set(g.slots, slots.data());
    place_span(g, span - first_);
    fill_masks(g, n, n_kv, span, start, n_past);
    compute(g, backend_.get());

    Graph * head = &g;
    if (head_backend_) {
        head = &head_graph(n);
        ggml_backend_tensor_copy(g.hidden, head->hidden);
        compute(*head, head_backend_.get());
    }
    std::vector<int32_t> best(static_cast<size_t>(n));
    ggml_backend_tensor_get(head->argmax, best.data(), 0, best.size() * sizeof(int32_t));
    for (int64_t i = 1; i < n; ++i) {
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
    return gm::guard([&] { gm::required(out, "out") = new gm_draft(gm::required(params, "params")); });
}

void gm_draft_free(gm_draft * draft) {
    delete draft;
}

gm_status gm_draft_step(gm_draft * draft, gm_mirror * mirror, int64_t n_past, int32_t last_token, int32_t n_tokens, int32_t * tokens, int64_t * n_context) {
    return gm::guard([&] {
        gm::required(n_context, "n_context") =
            gm::required(draft, "draft").step(gm::required(mirror, "mirror"), n_past, last_token, n_tokens, &gm::required(tokens, "tokens"));
    });
}

gm_status gm_draft_logits(gm_draft * draft, int64_t n_values, float * logits) {
    return gm::guard([&] { gm::required(draft, "draft").logits(n_values, &gm::required(logits, "logits")); });
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
