// The draft's graphs. Each is one shape of one of five: raw rows to fused ones, rows to keys and values, a block to hidden states and
// tokens, the last product on another device, and making room.
#include "draft.h"

#include <algorithm>
#include <cmath>

using gm::error;

namespace {

constexpr size_t kBlockGraphs = 8;  // kept, for block sizes and spans in use

ggml_tensor * input(ggml_tensor * t, const char * name) {
    ggml_set_name(t, name);
    ggml_set_input(t);
    return t;
}

size_t nodes_of(int32_t n_layer) { return 64 + size_t(n_layer) * 64; }

} // namespace

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

gm_draft::Graph gm_draft::empty_graph(size_t nodes) {
    Graph g;
    g.ctx   = gm::Context(2 * nodes * ggml_tensor_overhead() + ggml_graph_overhead_custom(nodes, false));
    g.graph = ggml_new_graph_custom(g.ctx.get(), nodes, false);
    g.id    = ++graphs_made_;
    return g;
}

void gm_draft::finish(Graph & g, const Place & p) const {
    for (ggml_tensor * t = ggml_get_first_tensor(g.ctx.get()); t; t = ggml_get_next_tensor(g.ctx.get(), t)) {
        if (t->view_src) {
            g.views.push_back(t);
        } else if (!t->data) {
            g.own.push_back(t);
        }
    }
    if (!p.backend) return;  // only measured
    for (int i = 0; i < ggml_graph_n_nodes(g.graph); ++i) {
        const ggml_tensor * node = ggml_graph_node(g.graph, i);
        if (!ggml_backend_supports_op(p.backend.get(), node)) {
            throw error(GM_ERR_UNSUPPORTED, "device %s lacks %s on %s, which the draft needs", ggml_backend_dev_name(p.device), ggml_op_name(node->op),
                        ggml_type_name(node->src[0] ? node->src[0]->type : node->type));
        }
    }
}

// Hidden states -> logits, where no other graph puts anything: they can be asked for until the next step.
ggml_tensor * gm_draft::head(ggml_context * ctx, ggml_tensor * hidden) const {
    ggml_tensor * logits = ggml_mul_mat(ctx, output_, hidden);
    logits->data         = logits_->data;
    logits->buffer       = logits_->buffer;
    return logits;
}

// Raw rows -> what all layers read of them.
ggml_tensor * gm_draft::fuse(ggml_context * ctx, ggml_tensor * rows) const {
    return norm(ctx, ggml_mul_mat(ctx, weights_.fc, rows), weights_.hidden_norm);
}

// in_place: g.rows has no memory of its own, fuse() says where it lies.
gm_draft::Graph gm_draft::build_fuse(int64_t n) { return build_fuse(n, true); }

gm_draft::Graph gm_draft::build_fuse(int64_t n, bool in_place) {
    Graph          g   = empty_graph(nodes_of(0));
    ggml_context * ctx = g.ctx.get();
    g.rows             = input(ggml_new_tensor_2d(ctx, GGML_TYPE_F32, int64_t(params_.n_taps) * params_.n_embd_target, n), "target_hidden_cat");
    if (in_place) g.rows->data = this;  // not null: it is not given any
    g.fused            = fuse(ctx, g.rows);
    ggml_set_output(g.fused);
    ggml_build_forward_expand(g.graph, g.fused);
    finish(g, main_);
    return g;
}

// Rows -> keys and values of every layer. in_place: where the rows lie in an F32 ring; else they are read into g.rows.
gm_draft::Graph gm_draft::build_project(int64_t n) { return build_project(n, nullptr, nullptr); }

gm_draft::Graph gm_draft::build_project(int64_t n, void * in_place, ggml_backend_buffer_t buffer) {
    Graph          g   = empty_graph(nodes_of(params_.n_layer));
    ggml_context * ctx = g.ctx.get();
    const int64_t width = params_.fused_rows ? params_.n_embd : int64_t(params_.n_taps) * params_.n_embd_target;
    g.rows              = input(ggml_new_tensor_2d(ctx, GGML_TYPE_F32, width, n), params_.fused_rows ? "fused" : "target_hidden_cat");
    if (in_place) {
        g.rows->data   = in_place;
        g.rows->buffer = buffer;
    }
    g.positions         = input(ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n), "positions");
    g.slots             = input(ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n), "slots");
    ggml_tensor * fused = params_.fused_rows ? g.rows : fuse(ctx, g.rows);
    for (size_t il = 0; il < weights_.layers.size(); ++il) {
        const gm::DraftLayer & l = weights_.layers[il];
        ggml_build_forward_expand(g.graph, ggml_set_rows(ctx, kv_[il].k, key(ctx, l, fused, g.positions), g.slots));
        ggml_build_forward_expand(g.graph, ggml_set_rows(ctx, kv_[il].v, value(ctx, l, fused), g.slots));
    }
    finish(g, main_);
    return g;
}

// Noise block -> hidden states (and tokens, where the output matrix lies on this device), over n_kv slots: see place_span.
gm_draft::Graph gm_draft::build_block(int64_t n, int64_t n_kv) {
    Graph          g   = empty_graph(nodes_of(params_.n_layer));
    ggml_context * ctx = g.ctx.get();
    const int64_t  hd = params_.head_dim, n_head = params_.n_head, n_head_kv = params_.n_head_kv;
    g.positions = input(ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n), "positions");
    g.slots     = input(ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n), "slots");
    const uint64_t swa_layers = this->swa_layers();
    const auto     mask       = [&](const ggml_tensor * where, const char * name) {
        if (!where) return static_cast<ggml_tensor *>(nullptr);
        ggml_tensor * t = input(ggml_new_tensor_2d(ctx, GGML_TYPE_F16, n_kv, n), name);
        t->data         = where->data;
        t->buffer       = where->buffer;
        return t;
    };
    g.mask     = mask(mask_, "mask");
    g.mask_swa = mask(mask_swa_, "mask_swa");
    ggml_tensor * x = nullptr;
    if (embedding_here_) {
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
    if (!head_.device) {
        g.logits = head(ctx, g.hidden);
        g.argmax = ggml_argmax(ctx, g.logits);
        ggml_set_output(g.argmax);
        ggml_build_forward_expand(g.graph, g.argmax);
    }
    ggml_build_forward_expand(g.graph, g.hidden);
    finish(g, main_);
    return g;
}

// Rows [shift, shift + count) of keys and values -> rows from 0, in pieces that do not overlap with where they go.
gm_draft::Graph gm_draft::build_move(int64_t shift, int64_t count) {
    const int64_t pieces = (count + shift - 1) / shift;
    Graph         g      = empty_graph(6 * size_t(pieces) * kv_.size());
    for (int64_t to = 0; to < count; to += shift) {
        const int64_t n = std::min(shift, count - to);
        for (const Keys & keys : kv_) {
            for (ggml_tensor * t : { keys.k, keys.v }) {
                const auto rows = [&](int64_t first) { return ggml_view_2d(g.ctx.get(), t, t->ne[0], n, t->nb[1], size_t(first) * t->nb[1]); };
                ggml_build_forward_expand(g.graph, ggml_cpy(g.ctx.get(), rows(to + shift), rows(to)));
            }
        }
    }
    finish(g, main_);
    return g;
}

// The last product where the target's output matrix lies on another device: only hidden states of one block cross.
gm_draft::Graph gm_draft::build_head(int64_t n) {
    Graph g  = empty_graph(nodes_of(0));
    g.hidden = input(ggml_new_tensor_2d(g.ctx.get(), GGML_TYPE_F32, params_.n_embd, n), "hidden");
    g.logits = head(g.ctx.get(), g.hidden);
    g.argmax = ggml_argmax(g.ctx.get(), g.logits);
    ggml_set_output(g.argmax);
    ggml_build_forward_expand(g.graph, g.argmax);
    finish(g, head_);
    return g;
}

// Small counts recur each step and full chunks each prefill; any other count is met once.
gm_draft::Graph & gm_draft::counted(std::map<int64_t, Graph> & graphs, int64_t n, Graph (gm_draft::*build)(int64_t)) {
    auto it = graphs.find(n);
    if (it == graphs.end()) {
        if (graphs.size() > size_t(params_.block_size) + 1) graphs.erase(std::prev(graphs.end()));
        it = graphs.emplace(n, (this->*build)(n)).first;
    }
    place(it->second, main_);
    return it->second;
}

gm_draft::Graph & gm_draft::fuse_graph(int64_t n) { return counted(fuse_graphs_, n, &gm_draft::build_fuse); }
gm_draft::Graph & gm_draft::project_graph(int64_t n) { return counted(project_graphs_, n, &gm_draft::build_project); }

gm_draft::Graph & gm_draft::block_graph(int64_t n, int64_t n_kv) {
    const auto shape = std::make_pair(n, n_kv);
    auto       it    = block_graphs_.find(shape);
    if (it == block_graphs_.end()) {
        if (block_graphs_.size() >= kBlockGraphs) block_graphs_.clear();
        it = block_graphs_.emplace(shape, build_block(n, n_kv)).first;
    }
    place(it->second, main_);
    return it->second;
}

gm_draft::Graph & gm_draft::head_graph(int64_t n) {
    auto it = head_graphs_.find(n);
    if (it == head_graphs_.end()) it = head_graphs_.emplace(n, build_head(n)).first;
    place(it->second, head_);
    return it->second;
}
