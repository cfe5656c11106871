// How many threads are worth starting.
#pragma once

#include <filesystem>

namespace terse {

// Physical cores that the affinity mask and the CPU quota (cgroup v1 or v2) allow; at least 1.
// A quota is rounded down: a team that waits at barriers loses more by being throttled than by one thread.
// `root` is where /proc and /sys are looked for.
int physical_cores(const std::filesystem::path& root = "/");

}  // namespace terse
