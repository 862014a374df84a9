#include "fuser.h"

#include <algorithm>

using gm::error;

gm_fuser::gm_fuser(gm_draft & draft, gm_mirror & staging, gm_mirror & mirror) : draft_(draft), staging_(staging), mirror_(mirror) {
    draft.require_rows(staging, false);
    draft.require_rows(mirror, true);
    exchanged_ = mirror.exchanged();
}

// Rows that wait are of the sequence that the mirror held: if it was cleared or restored since, they are nobody's.
void gm_fuser::follow() {
    const uint64_t now = mirror_.exchanged();
    if (now == exchanged_) return;
    staging_.clear();
    waiting_   = 0;
    exchanged_ = now;
}

void gm_fuser::write(int32_t tap, int64_t start, const ggml_tensor * rows) {
    const int64_t count = ggml_nrows(rows);
    if (count > staging_.cap()) {
        throw error(GM_ERR_CAPTURE, "%lld rows arrive tap by tap and have to wait for each other; the staging ring holds %lld: make the Fuser with "
                    "staging=%lld, the target's n_ubatch, or capture with mechanism='outputs'", (long long) count, (long long) staging_.cap(),
                    (long long) count).tap(tap);
    }
    make_room(start, count);
    if (gm_mirror_write_tensor(&staging_, tap, start, rows) != GM_OK) gm::rethrow_last_error();
}

void gm_fuser::write_taps(int64_t start, const ggml_tensor * const * rows) {
    const std::vector<gm::RowSource> sources = staging_.tap_sources(rows);
    std::vector<gm::RowSource>       piece(sources.size());
    const int64_t                    count = ggml_nrows(rows[0]), cap = staging_.cap();
    for (int64_t done = 0, n; done < count; done += n) {
        // More than can wait: a prompt. Its pieces end where the ring does, so that each is fused in one go.
        n = count <= cap ? count : std::min(count - done, cap - (start + done) % cap);
        make_room(start + done, n);
        std::transform(sources.begin(), sources.end(), piece.begin(), [&](const gm::RowSource & s) { return s.skip(done); });
        staging_.write_taps(start + done, n, piece.data());
    }
}

// What lies before `start` is whole: taps of a micro-batch come one after the other, or together.
void gm_fuser::make_room(int64_t start, int64_t count) {
    follow();
    if (start + count - waiting_ > staging_.cap()) commit(start);
}

void gm_fuser::commit(int64_t end) {
    follow();
    if (end <= waiting_) return;
    const int64_t count = std::min(end - waiting_, staging_.stretch_before(end, staging_.cap()));
    draft_.fuse(staging_, end - count, count, mirror_);
    waiting_ = end;
}

void gm_fuser::truncate(int64_t from) {
    staging_.truncate(from);
    mirror_.truncate(from);
    waiting_ = std::min(waiting_, from);
}

// ------------------------------------------------------------------------------------------------- C ABI

gm_status gm_fuser_new(gm_draft * draft, gm_mirror * staging, gm_mirror * mirror, gm_fuser ** out) {
    return gm::guard([&] {
        gm::required(out, "out") = new gm_fuser(gm::required(draft, "draft"), gm::required(staging, "staging"), gm::required(mirror, "mirror"));
    });
}

void gm_fuser_free(gm_fuser * fuser) {
    delete fuser;
}

gm_status gm_fuser_commit(gm_fuser * fuser, int64_t end) {
    return gm::guard([&] { gm::required(fuser, "fuser").commit(end); });
}

gm_status gm_fuser_truncate(gm_fuser * fuser, int64_t from) {
    return gm::guard([&] { gm::required(fuser, "fuser").truncate(from); });
}
