// The eval callback: outputs of tapped blocks go from the graph's own tensors into the mirrors, on the device where they lie.
#include "fuser.h"

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

    void take(int32_t tap, const ggml_tensor * t);
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

} // namespace

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
