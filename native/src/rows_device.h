// The portable path: rows enter and leave the ring through stock ggml graph ops on the ring's own device.
#pragma once

#include "rows.h"

#include "ggml-alloc.h"

namespace gm {

class DeviceRows final : public Rows {
  public:
    // ring: [width, cap] in a buffer of `device`. Throws GM_ERR_DEVICE, GM_ERR_UNSUPPORTED.
    DeviceRows(ggml_backend_dev_t device, const Dtype & dtype, ggml_tensor * ring, int32_t taps, int n_threads);

    void write(int32_t tap, int64_t start, int64_t count, const RowSource & source, Tally * tallies, Bus & bus) override;
    void read_host(int64_t start, int64_t count, float * rows, Bus & bus) override;
    void read_tensor(int64_t start, int64_t count, const ggml_tensor * rows, ggml_backend_buffer_t buffer) override;

    static uint64_t staging_bytes(int64_t width, int64_t cap);

    // Does the device have the ops that count and replace values? `has` asks it about one op.
    static bool check_ops_supported(ggml_context * ctx, ggml_tensor * x, const std::function<bool(ggml_tensor *)> & has);

  private:
    void          compute(ggml_cgraph * graph);
    void          take_rows();
    ggml_tensor * staged(ggml_context * ctx, int64_t width, int64_t count);
    ggml_tensor * source_leaf(ggml_context * ctx, const RowSource & source, int64_t width, int64_t count, Bus & bus);
    void          write_chunk(int32_t tap, int64_t start, int64_t count, const RowSource & source, Tally * tallies, Bus & bus);
    void          read_chunk(int64_t start, int64_t count, void * data, ggml_backend_buffer_t buffer);

    ggml_backend_dev_t      device_;
    const Dtype &           dtype_;
    ggml_tensor *           ring_;
    int32_t                 taps_;
    int64_t                 chunk_;   // rows per graph
    ggml_backend_ptr        backend_;
    ggml_context_ptr        ctx_, staging_ctx_;
    ggml_backend_buffer_ptr buffer_, staging_;
    ggml_tensor *           slots_;   // I64 [chunk], for set_rows
    ggml_tensor *           indices_; // I32 [chunk], for get_rows
    ggml_tensor *           rows_;    // F32 [width, chunk]; see take_rows
    ggml_gallocr_ptr        allocr_;
};

} // namespace gm
