#include "cores.h"

#include <algorithm>
#include <thread>

#if defined(__linux__)
#include <sched.h>

#include <cerrno>
#include <cmath>
#include <fstream>
#include <optional>
#include <set>
#include <sstream>
#include <string>
#include <vector>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace terse {
namespace {

#if defined(__linux__)

namespace fs = std::filesystem;

std::string first_line(const fs::path& file) {
    std::ifstream in(file);
    std::string line;
    std::getline(in, line);
    return line;
}

// CPUs of the affinity mask; empty when the kernel does not tell.
std::vector<int> allowed_cpus() {
    std::vector<int> cpus;
    for (std::size_t capacity = 1024; capacity <= (1u << 20); capacity *= 2) {
        cpu_set_t* const set = CPU_ALLOC(capacity);
        const std::size_t size = CPU_ALLOC_SIZE(capacity);
        CPU_ZERO_S(size, set);
        const int error = sched_getaffinity(0, size, set) == 0 ? 0 : errno;
        for (std::size_t cpu = 0; error == 0 && cpu < capacity; ++cpu) {
            if (CPU_ISSET_S(cpu, size, set)) {
                cpus.push_back(static_cast<int>(cpu));
            }
        }
        CPU_FREE(set);
        if (error != EINVAL) {  // EINVAL: the kernel's mask is longer
            break;
        }
    }
    return cpus;
}

// CPUs that share a core list the same siblings.
int count_cores(const fs::path& root, const std::vector<int>& cpus) {
    std::set<std::string> cores;
    for (const int cpu : cpus) {
        const std::string id = std::to_string(cpu);
        fs::path folder = root / "sys/devices/system/cpu/cpu";
        folder += id;
        const std::string siblings = first_line(folder / "topology/thread_siblings_list");
        cores.insert(siblings.empty() ? id : siblings);
    }
    return static_cast<int>(cores.size());
}

// Whether `word` is one of a list's words, "cpu,cpuacct".
bool lists(const std::string& words, const std::string& word) {
    std::istringstream in(words);
    for (std::string each; std::getline(in, each, ',');) {
        if (each == word) {
            return true;
        }
    }
    return false;
}

// CPUs that one control group grants, nothing when it sets no limit.
std::optional<double> group_quota(const fs::path& group, bool v2) {
    std::stringstream in;
    if (v2) {
        in << first_line(group / "cpu.max");
    } else {
        in << first_line(group / "cpu.cfs_quota_us") << ' ' << first_line(group / "cpu.cfs_period_us");
    }
    double quota = 0;
    double period = 0;
    if (in >> quota >> period && quota > 0 && period > 0) {  // "max 100000" in v2 and "-1 100000" in v1: no limit
        return quota / period;
    }
    return std::nullopt;
}

// The smallest quota between this process's control groups and their roots. Inside a container the path may
// name a folder that only the host sees; what exists on the way up is what applies.
std::optional<double> cpu_quota(const fs::path& root) {
    std::optional<double> smallest;
    std::ifstream groups(root / "proc/self/cgroup");
    for (std::string line; std::getline(groups, line);) {  // "hierarchy:controllers:path"
        const std::size_t first = line.find(':');
        const std::size_t second = first == std::string::npos ? first : line.find(':', first + 1);
        if (second == std::string::npos) {
            continue;
        }
        const std::string controllers = line.substr(first + 1, second - first - 1);
        const bool v2 = controllers.empty();
        if (!v2 && !lists(controllers, "cpu")) {
            continue;
        }
        const fs::path mount = root / (v2 ? "sys/fs/cgroup" : "sys/fs/cgroup/cpu");
        for (fs::path group = fs::path(line.substr(second + 1)).relative_path();; group = group.parent_path()) {
            if (const auto quota = group_quota(mount / group, v2)) {
                smallest = std::min(*quota, smallest.value_or(*quota));
            }
            if (group.empty()) {
                break;
            }
        }
    }
    return smallest;
}

int count_cores(const fs::path& root) {
    const int cores = count_cores(root, allowed_cpus());
    const auto quota = cpu_quota(root);
    return quota ? static_cast<int>(std::min<double>(cores, std::floor(*quota))) : cores;
}

#elif defined(__APPLE__)

int count_cores(const std::filesystem::path&) {
    for (const char* const key : {"hw.perflevel0.physicalcpu", "hw.physicalcpu"}) {  // fast cores where there are two kinds
        int cores = 0;
        std::size_t size = sizeof cores;
        if (sysctlbyname(key, &cores, &size, nullptr, 0) == 0 && cores > 0) {
            return cores;
        }
    }
    return 0;
}

#else

int count_cores(const std::filesystem::path&) { return static_cast<int>(std::thread::hardware_concurrency()); }

#endif

}  // namespace

int physical_cores(const std::filesystem::path& root) { return std::max(1, count_cores(root)); }

}  // namespace terse
