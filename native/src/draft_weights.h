// The weights of a DFlash draft: read from its GGUF, under the names of either family, onto a device.
#pragma once

#include "context.h"
#include "device.h"
#include "ggml-cpp.h"

#include <memory>
#include <string>
#include <vector>

namespace gm {

class DraftFile;

struct DraftLayer {
    ggml_tensor * attn_norm, * attn_q, * attn_k, * attn_v, * attn_output, * attn_q_norm, * attn_k_norm;  // attn_v null: values are the keys
    ggml_tensor * attn_post_norm, * ffn_post_norm, * out_scale, * attn_sinks;                             // optional
    ggml_tensor * ffn_norm, * ffn_gate, * ffn_up, * ffn_down;
};

struct DraftWeights {
    Context                 ctx;
    ggml_backend_buffer_ptr buffer;
    ggml_tensor *           fc;           // [n_taps * n_embd_target, n_embd]
    ggml_tensor *           hidden_norm;  // [n_embd]
    ggml_tensor *           output_norm;  // [n_embd]
    ggml_tensor *           rope_freqs;   // optional
    ggml_tensor *           tok_embd;     // the draft's own; null: the target's
    ggml_tensor *           output;
    std::vector<int64_t>    target_token; // draft token -> target token; empty: the same vocabulary
    std::vector<DraftLayer> layers;

    std::shared_ptr<const DraftFile> file; // until the weights are read

    // The file's tensors, without memory. Throws GM_ERR_ARGUMENT naming the file and the tensor for anything missing or misshapen.
    static DraftWeights lay_out(const gm_draft_params & params);

    // Memory, and what the file holds. False: the device gives none. Throws GM_ERR_ARGUMENT for a file that is truncated.
    bool load(ggml_backend_dev_t device);
};

} // namespace gm
