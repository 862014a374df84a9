#include "draft_weights.h"

#include "gguf.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>

namespace gm {

namespace {

constexpr size_t kPiece = size_t(4) << 20;  // of a tensor that is read at a time

struct GgufDeleter {
    void operator()(gguf_context * gguf) const { gguf_free(gguf); }
};

struct FileCloser {
    void operator()(FILE * file) const { fclose(file); }
};

} // namespace

// A draft file's header, and its tensors by name.
class DraftFile {
  public:
    explicit DraftFile(const gm_draft_params & params) : p(params), path(required(params.path, "path") ? params.path : "") {
        gguf_init_params init = { true, &meta_ };
        gguf_.reset(gguf_init_from_file(path.c_str(), init));
        if (!gguf_) throw error(GM_ERR_ARGUMENT, "%.400s is not a readable GGUF file", path.c_str());
        meta_owner_.reset(meta_);
        file_.reset(fopen(path.c_str(), "rb"));
        if (!file_ || fseeko(file_.get(), 0, SEEK_END) != 0) throw error(GM_ERR_ARGUMENT, "%.400s cannot be read", path.c_str());
        size_ = uint64_t(ftello(file_.get()));
    }

    ggml_tensor * find(std::initializer_list<std::string> names) const {
        for (const std::string & name : names) {
            if (ggml_tensor * t = ggml_get_tensor(meta_, name.c_str())) return t;
        }
        return nullptr;
    }

    void require_whole(const ggml_tensor * t) const {
        if (offset(t) + ggml_nbytes(t) > size_) throw truncated(t);
    }

    void read(const ggml_tensor * t, void * data) const {
        read(t, 0, ggml_nbytes(t), data);
    }

    void read(const ggml_tensor * t, size_t from, size_t size, void * data) const {
        if (fseeko(file_.get(), off_t(offset(t) + from), SEEK_SET) != 0 || fread(data, 1, size, file_.get()) != size) throw truncated(t);
    }

    const gm_draft_params & p;
    const std::string       path;

  private:
    uint64_t offset(const ggml_tensor * t) const {
        return gguf_get_data_offset(gguf_.get()) + gguf_get_tensor_offset(gguf_.get(), gguf_find_tensor(gguf_.get(), t->name));
    }

    Error truncated(const ggml_tensor * t) const {
        return error(GM_ERR_ARGUMENT, "%.300s is truncated: tensor %.80s ends at byte %llu of %llu", path.c_str(), t->name,
                     (unsigned long long) (offset(t) + ggml_nbytes(t)), (unsigned long long) size_);
    }

    ggml_context *                              meta_ = nullptr;
    std::unique_ptr<gguf_context, GgufDeleter>  gguf_;
    ggml_context_ptr                            meta_owner_;
    std::unique_ptr<FILE, FileCloser>           file_;
    uint64_t                                    size_ = 0;
};

namespace {

// Collects the tensors that a draft has, as empty tensors of a new context beside their place in the file.
class Layout {
  public:
    explicit Layout(const DraftFile & file) : file_(file), ctx(size_t(16 + 32 * file.p.n_layer) * ggml_tensor_overhead()) {}

    ggml_tensor * optional(std::initializer_list<std::string> names, int64_t ne0, int64_t ne1 = 1) {
        const ggml_tensor * found = file_.find(names);
        if (!found) return nullptr;
        if (found->ne[0] != ne0 || (ne1 >= 0 && found->ne[1] != ne1) || found->ne[2] != 1 || found->ne[3] != 1) {
            throw error(GM_ERR_ARGUMENT, "%.200s: tensor %.60s is [%lld, %lld], not [%lld, %lld]", file_.path.c_str(), found->name,
                        (long long) found->ne[0], (long long) found->ne[1], (long long) ne0, (long long) ne1);
        }
        // As llama.cpp has them: vectors in F32, matrices in any type that it multiplies with. ggml aborts at others.
        const bool vector = ne1 == 1;
        if (vector ? found->type != GGML_TYPE_F32 : found->type != GGML_TYPE_F32 && !ggml_get_type_traits(found->type)->to_float) {
            throw error(GM_ERR_ARGUMENT, "%.200s: tensor %.60s is %s; %s was expected", file_.path.c_str(), found->name, ggml_type_name(found->type),
                        vector ? "f32" : "a matrix of floats");
        }
        file_.require_whole(found);
        ggml_tensor * t = ggml_dup_tensor(ctx.get(), found);
        ggml_set_name(t, found->name);
        return t;
    }

    ggml_tensor * needed(std::initializer_list<std::string> names, int64_t ne0, int64_t ne1 = 1) {
        ggml_tensor * t = optional(names, ne0, ne1);
        if (!t) throw error(GM_ERR_ARGUMENT, "%.300s: tensor %.80s is missing", file_.path.c_str(), names.begin()->c_str());
        return t;
    }

  private:
    const DraftFile & file_;

  public:
    Context ctx;
};

DraftWeights lay_out_tensors(const DraftFile & file, Layout & layout) {
    const gm_draft_params & p   = file.p;
    const int64_t           n   = p.n_embd, q = int64_t(p.n_head) * p.head_dim, kv = int64_t(p.n_head_kv) * p.head_dim;
    DraftWeights            w;
    w.fc          = layout.needed({ "fc.weight", "dflash.fc.weight", "dflash_fc.weight" }, int64_t(p.n_taps) * p.n_embd_target, n);
    w.hidden_norm = layout.needed({ "enc.output_norm.weight", "dflash.hidden_norm.weight", "dflash_hidden_norm.weight" }, n);
    w.output_norm = layout.needed({ "output_norm.weight" }, n);
    w.rope_freqs  = layout.optional({ "rope_freqs.weight", "blk.0.rope_freqs.weight" }, p.head_dim / 2);
    w.tok_embd    = layout.optional({ "token_embd.weight" }, n, -1);
    w.output      = layout.optional({ "output.weight" }, n, -1);
    if (!w.output) w.output = w.tok_embd;
    if (const ggml_tensor * d2t = file.find({ "d2t" })) {
        if (d2t->type != GGML_TYPE_I64 || !w.output || d2t->ne[0] != w.output->ne[1]) {
            throw error(GM_ERR_ARGUMENT, "%.300s: d2t does not map the rows of an output matrix", file.path.c_str());
        }
        w.target_token.resize(size_t(d2t->ne[0]));
        file.read(d2t, w.target_token.data());
        for (const int64_t token : w.target_token) {
            if (token < 0 || token >= p.n_vocab) {
                throw error(GM_ERR_ARGUMENT, "%.300s: d2t names token %lld, the target has %d", file.path.c_str(), (long long) token, p.n_vocab);
            }
        }
    }
    for (int32_t il = 0; il < p.n_layer; ++il) {
        const std::string blk = "blk." + std::to_string(il) + ".";
        DraftLayer        l{};
        l.attn_norm      = layout.needed({ blk + "attn_norm.weight" }, n);
        l.attn_q         = layout.needed({ blk + "attn_q.weight" }, n, q);
        l.attn_k         = layout.needed({ blk + "attn_k.weight" }, n, kv);
        l.attn_v         = layout.optional({ blk + "attn_v.weight" }, n, kv);
        l.attn_output    = layout.needed({ blk + "attn_output.weight" }, q, n);
        l.attn_q_norm    = layout.needed({ blk + "attn_q_norm.weight" }, p.head_dim);
        l.attn_k_norm    = layout.needed({ blk + "attn_k_norm.weight" }, p.head_dim);
        l.attn_sinks     = layout.optional({ blk + "attn_sinks.weight" }, p.n_head);
        l.out_scale      = layout.optional({ blk + "layer_output_scale.weight" }, 1);
        l.ffn_norm       = layout.optional({ blk + "ffn_norm.weight" }, n);
        ggml_tensor * post = layout.optional({ blk + "post_attention_norm.weight" }, n);
        // Lucebox drafts call the norm before the feed-forward "post_attention_norm"; with both, it is a norm of the attention's output.
        if (!l.ffn_norm) std::swap(l.ffn_norm, post);
        if (!l.ffn_norm) layout.needed({ blk + "ffn_norm.weight" }, n);
        l.attn_post_norm = post;
        l.ffn_post_norm  = layout.optional({ blk + "post_ffw_norm.weight" }, n);
        l.ffn_gate       = layout.needed({ blk + "ffn_gate.weight" }, n, -1);
        l.ffn_up         = layout.needed({ blk + "ffn_up.weight" }, n, l.ffn_gate->ne[1]);
        l.ffn_down       = layout.needed({ blk + "ffn_down.weight" }, l.ffn_gate->ne[1], n);
        w.layers.push_back(l);
    }
    return w;
}

} // namespace

DraftWeights DraftWeights::lay_out(const gm_draft_params & params) {
    const auto   file = std::make_shared<const DraftFile>(params);
    Layout       layout(*file);
    DraftWeights w = lay_out_tensors(*file, layout);
    w.ctx          = std::move(layout.ctx);
    w.file         = file;
    return w;
}

bool DraftWeights::load(ggml_backend_dev_t device) {
    buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), ggml_backend_dev_buffer_type(device)));
    if (!buffer) return false;
    ggml_backend_buffer_set_usage(buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    std::vector<uint8_t> piece(kPiece);
    for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); t; t = ggml_get_next_tensor(ctx.get(), t)) {
        for (size_t from = 0, size; from < ggml_nbytes(t); from += size) {
            size = std::min(kPiece, ggml_nbytes(t) - from);
            file->read(t, from, size, piece.data());
            ggml_backend_tensor_set(t, piece.data(), from, size);
        }
    }
    file.reset();
    return true;
}

} // namespace gm
