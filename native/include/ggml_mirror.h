// ggml_mirror.h - the C ABI of the ggml-mirror native library.
//
// This file is the contract between C++ and Python and the only place where it is written down: the
// Python package reads it at import through cffi (ABI mode). Keep to plain C declarations; lines that
// start with '#' (other than integer #defines) and the extern "C" braces are skipped by the reader.
//
// Conventions
//   - A function that can fail returns a gm_status; 0 is success. Details of the last failure on the
//     calling thread are in gm_last_error(). No function aborts on user input or throws.
//   - Positions are token positions in one sequence (>= 0). A position lives in slot = position mod cap.
//   - A row is the features of one position: `taps` slices of `n_embd` values, width = taps * n_embd.
//   - Row data that crosses the ABI as float is F32, rows contiguous, `stride` bytes from row to row.
//   - A gm_mirror may be used from several threads: each call holds its lock. Freeing it is the caller's job.
#ifndef GGML_MIRROR_H
#define GGML_MIRROR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#    define GM_API __declspec(dllexport)
#else
#    define GM_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_tensor;

// ---------------------------------------------------------------------------------------------- errors

typedef enum gm_status {
    GM_OK              = 0,
    GM_ERR_ARGUMENT    = 1,   // a number is out of range
    GM_ERR_DTYPE       = 2,   // ggml has no such type, or it cannot be converted both ways
    GM_ERR_WIDTH       = 3,   // a width is not a multiple of the type's block size
    GM_ERR_DEVICE      = 4,   // no such device, or it does not start
    GM_ERR_UNSUPPORTED = 5,   // the device lacks an operation
    GM_ERR_MEMORY      = 6,   // bytes_needed > bytes_free, or the allocator refused
    GM_ERR_STALE       = 7,   // `position` is missing, partial or overwritten
    GM_ERR_VIEW        = 8,   // the range cannot be used in place
    GM_ERR_CAPTURE     = 9,   // the evaluated graph did not give the rows that were expected
    GM_ERR_BACKEND     = 10,  // a ggml backend failed while computing
    GM_ERR_INTERNAL    = 11,  // a C++ exception was caught at the ABI
} gm_status;

typedef struct gm_error_info {
    int32_t  status;
    int32_t  tap;           // -1: does not apply
    int64_t  position;      // -1: does not apply
    uint64_t bytes_needed;  // 0: does not apply
    uint64_t bytes_free;    // 0: does not apply
    char     message[512];
} gm_error_info;

// The last failure on this thread; valid until the next call on this thread.
GM_API const gm_error_info * gm_last_error(void);

// -------------------------------------------------------------------------------------------- versions

GM_API const char * gm_version(void);             // of this library
GM_API const char * gm_header_built(void);        // SHA-256 of this file as it was then; "": not known
GM_API const char * gm_ggml_version_built(void);  // of the ggml headers and libraries it was built against
GM_API const char * gm_ggml_commit_built(void);
GM_API const char * gm_ggml_version_loaded(void); // of the ggml that this process has loaded
GM_API const char * gm_ggml_commit_loaded(void);

// ---------------------------------------------------------------------------------------------- dtypes

// ggml_type id of a ggml type name ("q8_0"), or -1.
GM_API int32_t gm_type_from_name(const char * name);

// Values per block, and bytes of a row of `width` values (ggml_blck_size, ggml_row_size).
GM_API gm_status gm_type_block_size(int32_t type, int64_t * block_size);
GM_API gm_status gm_type_row_size(int32_t type, int64_t width, uint64_t * bytes);

// Largest |x| that the type gives back finite whatever its block neighbours are: found by converting, not from a table.
GM_API gm_status gm_type_limit(int32_t type, float * limit);

// --------------------------------------------------------------------------------------------- devices

typedef struct gm_device_info {
    char     name[64];         // as ggml names it: "CPU", "CUDA0"
    char     description[192];
    char     backend[64];      // backend registry name
    int32_t  type;             // enum ggml_backend_dev_type
    bool     is_host;          // its buffers are host memory
    uint64_t memory_free;      // bytes; for host devices: what this process may still take, see gm_host_memory
    uint64_t memory_total;
} gm_device_info;

GM_API int32_t   gm_device_count(void);
GM_API gm_status gm_device_get(int32_t index, gm_device_info * info);

// Index of a device: a ggml device name (any case), or "auto" (the first GPU, else the CPU).
GM_API gm_status gm_device_find(const char * name, int32_t * index);

typedef struct gm_host_memory {
    uint64_t free, total;      // bytes
    char     limit[160];       // what sets `free`, for people
} gm_host_memory;

// Host memory that this process may take: the least of what the machine has available, what the limits of its control groups (v1, v2)
// leave, and what ulimit -v leaves. Page cache counts as free. root: prefix of /proc and /sys, NULL for the real ones.
GM_API gm_status gm_host_memory_get(const char * root, gm_host_memory * memory);

// Index of the device whose memory a tensor lies in.
GM_API gm_status gm_tensor_device(const struct ggml_tensor * tensor, int32_t * index);

// Can the device capture taps of n_embd values into, and read rows of `width` values back from, a ring of `type`? Some kernels want
// more than whole blocks. 0, 0: one block each, so that the answer holds for any width.
GM_API gm_status gm_device_supports(int32_t index, int32_t type, int64_t n_embd, int64_t width, bool * capture, bool * read);

// Does this library convert rows of `type` on the device by code of its own (loops in host memory, CUDA or HIP kernels)? Else ggml's operations do.
GM_API gm_status gm_device_converts(int32_t index, int32_t type, bool * converts);

// ---------------------------------------------------------------------------------------------- target

// Bytes of a llama_context and its model in one type of buffer.
typedef struct gm_target_bytes {
    int32_t  device;           // index of the device whose memory it is
    bool     mappable;         // weights in it are pages of the file, if the file is mapped
    char     buffer[64];       // as ggml names the type: "CPU", "CPU_REPACK", "CUDA0", "CUDA_Host"
    uint64_t weights, context, compute;
} gm_target_bytes;

// What a llama_context has allocated; if its model was loaded with no_alloc, what it would allocate. breakdown: address of libllama's
// llama_get_memory_breakdown(const llama_context *), a C++ function. `max` entries are filled, *count is the total.
GM_API gm_status gm_target_memory(const void * breakdown, const void * context, int32_t max, gm_target_bytes * entries, int32_t * count);

// Index of a ggml_backend_dev_t.
GM_API gm_status gm_device_index(const void * device, int32_t * index);

// ---------------------------------------------------------------------------------------------- mirror

typedef struct gm_mirror gm_mirror;

typedef struct gm_mirror_params {
    int32_t device;     // index, see gm_device_find
    int32_t type;       // ggml_type of the stored rows
    int32_t taps;       // 1..64
    int64_t n_embd;     // width of one tap, a multiple of the type's block size
    int64_t cap;        // slots
    int32_t n_threads;  // for host devices; 0: all cores
    bool    ggml_ops;   // use stock ggml graph ops even where this library has a kernel of its own
} gm_mirror_params;

typedef struct gm_mirror_size {
    uint64_t row;          // bytes of one stored row
    uint64_t ring;         // cap rows: the ggml buffer
    uint64_t staging;      // most bytes of device scratch that a write or read may take, when one first needs it
    uint64_t bookkeeping;  // host bytes that remember which slot holds what
    uint64_t pinned;       // most host bytes that may stay pinned for its snapshots, see gm_host_rows_new
} gm_mirror_size;

// The bytes that gm_mirror_new would allocate for these parameters, staging at its first use; the same function that it uses. No device is
// touched.
GM_API gm_status gm_mirror_size_of(const gm_mirror_params * params, gm_mirror_size * size);

GM_API gm_status gm_mirror_new(const gm_mirror_params * params, gm_mirror ** out);
GM_API void      gm_mirror_free(gm_mirror * mirror);

// Write `count` rows from host memory at positions start.. ; tap >= 0: that tap's slices (n_embd wide), tap == -1: whole rows.
// More rows than cap: the last cap are kept. A value that the type cannot hold is replaced and counted, see gm_tap_stats.
GM_API gm_status gm_mirror_write(gm_mirror * mirror, int32_t tap, int64_t start, int64_t count, const float * rows, uint64_t stride);

// The same from an F32 tensor [n_embd or width, count] on any device; the tensor's data must be complete.
GM_API gm_status gm_mirror_write_tensor(gm_mirror * mirror, int32_t tap, int64_t start, const struct ggml_tensor * rows);

// All taps of the same positions at once, from one such tensor [n_embd, count] per tap: on a GPU with kernels one launch instead of one per tap.
GM_API gm_status gm_mirror_write_taps(gm_mirror * mirror, int64_t start, const struct ggml_tensor * const * rows);

// Read rows start..start+count-1 to F32: contiguous host memory, or a contiguous F32 tensor on the mirror's device.
GM_API gm_status gm_mirror_read(gm_mirror * mirror, int64_t start, int64_t count, float * rows);
GM_API gm_status gm_mirror_read_tensor(gm_mirror * mirror, int64_t start, int64_t count, struct ggml_tensor * rows);

// Address of rows start.. in the ring, to be read in place: F32, complete, not wrapped, host memory; else GM_ERR_VIEW.
GM_API gm_status gm_mirror_view(gm_mirror * mirror, int64_t start, int64_t count, const float ** rows);

// Forget positions >= from; forget all.
GM_API gm_status gm_mirror_truncate(gm_mirror * mirror, int64_t from);
GM_API gm_status gm_mirror_clear(gm_mirror * mirror);

// Live slots in ascending position: position and bit mask of the written taps. Arrays may be NULL; `max` entries are filled, *count is the total.
GM_API gm_status gm_mirror_live(gm_mirror * mirror, bool complete_only, int64_t max, int64_t * positions, uint64_t * tap_masks, int64_t * count);

// Pinned host memory for `bytes` of stored rows: the mirror's device copies to and from it at its full rate. It is reused once freed, and
// may outlive the mirror. *rows NULL, with GM_OK: there is none, see gm_mirror_transfers; any other memory will do, but slower.
typedef struct gm_host_rows gm_host_rows;
GM_API gm_status gm_host_rows_new(gm_mirror * mirror, uint64_t bytes, gm_host_rows ** rows, uint8_t ** data);
GM_API void      gm_host_rows_free(gm_host_rows * rows);

// Storage bytes of live rows, in the order given; bytes of taps that were not written come back as 0.
GM_API gm_status gm_mirror_save(gm_mirror * mirror, int64_t count, const int64_t * positions, uint8_t * rows);

// Forget everything and take these rows. Positions must be distinct modulo cap. Checked before anything changes.
GM_API gm_status gm_mirror_load(gm_mirror * mirror, int64_t count, const int64_t * positions, const uint64_t * tap_masks, const uint8_t * rows);

// What gm_mirror_save and gm_mirror_load have moved since the mirror was made or gm_mirror_reset_stats. A copy is of neighbouring slots: a
// range of positions takes one, or two where it wraps.
typedef struct gm_mirror_transfers {
    int64_t  save_calls, save_copies, save_bytes;
    int64_t  load_calls, load_copies, load_bytes;
    int64_t  pinned_copies;    // those of both whose host side was pinned
    uint64_t pinned_bytes;     // host memory that is pinned now for all mirrors of the device, in use or not
    char     unpinned[200];    // why memory was not pinned when last asked for; "": it was
} gm_mirror_transfers;

GM_API gm_status gm_mirror_get_transfers(gm_mirror * mirror, gm_mirror_transfers * transfers);

// What one tap has seen since the mirror was made or gm_mirror_reset_stats.
typedef struct gm_tap_stats {
    int64_t values;    // F32 values written
    int64_t nan;       // stored as 0
    int64_t inf;       // stored as the type's limit, sign kept
    int64_t overflow;  // finite, beyond the type's limit; stored as the limit, sign kept
    int64_t over_f16;  // finite, |x| > 65504, whatever the type
    float   abs_max;   // largest finite |x|; NaN where the path does not measure it
} gm_tap_stats;

typedef struct gm_mirror_times {
    int64_t write_calls, write_rows, write_ns;  // write_rows counts a whole row as 1, a tap's slice as 1/taps (rounded down in total)
    int64_t read_calls, read_rows, read_ns;
} gm_mirror_times;

// Feature bytes that crossed between host memory and the memory of devices: rows that are written, read, saved or loaded, as F32 or as they
// are stored. A mirror in host memory counts what it takes from a tensor on a device. What devices copy among themselves does not count,
// nor do slots, counts and whatever else is no feature.
typedef struct gm_bus_bytes {
    int64_t to_host, to_device;
} gm_bus_bytes;

GM_API gm_status gm_mirror_tap_stats(gm_mirror * mirror, int32_t tap, gm_tap_stats * stats);
GM_API gm_status gm_mirror_get_times(gm_mirror * mirror, gm_mirror_times * times);
GM_API gm_status gm_mirror_get_bus(gm_mirror * mirror, gm_bus_bytes * bytes);  // since it was made, or gm_mirror_reset_stats
GM_API gm_bus_bytes gm_bus_total(void);  // of all mirrors that this process has had; never reset
GM_API gm_status gm_mirror_reset_stats(gm_mirror * mirror);

// --------------------------------------------------------------------------------------------- capture

// A gm_capture takes taps in one of two ways, and does nothing until mirrors are attached:
//   callback  it is the user data of a llama_context's cb_eval, which stops the evaluation at each tap
//   outputs   it is the context of a backend sampler, which keeps the taps in place; gm_capture_take fetches them behind the evaluation
typedef struct gm_capture gm_capture;

// A gm_fuser takes raw rows from a capture into a staging ring and puts fused rows into a mirror as they are committed, or, of an evaluation
// that is longer than that ring, as newer ones arrive.
typedef struct gm_fuser gm_fuser;

GM_API gm_status gm_capture_new(gm_capture ** out);
GM_API void      gm_capture_free(gm_capture * capture);

// The address to put into llama_context_params.cb_eval, with the gm_capture as cb_eval_user_data.
GM_API void * gm_capture_callback(void);

// The address of a llama_sampler_i, for a llama_sampler with the gm_capture as its ctx. Alone in a chain, and given to a llama_context for a
// sequence that no batch has, it marks the outputs of the blocks given to gm_capture_keep as outputs of each graph. Graphs that were built
// before gm_capture_keep do not know of it: give the context a new chain.
GM_API void * gm_capture_sampler(void);
GM_API gm_status gm_capture_keep(gm_capture * capture, int32_t n_layers, const int32_t * layers);

// How many of these blocks the graph that was built last has, with outputs that nothing overwrites.
GM_API gm_status gm_capture_kept(gm_capture * capture, int32_t * count);

// Take all taps of the graph that ran last, of `rows` tokens, as the next rows of the open evaluation. It must have ended (llama_synchronize),
// and no other may have begun: an evaluation of several micro-batches is to be made one by one. Nothing happens if no evaluation is open.
GM_API gm_status gm_capture_take(gm_capture * capture, int64_t rows);

// Of a llama_batch's arrays, which positions of sequence `seq` it has: *start..*start+n-1. *start -1: none of its tokens is of that sequence.
// GM_ERR_CAPTURE: it mixes sequences, or its positions do not follow each other.
GM_API gm_status gm_batch_span(int32_t n, const int32_t * pos, const int32_t * n_seq_id, int32_t * const * seq_id, int32_t seq, int64_t * start);

// Learn which block outputs the model's graph has: discover, evaluate any tokens, then ask per layer.
// rows: of the last evaluation; 0 if the layer's output was not seen.
GM_API gm_status gm_capture_discover(gm_capture * capture);
GM_API gm_status gm_capture_found(gm_capture * capture, int32_t layer, int64_t * width, int64_t * rows);

// The model's own token embedding and output matrix, as seen while discovering; NULL if not seen. They live as long as the model.
GM_API gm_status gm_capture_target_tensors(gm_capture * capture, struct ggml_tensor ** tok_embd, struct ggml_tensor ** output);

// Send the outputs of blocks layers[0..n_taps) to every mirror and fuser (all of n_taps taps), which must outlive the attachment.
GM_API gm_status gm_capture_attach(gm_capture * capture, int32_t n_taps, const int32_t * layers, int32_t n_mirrors, gm_mirror * const * mirrors,
                                   int32_t n_fusers, gm_fuser * const * fusers);
GM_API gm_status gm_capture_detach(gm_capture * capture);

// Announce an evaluation of positions start..start+count-1 of the captured sequence: rows below start are committed, rows >= start
// forgotten, in every mirror and fuser.
GM_API gm_status gm_capture_begin(gm_capture * capture, int64_t start, int64_t count);

// Close it: GM_OK if each tap gave each row, else the first error (rows >= start are forgotten again).
GM_API gm_status gm_capture_end(gm_capture * capture);

// Close it after the evaluation itself has failed: rows >= start are forgotten.
GM_API gm_status gm_capture_cancel(gm_capture * capture);

// ----------------------------------------------------------------------------------------------- draft

// A DFlash draft on the device of the mirrors that it reads.
typedef struct gm_draft gm_draft;

typedef struct gm_draft_params {
    const char * path;         // GGUF file
    int32_t  device;           // index, see gm_device_find
    int32_t  n_threads;        // for host devices; 0: all cores
    int32_t  n_layer, n_embd, n_head, n_head_kv, head_dim, n_rot;
    int32_t  n_taps;           // the row is n_taps * n_embd_target wide
    int32_t  n_embd_target;
    int32_t  block_size;       // tokens in a block, the last committed one included
    int32_t  mask_token;
    int32_t  n_vocab;          // of the target
    float    rms_eps, rope_base, rope_scale;
    float    embedding_scale, attention_scale, attention_value_scale; // 0: none (attention: 1/sqrt(head_dim))
    bool     gelu;             // feed-forward activation; false: SiLU
    bool     causal;           // attention inside the block
    int32_t  n_swa;            // sliding window of the layers in swa_layers; 0: none
    uint64_t swa_layers;       // bit mask
    int64_t  window;           // context rows that the draft attends to, at most
    int64_t  n_ctx;            // positions that there can be; 0: any number, for which more keys and values need room
    bool     fused_rows;       // its mirror holds fused rows: 1 tap, n_embd wide
    int32_t  kv_type;          // ggml_type of the window's keys and values
    bool     keep_kv;          // from step to step; false: all rows of the window are projected at each
    struct ggml_tensor * tok_embd; // the target's, may be NULL if the draft has its own
    struct ggml_tensor * output;
} gm_draft_params;

typedef struct gm_draft_bytes {
    uint64_t weights;
    uint64_t kv;               // keys and values of the window, derived from rows
    uint64_t compute;          // scratch of the graphs, and logits
} gm_draft_bytes;

typedef struct gm_draft_times {
    int64_t steps, rows_projected;
    int64_t rows_moved;        // whose keys and values were copied to make room
    int64_t rows_checked;      // whose versions were looked at
    int64_t mask_cells;        // that were written
    int64_t read_ns;           // rows from the mirror to F32
    int64_t fuse_ns;           // raw rows to fused ones, into the mirror
    int64_t project_ns;        // rows to keys and values, and to make room for them
    int64_t block_ns;          // the noise block, up to its tokens
} gm_draft_times;

// The bytes that gm_draft_new would allocate for these parameters: the same functions, without memory. A draft takes no more while it
// works. The file is read as far as its header; matrices of the target that are NULL count as lying on the draft's device.
GM_API gm_status gm_draft_size_of(const gm_draft_params * params, gm_draft_bytes * bytes);

GM_API gm_status gm_draft_new(const gm_draft_params * params, gm_draft ** out);
GM_API void      gm_draft_free(gm_draft * draft);

// Draft what follows `last_token` at position n_past: n_tokens <= block_size - 1 tokens, from the complete rows before n_past that the
// window reaches. Rows are projected once; rows that changed since are projected again. *n_context: rows attended to (0 is allowed).
GM_API gm_status gm_draft_step(gm_draft * draft, gm_mirror * mirror, int64_t n_past, int32_t last_token, int32_t n_tokens, int32_t * tokens, int64_t * n_context);

// Logits of the last step: F32 [n_tokens + 1, n_vocab] in host memory (row 0 is the last committed token's).
GM_API gm_status gm_draft_logits(gm_draft * draft, int64_t n_values, float * logits);

// Raw rows that are fused at once, where they lie. A staging ring needs no more slots, unless more rows have to wait.
#define GM_FUSE_ROWS 128

// Raw rows start..start+count-1 of `raw` -> fused rows (fc and norm) at the same positions of `fused`, on the draft's device.
GM_API gm_status gm_draft_fuse(gm_draft * draft, gm_mirror * raw, int64_t start, int64_t count, gm_mirror * fused);

GM_API gm_status gm_draft_get_bytes(gm_draft * draft, gm_draft_bytes * bytes);
GM_API gm_status gm_draft_get_times(gm_draft * draft, gm_draft_times * times);
GM_API gm_status gm_draft_reset_times(gm_draft * draft);

// ---------------------------------------------------------------------------------------- fused capture

// Draft and rings must outlive a fuser. `staging`: raw rows, best F32 on the draft's device, where they are fused in place. With taps that come
// one after another (callback) it must hold the rows that come at once, or gm_capture_end is GM_ERR_CAPTURE.
GM_API gm_status gm_fuser_new(gm_draft * draft, gm_mirror * staging, gm_mirror * mirror, gm_fuser ** out);
GM_API void      gm_fuser_free(gm_fuser * fuser);

// Rows before `end` are committed: those that wait are fused.
GM_API gm_status gm_fuser_commit(gm_fuser * fuser, int64_t end);

// Forget positions >= from, waiting or fused.
GM_API gm_status gm_fuser_truncate(gm_fuser * fuser, int64_t from);

#ifdef __cplusplus
}
#endif

#endif // GGML_MIRROR_H
