// Fused capture: raw rows wait in a staging ring until they are committed, then go through the draft's first product into the mirror. Where
// more rows arrive than it holds, older ones are fused as newer ones come: they are a prompt's, and no block of speculation.
#pragma once

#include "draft.h"

struct gm_fuser {
  public:
    gm_fuser(gm_draft & draft, gm_mirror & staging, gm_mirror & mirror);

    // A tap's rows of positions start.. arrive. Rows that they displace are fused before. Throws GM_ERR_CAPTURE if they are more than the
    // staging ring holds: none of them is whole before the last tap has come.
    void write(int32_t tap, int64_t start, const ggml_tensor * rows);

    // The same of all taps at once, a tensor for each; any number of rows.
    void write_taps(int64_t start, const ggml_tensor * const * rows);

    void    commit(int64_t end);
    void    truncate(int64_t from);
    int32_t taps() const { return staging_.taps(); }

  private:
    void follow();
    void make_room(int64_t start, int64_t count);

    gm_draft &  draft_;
    gm_mirror & staging_;
    gm_mirror & mirror_;
    int64_t     waiting_ = 0;  // positions from here on are not fused yet
    uint64_t    exchanged_;    // of the mirror, when the rows that wait came
};
