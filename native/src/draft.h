// The DFlash draft: rows of the mirror become keys and values of its window, and a block of noise becomes tokens.
#pragma once

#include "draft_weights.h"
#include "mirror.h"

#include "ggml-alloc.h"

#include <map>
#include <utility>
#include <vector>

struct gm_draft {
  public:
    explicit gm_draft(const gm_draft_params & params);

    static gm_draft_bytes size_of(const gm_draft_params & params);

    int64_t step(gm_mirror & mirror, int64_t n_past, int32_t last_token, int32_t n_tokens, int32_t * tokens);
    void    logits(int64_t n_values, float * out);
    void    fuse(gm_mirror & raw, int64_t start, int64_t count, gm_mirror & fused);

    void    require_rows(gm_mirror & mirror, bool fused) const;  // that it holds such rows as this draft reads or makes

    gm_draft_bytes bytes() const;
    gm_draft_times times{};

  private:
    struct Graph {
        gm::Context      ctx;
        ggml_cgraph *    graph = nullptr;
        uint64_t         id = 0;
        std::vector<ggml_tensor *> own, views; // that a Place gives memory, and that lie in other tensors
        std::vector<ggml_tensor *> spans;      // the keys and values that attention reads, [head_dim, n_kv, n_head_kv]
        // inputs; null where a graph has no such input
        ggml_tensor *    rows = nullptr;       // F32 [n_taps * n_embd_target, n], or fused rows [n_embd, n]
        ggml_tensor *    tokens = nullptr;     // I32 [n], or
        ggml_tensor *    embeddings = nullptr; // F32 [n_embd, n]
        ggml_tensor *    positions = nullptr;  // I32 [n]
        ggml_tensor *    slots = nullptr;      // I64 [n]
        ggml_tensor *    mask = nullptr;       // F16 [n_kv, n], in masks_
        ggml_tensor *    mask_swa = nullptr;
        // outputs
        ggml_tensor *    fused = nullptr;      // F32 [n_embd, n]
        ggml_tensor *    hidden = nullptr;     // F32 [n_embd, n]
        ggml_tensor *    logits = nullptr;     // F32 [n_vocab, n]
        ggml_tensor *    argmax = nullptr;     // I32 [n]
    };

    // A device and the memory of the graphs that it runs. They run one after another and share it: what one has left there is gone
    // when the next is placed.
    struct Place {
        ggml_backend_dev_t device = nullptr;
        ggml_backend_ptr   backend;
        ggml_gallocr_ptr   allocr;
        uint64_t           holds = 0;  // id of the graph whose tensors have the memory
    };

    struct Keys { ggml_tensor * k, * v; };  // [n_head_kv * head_dim, kv_slots]

    // What a block attends to: its n tokens at n_past.. see the context from `start` on, in masks whose first column is position `span`.
    struct Sight {
        int64_t n = 0, n_kv = 0, span = 0, start = 0, n_past = 0;
        bool    same_shape(const Sight & other) const { return n == other.n && n_kv == other.n_kv && span == other.span; }
    };

    enum class Only { sizes };  // tensors without memory
    gm_draft(const gm_draft_params & params, Only);
    void           lay_out();
    void           allocate();
    gm_draft_bytes total_size() const;
    Place &        last() { return head_.device ? head_ : main_; }  // where logits come out

    // draft_graphs.cpp
    Graph build_fuse(int64_t n);
    Graph build_fuse(int64_t n, bool in_place);
    Graph build_project(int64_t n);
    Graph build_project(int64_t n, void * in_place, ggml_backend_buffer_t buffer);
    Graph build_block(int64_t n, int64_t n_kv);
    Graph build_move(int64_t shift, int64_t count);
    Graph build_head(int64_t n);
    Graph empty_graph(size_t nodes);
    void  finish(Graph & g, const Place & p) const;

    ggml_tensor * norm(ggml_context * ctx, ggml_tensor * x, ggml_tensor * weight) const;
    ggml_tensor * fuse(ggml_context * ctx, ggml_tensor * rows) const;
    ggml_tensor * head(ggml_context * ctx, ggml_tensor * hidden) const;
    ggml_tensor * rope(ggml_context * ctx, ggml_tensor * x, ggml_tensor * positions) const;
    ggml_tensor * key(ggml_context * ctx, const gm::DraftLayer & l, ggml_tensor * x, ggml_tensor * positions) const;
    ggml_tensor * value(ggml_context * ctx, const gm::DraftLayer & l, ggml_tensor * x) const;

    Graph & fuse_graph(int64_t n);
    Graph & project_graph(int64_t n);
    Graph & counted(std::map<int64_t, Graph> & graphs, int64_t n, Graph (gm_draft::*build)(int64_t));
    Graph & block_graph(int64_t n, int64_t n_kv);
    Graph & head_graph(int64_t n);

    // draft.cpp
    int64_t  most_project_rows() const;
    uint64_t all_layers() const { return ~uint64_t(0) >> (64 - params_.n_layer); }
    uint64_t swa_layers() const { return params_.n_swa > 0 ? params_.swa_layers & all_layers() : 0; }
    void    place(Graph & g, Place & p);
    void    compute(const Graph & g, const Place & p);
    void    make_room(int64_t start, int64_t n_past, int64_t end);
    void    place_span(const Graph & g, int64_t slot);
    void    project_changed(gm_mirror & mirror, int64_t start, int64_t count);
    void    project(gm_mirror & mirror, int64_t start, int64_t count, const gm::Ring::Version * versions);
    int64_t first_seen(bool swa, const Sight & sight, int64_t i) const;
    void    fill_masks(const Graph & g, const Sight & now);
    void    fill_mask(ggml_tensor * mask, bool swa, const Sight & now, int64_t from, int64_t to);
    void    set_embeddings(ggml_tensor * embeddings, const std::vector<int32_t> & tokens);

    const gm_draft_params params_;
    Place                 main_;
    Place                 head_;          // where the output matrix lies, if not on the draft's device
    gm::DraftWeights      weights_;
    gm::Context           stand_in_ctx_;  // for a target's matrices where only sizes are asked for
    ggml_tensor *         tok_embd_ = nullptr;
    ggml_tensor *         output_ = nullptr;
    bool                  embedding_here_ = true;  // on the draft's device; else in host memory

    gm::Context             kv_ctx_;
    ggml_backend_buffer_ptr kv_buffer_;
    std::vector<Keys>       kv_;
    int64_t                 kv_slots_;
    int64_t                 first_ = 0;   // position of slot 0, a multiple of kKvStep; slot i is of position first_ + i
    std::vector<uint64_t>   versions_;    // of the row that each slot's keys are of; 0: of none
    uint64_t                source_ = 0;  // id of the mirror that the keys are of
    // Positions whose keys were those of the mirror's rows when its latest version was seen_: what is older there need not be looked at.
    int64_t                 held_from_ = 0, held_to_ = 0;
    uint64_t                seen_ = 0;
    std::vector<gm::Ring::Version> changed_;

    gm_draft_bytes          size_{};          // on the draft's device
    uint64_t                head_size_ = 0;   // scratch where the output matrix lies
    uint64_t                graphs_made_ = 0;
    std::map<int64_t, Graph>                     fuse_graphs_, project_graphs_, head_graphs_;
    std::map<std::pair<int64_t, int64_t>, Graph> block_graphs_;
    gm::Context             logits_ctx_;
    ggml_backend_buffer_ptr logits_buffer_;
    ggml_tensor *           logits_ = nullptr;  // F32 [n_output, block_size], where the output matrix lies
    // Masks stay from step to step, so that only what the block sees anew, or no longer, has to be written.
    gm::Context             mask_ctx_;
    ggml_backend_buffer_ptr mask_buffer_;
    ggml_tensor *           mask_ = nullptr;      // F16 [most_span * block_size]; null: no layer uses it
    ggml_tensor *           mask_swa_ = nullptr;
    Sight                   drawn_;
    std::vector<uint16_t>   mask_data_;
    ggml_tensor *           last_logits_ = nullptr;
};
