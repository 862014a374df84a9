// Capture: outputs of tapped blocks go from the graph's own tensors into the mirrors, on the device where they lie. Two mechanisms:
//
//   callback  llama.cpp's cb_eval stops the scheduler at each tapped node, and the tap is taken there. Any graph; a stop and a wait per tap.
//   outputs   a backend sampler, of a sequence that no batch has, is shown each graph between its building and its allocation. It marks the
//             tapped nodes as graph outputs, so that nothing overwrites them, and adds nothing. All taps are taken behind the evaluation, in
//             one write. The graph runs as it would without capture.
#include "fuser.h"

#include "llama.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>

using gm::error;

struct gm_capture {
    enum class Mode { off, discover, attached };

    std::atomic<Mode>        mode{ Mode::off };
    std::map<int32_t, std::pair<int64_t, int64_t>> found;  // block -> width, rows of its output in the last evaluation
    ggml_tensor *            tok_embd = nullptr;           // the model's own, seen while discovering
    ggml_tensor *            output   = nullptr;
    std::vector<int32_t>     layers;                       // by tap
    std::vector<gm_mirror *> mirrors;
    std::vector<gm_fuser *>  fusers;
    std::vector<int64_t>     rows_seen;                    // by tap, of the evaluation that is open
    int64_t                  start = 0, count = -1;        // the evaluation; count -1: none is open
    gm_status                status = GM_OK;               // first error of the evaluation
    gm_error_info            failure{};
    std::map<int32_t, const ggml_tensor *> kept;           // block -> its output in the graph that was built last; null: there is none to keep

    void take(int32_t tap, const ggml_tensor * t);
    void take_kept(int64_t rows);
    void forget();
};

namespace {

// llama.cpp names the output of block il "l_out-<il>"; -1 for any other tensor.
int32_t block_of(const char * name) {
    static const char prefix[] = "l_out-";
    if (name[0] != 'l' || strncmp(name, prefix, sizeof(prefix) - 1) != 0) return -1;
    char *     end   = nullptr;
    const long block = strtol(name + sizeof(prefix) - 1, &end, 10);
    return end != name + sizeof(prefix) - 1 && *end == '\0' && block >= 0 && block < (1 << 20) ? int32_t(block) : -1;
}

bool is_weight(const ggml_tensor * t) {
    return t && t->buffer && ggml_backend_buffer_get_usage(t->buffer) == GGML_BACKEND_BUFFER_USAGE_WEIGHTS;
}

// Which weights turn tokens into embeddings and the last hidden state into logits: found by the ops that use them.
void note_target_tensors(gm_capture & capture, ggml_tensor * t) {
    if (!capture.tok_embd && t->op == GGML_OP_GET_ROWS && is_weight(t->src[0]) && strcmp(t->src[0]->name, "token_embd.weight") == 0) {
        capture.tok_embd = t->src[0];
    }
    if (strcmp(t->name, "result_output") != 0) return;
    while (t && t->op != GGML_OP_MUL_MAT) t = t->src[0];  // past scales, soft caps and biases
    if (t && is_weight(t->src[0])) capture.output = t->src[0];
}

bool on_node(ggml_tensor * t, bool ask, void * user_data) {
    auto & capture = *static_cast<gm_capture *>(user_data);
    if (capture.mode == gm_capture::Mode::off) return !ask;
    if (capture.mode == gm_capture::Mode::discover && ask) note_target_tensors(capture, t);
    const int32_t block = block_of(t->name);
    if (block < 0) return !ask;
    if (capture.mode == gm_capture::Mode::discover) {
        capture.found[block] = { t->ne[0], ggml_nrows(t) };
        return !ask;
    }
    if (capture.count < 0) return !ask;
    bool tapped = false;
    for (size_t tap = 0; tap < capture.layers.size(); ++tap) {
        if (capture.layers[tap] != block) continue;
        tapped = true;
        if (!ask && capture.status == GM_OK) capture.take(int32_t(tap), t);
    }
    // false on a finished node would make the scheduler skip the rest of the graph: errors wait for gm_capture_end.
    return ask ? tapped : true;
}

const ggml_tensor * memory_of(const ggml_tensor * t) {
    while (t->view_src) t = t->view_src;
    return t;
}

bool only_looks(const ggml_tensor * t) {
    return t->op == GGML_OP_NONE || t->op == GGML_OP_VIEW || t->op == GGML_OP_RESHAPE || t->op == GGML_OP_PERMUTE || t->op == GGML_OP_TRANSPOSE;
}

// The graph is built and has no memory yet.
void keep_outputs(gm_capture & capture, ggml_cgraph * graph) {
    const bool discovers = capture.mode == gm_capture::Mode::discover;
    for (auto & [block, output] : capture.kept) output = nullptr;
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        ggml_tensor * t = ggml_graph_node(graph, i);
        if (discovers) note_target_tensors(capture, t);
        const int32_t block = block_of(t->name);
        if (block < 0) {
            // What writes into another tensor's memory is told by its view: a flag would not keep it from that.
            if (!t->view_src || only_looks(t)) continue;
            for (auto & [kept, output] : capture.kept) {
                if (output && memory_of(t) == memory_of(output)) output = nullptr;
            }
            continue;
        }
        if (discovers) capture.found[block] = { t->ne[0], ggml_nrows(t) };
        const auto kept = capture.kept.find(block);
        if (kept == capture.kept.end()) continue;
        kept->second = t;
        for (ggml_tensor * memory = t; memory; memory = memory->view_src) ggml_set_output(memory);
    }
}

void on_graph(llama_sampler * sampler, ggml_context * /*ctx*/, ggml_cgraph * graph, llama_sampler_data * data) {
    data->logits = nullptr;  // nothing is sampled, so nothing is added to the graph
    gm::guard([&] { keep_outputs(*static_cast<gm_capture *>(sampler->ctx), graph); });
}

llama_sampler_i & sampler_interface() {
    static llama_sampler_i interface = [] {
        llama_sampler_i i{};
        i.name          = [](const llama_sampler *) { return "feature-capture"; };
        i.apply         = [](llama_sampler *, llama_token_data_array *) {};
        i.backend_init  = [](llama_sampler *, ggml_backend_buffer_type_t, uint32_t) { return true; };
        i.backend_apply = on_graph;
        return i;
    }();
    return interface;
}

} // namespace

void gm_capture::take_kept(int64_t rows) {
    if (count < 0) return;
    std::vector<const ggml_tensor *> outputs;
    for (size_t tap = 0; tap < layers.size(); ++tap) {
        const auto it = kept.find(layers[tap]);
        if (it == kept.end() || !it->second) {
            throw error(GM_ERR_CAPTURE, "the evaluated graph has no output of block %d that stays in place", layers[tap]).tap(int32_t(tap));
        }
        if (ggml_nrows(it->second) != rows || rows_seen[tap] + rows > count) {
            throw error(GM_ERR_CAPTURE, "block %d gave %lld rows of %lld; the last block gives only rows whose logits are asked for", layers[tap],
                        (long long) ggml_nrows(it->second), (long long) rows).tap(int32_t(tap));
        }
        outputs.push_back(it->second);
    }
    const int64_t at = start + rows_seen[0];
    for (gm_mirror * mirror : mirrors) {
        if (gm_mirror_write_taps(mirror, at, outputs.data()) != GM_OK) gm::rethrow_last_error();
    }
    for (gm_fuser * fuser : fusers) fuser->write_taps(at, outputs.data());
    for (int64_t & seen : rows_seen) seen += rows;
}

void gm_capture::take(int32_t tap, const ggml_tensor * t) {
    status = gm::guard([&] {
        int64_t &     seen = rows_seen[size_t(tap)];
        const int64_t rows = ggml_nrows(t);
        if (seen + rows > count) {
            throw error(GM_ERR_CAPTURE, "block %d gave more than the %lld rows that were announced", layers[size_t(tap)], (long long) count).tap(tap);
        }
        for (gm_mirror * mirror : mirrors) {
            if (gm_mirror_write_tensor(mirror, tap, start + seen, t) != GM_OK) gm::rethrow_last_error();
        }
        for (gm_fuser * fuser : fusers) fuser->write(tap, start + seen, t);
        seen += rows;
    });
    if (status != GM_OK) failure = *gm_last_error();
}

void gm_capture::forget() {
    for (gm_mirror * mirror : mirrors) mirror->truncate(start);
    for (gm_fuser * fuser : fusers) fuser->truncate(start);
}

gm_status gm_capture_new(gm_capture ** out) {
    return gm::guard([&] { gm::required(out, "out") = new gm_capture; });
}

void gm_capture_free(gm_capture * capture) {
    delete capture;
}

void * gm_capture_callback(void) {
    return reinterpret_cast<void *>(on_node);
}

void * gm_capture_sampler(void) {
    return &sampler_interface();
}

gm_status gm_capture_keep(gm_capture * capture, int32_t n_layers, const int32_t * layers) {
    return gm::guard([&] {
        gm_capture & c = gm::required(capture, "capture");
        if (n_layers < 0) throw error(GM_ERR_ARGUMENT, "%d blocks cannot be kept", n_layers);
        if (n_layers) gm::required(layers, "layers");
        c.kept.clear();
        for (int32_t i = 0; i < n_layers; ++i) c.kept[layers[i]] = nullptr;
    });
}

gm_status gm_capture_kept(gm_capture * capture, int32_t * count) {
    return gm::guard([&] {
        gm::required(count, "count") = 0;
        for (const auto & [block, output] : gm::required(capture, "capture").kept) *count += output != nullptr;
    });
}

gm_status gm_capture_take(gm_capture * capture, int64_t rows) {
    return gm::guard([&] { gm::required(capture, "capture").take_kept(rows); });
}

gm_status gm_batch_span(int32_t n, const int32_t * pos, const int32_t * n_seq_id, int32_t * const * seq_id, int32_t seq, int64_t * start) {
    return gm::guard([&] {
        gm::required(start, "start") = -1;
        if (n < 1) return;
        gm::required(pos, "pos"), gm::required(n_seq_id, "n_seq_id"), gm::required(seq_id, "seq_id");
        bool    own   = false;
        int32_t other = seq;
        for (int32_t i = 0; i < n; ++i) {
            for (int32_t j = 0; j < n_seq_id[i]; ++j) {
                if (seq_id[i][j] == seq) own = true;
                else other = seq_id[i][j];
            }
        }
        if (!own) return;
        if (other != seq) throw error(GM_ERR_CAPTURE, "the batch mixes sequences %d and %d; capture follows sequence %d alone", seq, other, seq);
        for (int32_t i = 1; i < n; ++i) {
            if (pos[i] != pos[0] + i) throw error(GM_ERR_CAPTURE, "the batch's positions are not consecutive; capture needs them so");
        }
        *start = pos[0];
    });
}

gm_status gm_capture_discover(gm_capture * capture) {
    return gm::guard([&] {
        gm_capture & c = gm::required(capture, "capture");
        c.found.clear();
        c.tok_embd = c.output = nullptr;
        c.mode = gm_capture::Mode::discover;
    });
}

gm_status gm_capture_found(gm_capture * capture, int32_t layer, int64_t * width, int64_t * rows) {
    return gm::guard([&] {
        const auto & found = gm::required(capture, "capture").found;
        const auto   it    = found.find(layer);
        gm::required(width, "width") = it == found.end() ? 0 : it->second.first;
        gm::required(rows, "rows")   = it == found.end() ? 0 : it->second.second;
    });
}

gm_status gm_capture_target_tensors(gm_capture * capture, struct ggml_tensor ** tok_embd, struct ggml_tensor ** output) {
    return gm::guard([&] {
        gm::required(tok_embd, "tok_embd") = gm::required(capture, "capture").tok_embd;
        gm::required(output, "output")     = capture->output;
    });
}

gm_status gm_capture_attach(gm_capture * capture, int32_t n_taps, const int32_t * layers, int32_t n_mirrors, gm_mirror * const * mirrors, int32_t n_fusers,
                            gm_fuser * const * fusers) {
    return gm::guard([&] {
        gm_capture & c = gm::required(capture, "capture");
        if (n_taps < 1 || n_mirrors < 0 || n_fusers < 0 || n_mirrors + n_fusers < 1) {
            throw error(GM_ERR_ARGUMENT, "%d taps, %d mirrors and %d fusers: a tap, and a mirror or fuser at least", n_taps, n_mirrors, n_fusers);
        }
        gm::required(layers, "layers");
        const auto check = [&](int32_t taps) {
            if (taps != n_taps) throw error(GM_ERR_ARGUMENT, "a mirror of %d taps cannot take %d", taps, n_taps);
        };
        if (n_mirrors) gm::required(mirrors, "mirrors");
        if (n_fusers) gm::required(fusers, "fusers");
        for (int32_t i = 0; i < n_mirrors; ++i) check(gm::required(mirrors[i], "a mirror").taps());
        for (int32_t i = 0; i < n_fusers; ++i) check(gm::required(fusers[i], "a fuser").taps());
        c.layers.assign(layers, layers + n_taps);
        c.mirrors.assign(mirrors, mirrors + n_mirrors);
        c.fusers.assign(fusers, fusers + n_fusers);
        c.rows_seen.assign(size_t(n_taps), 0);
        c.count = -1;
        c.mode  = gm_capture::Mode::attached;
    });
}

gm_status gm_capture_detach(gm_capture * capture) {
    return gm::guard([&] {
        gm_capture & c = gm::required(capture, "capture");
        c.mode  = gm_capture::Mode::off;
        c.count = -1;
        c.mirrors.clear();
        c.fusers.clear();
    });
}

gm_status gm_capture_begin(gm_capture * capture, int64_t start, int64_t count) {
    return gm::guard([&] {
        gm_capture & c = gm::required(capture, "capture");
        if (start < 0 || count < 1) {
            throw error(GM_ERR_ARGUMENT, "an evaluation of %lld positions from %lld is empty or negative", (long long) count, (long long) start);
        }
        for (gm_fuser * fuser : c.fusers) fuser->commit(start);
        c.start  = start;
        c.count  = count;
        c.status = GM_OK;
        std::fill(c.rows_seen.begin(), c.rows_seen.end(), 0);
        c.forget();
    });
}

gm_status gm_capture_cancel(gm_capture * capture) {
    return gm::guard([&] {
        gm_capture & c = gm::required(capture, "capture");
        if (c.count >= 0) c.forget();
        c.count = -1;
    });
}

gm_status gm_capture_end(gm_capture * capture) {
    return gm::guard([&] {
        gm_capture & c = gm::required(capture, "capture");
        if (c.count < 0) throw error(GM_ERR_CAPTURE, "no evaluation is open");
        const int64_t count = c.count;
        c.count             = -1;
        if (c.status != GM_OK) {
            c.forget();
            gm::Error e;
            e.info = c.failure;
            throw e;
        }
        for (size_t tap = 0; tap < c.layers.size(); ++tap) {
            if (c.rows_seen[tap] == count) continue;
            c.forget();
            throw error(GM_ERR_CAPTURE, "block %d gave %lld rows of %lld; the last block gives only rows whose logits are asked for", c.layers[tap],
                        (long long) c.rows_seen[tap], (long long) count).tap(int32_t(tap));
        }
    });
}
