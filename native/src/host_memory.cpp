#include "host_memory.h"

#include "error.h"
#include "ggml-backend.h"

#include <sys/resource.h>

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <unistd.h>

namespace gm {

namespace {

// The number after `key` at the start of a line of a small text file; -1 if there is none ("max").
int64_t read_number(const std::string & path, const char * key = "") {
    FILE * file = fopen(path.c_str(), "re");
    if (!file) return -1;
    char    line[256];
    int64_t number = -1;
    while (fgets(line, sizeof(line), file)) {
        if (strncmp(line, key, strlen(key)) != 0) continue;
        int64_t value;
        // v1 writes "no limit" as a number near 2^63.
        if (sscanf(line + strlen(key), "%" SCNd64, &value) == 1 && value < INT64_MAX / 2) number = value;
        break;
    }
    fclose(file);
    return number;
}

// The path of this process below a hierarchy of control groups: "0::PATH" (v2) or "N:...,memory,...:PATH" (v1).
std::string group_path(const std::string & root, bool v2) {
    FILE * file = fopen((root + "/proc/self/cgroup").c_str(), "re");
    if (!file) return "";
    char        line[4096];
    std::string path;
    while (fgets(line, sizeof(line), file)) {
        line[strcspn(line, "\n")] = 0;
        char * controllers = strchr(line, ':');
        char * rest        = controllers ? strchr(controllers + 1, ':') : nullptr;
        if (!rest) continue;
        const std::string names(controllers + 1, rest);
        if (v2 ? names.empty() : ("," + names + ",").find(",memory,") != std::string::npos) path = rest + 1;
    }
    fclose(file);
    return path == "/" ? "" : path;
}

struct Hierarchy {
    const char * mount;
    bool         v2;
    const char * limits[2];  // the second: above it the kernel slows the process down; none in v1
    const char * used;
    const char * cache[2];  // lines of memory.stat: page cache, which counts as used but is given up on demand
};

constexpr Hierarchy kHierarchies[] = {
    { "/sys/fs/cgroup", true, { "memory.max", "memory.high" }, "memory.current", { "inactive_file ", "active_file " } },
    { "/sys/fs/cgroup/unified", true, { "memory.max", "memory.high" }, "memory.current", { "inactive_file ", "active_file " } },
    { "/sys/fs/cgroup/memory", false, { "memory.limit_in_bytes", nullptr }, "memory.usage_in_bytes", { "total_inactive_file ", "total_active_file " } },
};

class Least {
  public:
    explicit Least(uint64_t total) { out_ = { total, total, "physical memory" }; }

    template <class... Args> void limit(int64_t free, int64_t total, const char * format, Args... args) {
        out_.total = std::min(out_.total, uint64_t(std::max<int64_t>(total, 0)));
        if (uint64_t(std::max<int64_t>(free, 0)) >= out_.free) return;
        out_.free = uint64_t(std::max<int64_t>(free, 0));
        snprintf(out_.limit, sizeof(out_.limit), format, args...);
    }

    const gm_host_memory & result() const { return out_; }

  private:
    gm_host_memory out_{};
};

void limit_by_groups(const std::string & root, const Hierarchy & h, Least & least) {
    // In a container the path may be that of the host, which is not there: then only the top directory counts.
    for (std::string path = group_path(root, h.v2);; path.erase(path.rfind('/'))) {
        const std::string folder = root + h.mount + path + "/";
        const int64_t     used   = read_number(folder + h.used);
        int64_t           cache  = 0;
        for (const char * line : h.cache) cache += std::max<int64_t>(read_number(folder + "memory.stat", line), 0);
        for (const char * name : h.limits) {
            const int64_t most = name ? read_number(folder + name) : -1;
            if (most >= 0 && used >= 0) {
                least.limit(most - std::max<int64_t>(used - cache, 0), most, "limit of %" PRId64 " MiB of control group %s", most >> 20, path.empty() ? "/" : path.c_str());
            }
        }
        if (path.find('/') == std::string::npos) return;
    }
}

} // namespace

gm_host_memory host_memory(const std::string & root) {
    size_t free = 0, physical = 0;
    ggml_backend_dev_memory(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU), &free, &physical);
    Least         least(physical);
    const int64_t total = read_number(root + "/proc/meminfo", "MemTotal:"), available = read_number(root + "/proc/meminfo", "MemAvailable:");
    if (total >= 0 && available >= 0) least.limit(available * 1024, total * 1024, "available memory of the machine");
    for (const Hierarchy & h : kHierarchies) limit_by_groups(root, h, least);
    rlimit        space{};
    const int64_t pages = read_number(root + "/proc/self/statm");
    if (pages >= 0 && getrlimit(RLIMIT_AS, &space) == 0 && space.rlim_cur != RLIM_INFINITY) {
        const int64_t most = int64_t(std::min<rlim_t>(space.rlim_cur, INT64_MAX / 2));
        least.limit(most - pages * sysconf(_SC_PAGESIZE), most, "ulimit -v of %" PRId64 " MiB", most >> 20);
    }
    return least.result();
}

} // namespace gm

gm_status gm_host_memory_get(const char * root, gm_host_memory * memory) {
    return gm::guard([&] { gm::required(memory, "memory") = gm::host_memory(root ? root : ""); });
}
