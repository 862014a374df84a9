// The feature mirror: a ring of rows in a ggml backend buffer, with one write path and one read path.
#pragma once

#include "pinned.h"
#include "ring.h"
#include "rows.h"

#include "ggml-cpp.h"

#include <memory>
#include <mutex>
#include <vector>

struct gm_mirror {
  public:
    static gm_mirror_size size_of(const gm_mirror_params & params);

    explicit gm_mirror(const gm_mirror_params & params);

    void write(int32_t tap, int64_t start, int64_t count, const gm::RowSource & source);
    void write_taps(int64_t start, int64_t count, const gm::RowSource * sources);  // one for each tap
    std::vector<gm::RowSource> tap_sources(const ggml_tensor * const * rows) const;  // that they can be written
    void read(int64_t start, int64_t count, float * rows);
    void read_tensor(int64_t start, int64_t count, const ggml_tensor & rows);
    const float * view(int64_t start, int64_t count);

    void truncate(int64_t from);
    void clear();
    int64_t live(bool complete_only, int64_t max, int64_t * positions, uint64_t * tap_masks);
    void save(int64_t count, const int64_t * positions, uint8_t * rows);
    void load(int64_t count, const int64_t * positions, const uint64_t * tap_masks, const uint8_t * rows);
    std::unique_ptr<gm_host_rows> host_rows(uint64_t bytes);  // null: no pinned memory
    gm_mirror_transfers           transfers();

    // For a reader that keeps what it derived from rows: see gm::Ring.
    int64_t               stretch_before(int64_t end, int64_t max);
    uint64_t              changed(int64_t start, int64_t count, uint64_t since, std::vector<gm::Ring::Version> & out);  // the latest version
    uint64_t              exchanged();  // how often all rows made way for none, or for a snapshot's
    // The rows as they lie in the ring: F32, complete, not wrapped; null if they have to be read.
    void *                in_place(int64_t start, int64_t count);
    ggml_backend_buffer_t buffer() const { return buffer_.get(); }
    ggml_backend_dev_t    device() const { return device_; }
    int64_t               cap() const { return params_.cap; }
    uint64_t              id() const { return id_; }  // no other mirror of this process has had it

    gm_tap_stats    tap_stats(int32_t tap);
    gm_mirror_times times();
    gm_bus_bytes    bus();
    void            reset_stats();

    int32_t taps() const { return params_.taps; }
    int64_t n_embd() const { return params_.n_embd; }

  private:
    int64_t  width() const { return params_.taps * params_.n_embd; }
    uint64_t tap_bytes() const { return row_bytes_ / uint64_t(params_.taps); }
    void     check_range(int64_t start, int64_t count) const;
    void     write_sources(int32_t tap, int64_t start, int64_t count, int32_t n_sources, const gm::RowSource * sources);
    void     write_host(int32_t tap, int64_t start, int64_t count, const gm::RowSource & source, std::vector<gm::Tally> & tallies);
    void     read_rows(int64_t start, int64_t count, float * rows);
    void     copy_bytes(uint64_t bytes, const uint8_t * from, uint8_t * to);
    std::unique_ptr<gm_host_rows> staging_for(const uint8_t * rows, uint64_t bytes);
    void     add_to_stats(int32_t tap, const gm::Tally & tally);
    void     collect();
    char *   host_row(int64_t slot) const { return static_cast<char *>(ring_->data) + uint64_t(slot) * row_bytes_; }

    gm_mirror_params        params_;
    uint64_t                id_;
    const gm::Dtype &       dtype_;
    uint64_t                row_bytes_;
    ggml_backend_dev_t      device_;
    ggml_context_ptr        ctx_;
    ggml_backend_buffer_ptr buffer_;
    ggml_tensor *           ring_ = nullptr;  // [width, cap]
    gm::Ring                slots_;
    gm::HostThreads         threads_;
    std::unique_ptr<gm::Rows> rows_;          // null: host memory, this library's own loops over ggml's conversions
    std::vector<gm_tap_stats> stats_;
    int64_t                 written_slices_ = 0;  // taps of rows
    uint64_t                exchanged_ = 0;
    gm_mirror_times         times_{};
    gm_mirror_transfers     transfers_{};
    gm::PinnedShare         pinned_;          // its pool: null on host devices
    std::string             unpinned_;        // why there was no pinned memory
    gm::Bus                 bus_;
    std::mutex              mutex_;
};
