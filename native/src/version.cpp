#include "ggml_mirror.h"

#include "ggml.h"

// GM_VERSION, GM_HEADER_SHA256, GM_GGML_VERSION_BUILT and GM_GGML_COMMIT_BUILT come from CMake: the ggml headers do not carry them.

#ifndef GM_HEADER_SHA256
#define GM_HEADER_SHA256 ""
#endif

const char * gm_version(void) { return GM_VERSION; }
const char * gm_header_built(void) { return GM_HEADER_SHA256; }
const char * gm_ggml_version_built(void) { return GM_GGML_VERSION_BUILT; }
const char * gm_ggml_commit_built(void) { return GM_GGML_COMMIT_BUILT; }
const char * gm_ggml_version_loaded(void) { return ggml_version(); }
const char * gm_ggml_commit_loaded(void) { return ggml_commit(); }
