// Compiled once for each instruction set, with TERSE_KERNELS as the name of its table. No templates of the standard
// library here: the linker might take an instance of them that uses instructions which the CPU lacks.
#include "kernels.h"

#include <cmath>

#include "simd.h"

namespace terse {
namespace {

constexpr int kVectors = kPanel / kLanes;  // of one panel

// Rows and panels that fit the registers together.
#if defined(TERSE_SCALAR)
constexpr int kTileRows = 1;
constexpr int kTilePanels = 1;
#elif defined(__AVX512F__)
constexpr int kTileRows = 12;
constexpr int kTilePanels = 2;
#elif defined(__AVX2__)
constexpr int kTileRows = 6;
constexpr int kTilePanels = 1;
#else
constexpr int kTileRows = 6;
constexpr int kTilePanels = 1;
#endif

// Sums that run side by side, so that one need not wait for the other: at least 8 hide the latency of a multiply-add.
template <int Panels, int Rows>
constexpr int kChains = Panels * Rows * kVectors >= 8 || kLanes == 1 ? 1 : 8 / (Panels * Rows * kVectors);

// What follows the sums: scale, bias, addition, activation, and the outputs that a last panel lacks.
template <int Panels, int Rows>
inline void finish(const MatmulTask& task, int panel, int row, const Floats (&sums)[Rows][Panels * kVectors]) {
    for (int r = 0; r < Rows; ++r) {
        for (int p = 0; p < Panels; ++p) {
            const int first = (panel + p) * kPanel;
            float* const y = task.y + (row + r) * task.y_row + first;
            alignas(64) float out[kPanel];
            const bool whole = first + kPanel <= task.outputs;
            float* const target = whole ? y : out;
            for (int v = 0; v < kVectors; ++v) {
                Floats total = sums[r][p * kVectors + v];
                const int at = first + v * kLanes;
                if (task.scale != nullptr) {
                    total *= load(task.scale + at);
                }
                if (task.bias != nullptr) {
                    total += load(task.bias + at);
                }
                if (task.add && whole) {
                    total += load(y + v * kLanes);
                }
                if (task.relu) {
                    total = total < 0.0f ? Floats{} : total;  // NaN stays NaN
                }
                store(target + v * kLanes, total);
            }
            for (int i = 0; !whole && first + i < task.outputs; ++i) {
                y[i] = task.add ? y[i] + out[i] : out[i];
            }
        }
    }
}

// Up to so many rows memory sets the pace, and it is fastest where all panels are one stream. More rows take several
// panels together, so that each input that was loaded serves them all.
template <typename Weight>
constexpr int kStreaming = sizeof(Weight) == 1 ? 8 : 1;

template <typename Weight, int Panels, int Rows>
void matmul_tile(const MatmulTask& task, int panel, int row) {
    constexpr int chains = kChains<Panels, Rows>;
    Floats sums[chains][Rows][Panels * kVectors] = {};
    const std::size_t panel_size = task.panel_inputs * kPanel;
    const Weight* weights = static_cast<const Weight*>(task.weights) + static_cast<std::size_t>(panel) * panel_size;
    const float* segment = task.x + row * task.x_row;
    const auto step = [&](const float* x, int chain) {
        for (int p = 0; p < Panels; ++p) {
            for (int v = 0; v < kVectors; ++v) {
                const Floats w = load(weights + static_cast<std::size_t>(p) * panel_size + v * kLanes);
                for (int r = 0; r < Rows; ++r) {
                    sums[chain][r][p * kVectors + v] += w * x[r * task.x_row];
                }
            }
        }
        weights += kPanel;
    };
    for (int s = 0; s < task.segments; ++s, segment += task.x_segment) {
        int i = 0;
        for (; i + chains <= task.inputs; i += chains) {
            for (int chain = 0; chain < chains; ++chain) {
                step(segment + i + chain, chain);
            }
        }
        for (; i < task.inputs; ++i) {
            step(segment + i, 0);
        }
    }
    for (int r = 0; r < Rows; ++r) {
        for (int v = 0; v < Panels * kVectors; ++v) {
            for (int chain = 1; chain < chains; ++chain) {
                sums[0][r][v] += sums[chain][r][v];
            }
        }
    }
    finish<Panels, Rows>(task, panel, row, sums[0]);
}

// The same of 8-bit inputs: sums of integers for each segment, which has a scale of its own.
template <int Panels, int Rows>
void matmul_quantised_tile(const MatmulTask& task, int panel, int row) {
    constexpr int chains = kChains<Panels, Rows>;
    const int depth = quads(task.inputs);  // of a segment
    const std::size_t panel_size = task.panel_inputs * kPanel;
    const std::int8_t* weights =
        static_cast<const std::int8_t*>(task.weights) + static_cast<std::size_t>(panel) * panel_size;
    const std::ptrdiff_t x_row = static_cast<std::ptrdiff_t>(task.segments) * depth * 4;
    const std::int8_t* segment = task.quantised.x + row * x_row;
    Floats totals[Rows][Panels * kVectors] = {};
    for (int s = 0; s < task.segments; ++s, segment += 4 * depth) {
        Ints sums[chains][Rows][Panels * kVectors] = {};
        const auto step = [&](const std::int8_t* x, int chain) {
            for (int r = 0; r < Rows; ++r) {
                std::int32_t inputs;
                __builtin_memcpy(&inputs, x + r * x_row, 4);
                for (int p = 0; p < Panels; ++p) {
                    for (int v = 0; v < kVectors; ++v) {
                        const std::int8_t* const w = weights + static_cast<std::size_t>(p) * panel_size + 4 * v * kLanes;
                        Ints& sum = sums[chain][r][p * kVectors + v];
                        sum = dot4(sum, inputs, w);
                    }
                }
            }
            weights += 4 * kPanel;
        };
        int i = 0;
        for (; i + chains <= depth; i += chains) {
            for (int chain = 0; chain < chains; ++chain) {
                step(segment + 4 * (i + chain), chain);
            }
        }
        for (; i < depth; ++i) {
            step(segment + 4 * i, 0);
        }
        const float* const weight_sums =
            task.quantised.weight_sums + static_cast<std::size_t>(s * panels(task.outputs) + panel) * kPanel;
        for (int r = 0; r < Rows; ++r) {
            const float scale = task.quantised.scales[(row + r) * task.segments + s];
            for (int v = 0; v < Panels * kVectors; ++v) {
                for (int chain = 1; chain < chains; ++chain) {
                    sums[0][r][v] += sums[chain][r][v];
                }
                Floats total = __builtin_convertvector(sums[0][r][v], Floats);
                if constexpr (kInputOffset != 0) {
                    total -= static_cast<float>(kInputOffset) * load(weight_sums + v * kLanes);
                }
                totals[r][v] += scale * total;
            }
        }
    }
    finish<Panels, Rows>(task, panel, row, totals);
}

// The tile of exactly `rows` rows, Rows at most.
template <typename Weight, int Panels, int Rows>
void matmul_rows(const MatmulTask& task, int panel, int row, int rows) {
    if (rows == Rows) {
        if constexpr (sizeof(Weight) == 1) {
            matmul_quantised_tile<Panels, Rows>(task, panel, row);
        } else {
            matmul_tile<Weight, Panels, Rows>(task, panel, row);
        }
    } else if constexpr (Rows > 1) {
        matmul_rows<Weight, Panels, Rows - 1>(task, panel, row, rows);
    }
}

template <typename Weight, int Panels>
void matmul_panels(const MatmulTask& task, int panel, int first_row, int last_row) {
    const int count = last_row - first_row;
    const int tiles = (count + kTileRows - 1) / kTileRows;
    const int most = tiles == 0 ? 1 : (count + tiles - 1) / tiles;  // tiles of one size: a small one computes slowly
    for (int row = first_row; row < last_row; row += most) {
        const int rows = last_row - row < most ? last_row - row : most;
        matmul_rows<Weight, Panels, kTileRows>(task, panel, row, rows);
    }
}

template <typename Weight>
void matmul(const MatmulTask& task, int first_panel, int last_panel, int first_row, int last_row) {
    int panel = first_panel;
    if (last_row - first_row > kStreaming<Weight>) {
        for (; panel + kTilePanels <= last_panel; panel += kTilePanels) {
            matmul_panels<Weight, kTilePanels>(task, panel, first_row, last_row);
        }
    }
    for (; panel < last_panel; ++panel) {
        matmul_panels<Weight, 1>(task, panel, first_row, last_row);
    }
}

// Asks for the cache lines of [p, p + bytes), into the second-level cache, which can wait for more of them at once.
inline void prefetch(const char* p, std::size_t bytes) {
    for (std::size_t at = 0; at < bytes; at += 64) {
        __builtin_prefetch(p + at, 0, 2);
    }
}

float quantise(const float* x, int n, std::int8_t* out) {
    Floats largest{};
    Floats zeros{};  // or NaN, where an input is not finite: the scale hands it on
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const Floats v = load(x + i);
        const Floats magnitude = v < 0.0f ? -v : v;
        largest = magnitude > largest ? magnitude : largest;
        zeros += v - v;
    }
    float most = 0;
    float zero = sum(zeros);
    for (int lane = 0; lane < kLanes; ++lane) {
        most = largest[lane] > most ? largest[lane] : most;
    }
    for (; i < n; ++i) {
        const float magnitude = x[i] < 0 ? -x[i] : x[i];
        most = magnitude > most ? magnitude : most;
        zero += x[i] - x[i];
    }
    const float scale = most > 0 ? 127.0f / most : 0.0f;
    for (i = 0; i + kLanes <= n; i += kLanes) {
        const Floats scaled = load(x + i) * scale;
        const Ints rounded = __builtin_convertvector(scaled + (scaled < 0.0f ? broadcast(-0.5f) : broadcast(0.5f)), Ints);
        store_bytes(out + i, rounded + kInputOffset);
    }
    for (; i < n; ++i) {
        const float scaled = x[i] * scale;
        out[i] = static_cast<std::int8_t>(static_cast<int>(scaled + (scaled < 0 ? -0.5f : 0.5f)) + kInputOffset);
    }
    for (; i % 4 != 0; ++i) {
        out[i] = 0;  // its weights are zero
    }
    return most / 127.0f + zero;
}

template <typename Weight>
float dot(const void* weights, const float* x, int n, const void* next) {
    constexpr int chains = kLanes == 1 ? 1 : 4;
    constexpr int step = chains * kLanes;
    const char* ahead = static_cast<const char*>(next);
    const Weight* const w = static_cast<const Weight*>(weights);
    Floats sums[chains] = {};
    int i = 0;
    for (; i + step <= n; i += step) {
        if (ahead != nullptr) {
            prefetch(ahead + static_cast<std::size_t>(i) * sizeof(Weight), step * sizeof(Weight));
        }
        for (int chain = 0; chain < chains; ++chain) {
            sums[chain] += load(w + i + chain * kLanes) * load(x + i + chain * kLanes);
        }
    }
    for (int chain = 1; chain < chains; ++chain) {
        sums[0] += sums[chain];
    }
    float total = sum(sums[0]);
    for (; i < n; ++i) {
        total += to_float(w[i]) * x[i];
    }
    return total;
}

template <typename Weight>
void axpy(const void* weights, float factor, float* y, int n, const void* next) {
    constexpr int step = kLanes == 1 ? 1 : 4 * kLanes;
    const char* ahead = static_cast<const char*>(next);
    const Weight* const w = static_cast<const Weight*>(weights);
    int i = 0;
    for (; i + step <= n; i += step) {
        if (ahead != nullptr) {
            prefetch(ahead + static_cast<std::size_t>(i) * sizeof(Weight), step * sizeof(Weight));
        }
        for (int j = i; j < i + step; j += kLanes) {
            store(y + j, load(y + j) + factor * load(w + j));
        }
    }
    for (; i + kLanes <= n; i += kLanes) {
        store(y + i, load(y + i) + factor * load(w + i));
    }
    for (; i < n; ++i) {
        y[i] += factor * to_float(w[i]);
    }
}

template <typename Weight>
void unpack(const void* weights, float factor, float* y, int n) {
    const Weight* const w = static_cast<const Weight*>(weights);
    for (int i = 0; i < n; ++i) {
        y[i] = factor * to_float(w[i]);
    }
}

void multiply(const float* a, const float* b, float* y, int n) {
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        store(y + i, load(a + i) * load(b + i));
    }
    for (; i < n; ++i) {
        y[i] = a[i] * b[i];
    }
}

float sum_of(const float* x, int n) {
    Floats sums{};
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        sums += load(x + i);
    }
    float total = sum(sums);
    for (; i < n; ++i) {
        total += x[i];
    }
    return total;
}

float sum_of_squares(const float* x, float centre, int n) {
    Floats sums{};
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const Floats d = load(x + i) - centre;
        sums += d * d;
    }
    float total = sum(sums);
    for (; i < n; ++i) {
        total += (x[i] - centre) * (x[i] - centre);
    }
    return total;
}

void layer_norm(const float* x, const float* gain, const float* bias, float eps, float* y, int n) {
    const float mean = sum_of(x, n) / static_cast<float>(n);
    const float scale = 1.0f / __builtin_sqrtf(sum_of_squares(x, mean, n) / static_cast<float>(n) + eps);
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        store(y + i, (load(x + i) - mean) * scale * load(gain + i) + load(bias + i));
    }
    for (; i < n; ++i) {
        y[i] = (x[i] - mean) * scale * gain[i] + bias[i];
    }
}

void rms_norm(const float* x, const float* gain, float eps, float* y, int n) {
    const float scale = 1.0f / __builtin_sqrtf(sum_of_squares(x, 0, n) / static_cast<float>(n) + eps);
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        store(y + i, load(x + i) * scale * load(gain + i));
    }
    for (; i < n; ++i) {
        y[i] = x[i] * scale * gain[i];
    }
}

float exp1(float x) { return exp(broadcast(x))[0]; }

void softmax(float* x, int n) {
    float largest = x[0];
    for (int i = 1; i < n; ++i) {
        largest = x[i] > largest ? x[i] : largest;
    }
    Floats sums{};
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const Floats e = exp(load(x + i) - largest);
        sums += e;
        store(x + i, e);
    }
    float total = sum(sums);
    for (; i < n; ++i) {
        x[i] = exp1(x[i] - largest);
        total += x[i];
    }
    const float scale = 1.0f / total;
    for (i = 0; i < n; ++i) {
        x[i] *= scale;
    }
}

void gelu(float* x, int n) {
    for (int i = 0; i < n; ++i) {
        x[i] *= 0.5f * (1.0f + ::erff(x[i] * 0.70710678f));
    }
}

void silu_multiply(const float* gate, float* y, int n) {
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const Floats g = load(gate + i);
        store(y + i, load(y + i) * g / (1.0f + exp(-g)));
    }
    for (; i < n; ++i) {
        y[i] *= gate[i] / (1.0f + exp1(-gate[i]));
    }
}

int argmax(const float* x, int n) {
    int best = 0;
    int i = 0;
    if (n >= kLanes) {
        Floats largest = load(x);
        Ints at = {};  // where each lane's largest begins
        for (i = kLanes; i + kLanes <= n; i += kLanes) {
            const Floats v = load(x + i);
            at = v > largest ? Ints{} + i : at;
            largest = v > largest ? v : largest;
        }
        for (int lane = 0; lane < kLanes; ++lane) {
            const int place = at[lane] + lane;
            if (x[place] > x[best] || (x[place] == x[best] && place < best)) {
                best = place;
            }
        }
    }
    for (; i < n; ++i) {
        best = x[i] > x[best] ? i : best;
    }
    return best;
}

float sum_at_the_speed_of_memory(const float* x, std::size_t n, const float* next) {
    constexpr std::size_t chains = kLanes == 1 ? 1 : 8;
    Floats sums[chains] = {};
    std::size_t i = 0;
    for (; i + chains * kLanes <= n; i += chains * kLanes) {
        if (next != nullptr) {
            prefetch(reinterpret_cast<const char*>(next + i), chains * kLanes * sizeof(float));
        }
        for (std::size_t chain = 0; chain < chains; ++chain) {
            sums[chain] += load(x + i + chain * kLanes);
        }
    }
    for (std::size_t chain = 1; chain < chains; ++chain) {
        sums[0] += sums[chain];
    }
    float total = sum(sums[0]);
    for (; i < n; ++i) {
        total += x[i];
    }
    return total;
}

constexpr int kIndependent = 12;  // enough to hide the latency of a multiply-add on two units

float multiply_adds(int rounds) {
    Floats sums[kIndependent];
    for (int i = 0; i < kIndependent; ++i) {
        sums[i] = broadcast(static_cast<float>(i));
    }
    const Floats factor = broadcast(0.999f);
    for (int round = 0; round < rounds; ++round) {
        for (int i = 0; i < kIndependent; ++i) {
            sums[i] = sums[i] * factor + 0.001f;
        }
    }
    for (int i = 1; i < kIndependent; ++i) {
        sums[0] += sums[i];
    }
    return sum(sums[0]);
}

}  // namespace

extern const Kernels TERSE_KERNELS;
const Kernels TERSE_KERNELS = {
    {matmul<float>, matmul<Bf16>, matmul<std::int8_t>},
    quantise,
    {dot<float>, dot<Bf16>, dot<std::int8_t>},
    {axpy<float>, axpy<Bf16>, axpy<std::int8_t>},
    {unpack<float>, unpack<Bf16>, unpack<std::int8_t>},
    multiply,
    layer_norm,
    rms_norm,
    softmax,
    gelu,
    silu_multiply,
    argmax,
    sum_at_the_speed_of_memory,
    multiply_adds,
    kIndependent * kLanes,
};

}  // namespace terse
