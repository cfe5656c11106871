// The kernels of every instruction set that this machine has against plain loops in double precision, without Python, so
// that it runs under an emulator too. Exits with 1 after the first difference.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"

namespace {

using terse::Dtype;
using terse::Kernels;
using terse::kPanel;

std::mt19937 generator(1);

std::vector<float> random(std::size_t size) {
    std::normal_distribution<float> normal;
    std::vector<float> values(size);
    for (float& value : values) {
        value = normal(generator);
    }
    return values;
}

// Numbers of a type, and what they are as floats.
struct Weights {
    Weights(Dtype dtype, std::size_t size) : floats(random(size)), bytes(size * terse::size_of(dtype)) {
        for (std::size_t i = 0; i < size; ++i) {
            if (dtype == Dtype::f32) {
                std::memcpy(&bytes[4 * i], &floats[i], 4);
            } else if (dtype == Dtype::bf16) {
                std::uint32_t bits;
                std::memcpy(&bits, &floats[i], 4);
                const std::uint16_t high = static_cast<std::uint16_t>(bits >> 16);
                std::memcpy(&bytes[2 * i], &high, 2);
                bits = static_cast<std::uint32_t>(high) << 16;
                std::memcpy(&floats[i], &bits, 4);
            } else {
                const std::int8_t number = static_cast<std::int8_t>(std::lround(40 * floats[i]) % 128);
                std::memcpy(&bytes[i], &number, 1);
                floats[i] = number;
            }
        }
    }

    std::vector<float> floats;
    std::vector<char> bytes;
};

void expect(const char* what, double got, double expected, double tolerance) {
    if (std::abs(got - expected) <= tolerance * (1 + std::abs(expected))) {
        return;
    }
    std::printf("%s: %.9g instead of %.9g\n", what, got, expected);
    std::exit(1);
}

void test_matmul(const Kernels& kernels, Dtype dtype, int rows, int inputs, int segments, int outputs, bool add, bool relu) {
    const std::size_t panels = static_cast<std::size_t>(terse::panels(outputs));
    const std::size_t depth = static_cast<std::size_t>(inputs * segments);
    const Weights weights(dtype, panels * depth * kPanel);
    const std::vector<float> scale = random(panels * kPanel);
    const std::vector<float> bias = random(panels * kPanel);
    const int x_segment = inputs + 3;
    const int x_row = x_segment * segments + 1;
    const int y_row = outputs + 2;
    const std::vector<float> x = random(static_cast<std::size_t>(rows * x_row));
    const std::vector<float> before = random(static_cast<std::size_t>(rows * y_row));
    std::vector<float> y = before;
    terse::MatmulTask task{};
    task.weights = weights.bytes.data();
    task.scale = scale.data();
    task.bias = bias.data();
    task.x = x.data();
    task.x_row = x_row;
    task.inputs = inputs;
    task.segments = segments;
    task.x_segment = x_segment;
    task.panel_inputs = depth;
    task.y = y.data();
    task.y_row = y_row;
    task.outputs = outputs;
    task.add = add;
    task.relu = relu;
    kernels.matmul[static_cast<std::size_t>(dtype)](task, 0, static_cast<int>(panels), 0, rows);
    for (int r = 0; r < rows; ++r) {
        for (int o = 0; o < y_row; ++o) {
            const std::size_t at = static_cast<std::size_t>(r * y_row + o);
            if (o >= outputs) {
                expect("beyond the outputs", y[at], before[at], 0);
                continue;
            }
            double total = 0;
            for (int s = 0; s < segments; ++s) {
                for (int i = 0; i < inputs; ++i) {
                    const std::size_t depth_at = static_cast<std::size_t>(s * inputs + i);
                    const std::size_t panel = static_cast<std::size_t>(o / kPanel);
                    total += static_cast<double>(x[static_cast<std::size_t>(r * x_row + s * x_segment + i)]) *
                             weights.floats[(panel * depth + depth_at) * kPanel + static_cast<std::size_t>(o % kPanel)];
                }
            }
            total = total * scale[static_cast<std::size_t>(o)] + bias[static_cast<std::size_t>(o)] + (add ? before[at] : 0.0f);
            expect("matmul", y[at], relu && total < 0 ? 0 : total, 1e-4);
        }
    }
}

// An int8 matrix and inputs that are quantised as the engine does it: the integers' sums are exact.
void test_quantised_matmul(const Kernels& kernels, int rows, int inputs, int segments, int outputs) {
    const int panels = terse::panels(outputs);
    const int depth = 4 * terse::quads(inputs);
    const std::size_t panel_inputs = static_cast<std::size_t>(segments * depth);
    std::uniform_int_distribution<int> any(-127, 127);
    std::vector<std::int8_t> weights(static_cast<std::size_t>(panels * kPanel) * panel_inputs);
    std::vector<float> sums(static_cast<std::size_t>(segments * panels * kPanel));
    const auto weight_at = [&](int segment, int input, int output) -> std::int8_t& {
        const int quad = segment * (depth / 4) + input / 4;
        return weights[(static_cast<std::size_t>(output / kPanel) * panel_inputs / 4 + static_cast<std::size_t>(quad)) * kPanel * 4 +
                       static_cast<std::size_t>(output % kPanel * 4 + input % 4)];
    };
    for (int s = 0; s < segments; ++s) {
        for (int o = 0; o < outputs; ++o) {
            for (int i = 0; i < inputs; ++i) {
                weight_at(s, i, o) = static_cast<std::int8_t>(any(generator));
                sums[static_cast<std::size_t>(s * panels * kPanel + o)] += weight_at(s, i, o);
            }
        }
    }
    const std::vector<float> x = random(static_cast<std::size_t>(rows * segments * inputs));
    const std::vector<float> scale = random(static_cast<std::size_t>(panels * kPanel));
    std::vector<std::int8_t> quantised(static_cast<std::size_t>(rows * segments * depth));
    std::vector<float> scales(static_cast<std::size_t>(rows * segments));
    std::vector<float> y(static_cast<std::size_t>(rows * outputs));
    for (int i = 0; i < rows * segments; ++i) {
        scales[static_cast<std::size_t>(i)] = kernels.quantise(&x[static_cast<std::size_t>(i * inputs)], inputs, &quantised[static_cast<std::size_t>(i * depth)]);
    }
    terse::MatmulTask task{};
    task.weights = weights.data();
    task.scale = scale.data();
    task.inputs = inputs;
    task.segments = segments;
    task.panel_inputs = panel_inputs;
    task.y = y.data();
    task.y_row = outputs;
    task.outputs = outputs;
    task.quantised = {quantised.data(), scales.data(), sums.data()};
    kernels.matmul[static_cast<std::size_t>(Dtype::int8)](task, 0, panels, 0, rows);
    const float nothing = 0;
    std::int8_t zero[4];  // what 0 becomes; the rest is as far from it as its number says
    kernels.quantise(&nothing, 1, zero);
    for (int r = 0; r < rows; ++r) {
        std::vector<double> totals(static_cast<std::size_t>(outputs));
        for (int s = 0; s < segments; ++s) {
            const double step = scales[static_cast<std::size_t>(r * segments + s)];
            for (int i = 0; i < inputs; ++i) {
                const std::int8_t byte = quantised[static_cast<std::size_t>((r * segments + s) * depth + i)];
                const double number = static_cast<std::int8_t>(byte - zero[0]);
                expect("quantise", number * step, x[static_cast<std::size_t>((r * segments + s) * inputs + i)], 0.501 * step);
                for (int o = 0; o < outputs; ++o) {
                    totals[static_cast<std::size_t>(o)] += number * step * weight_at(s, i, o);
                }
            }
        }
        for (int o = 0; o < outputs; ++o) {
            const std::size_t at = static_cast<std::size_t>(o);
            expect("quantised matmul", y[static_cast<std::size_t>(r * outputs + o)], totals[at] * scale[at], 1e-4);
        }
    }
}

void test_vectors(const Kernels& kernels, Dtype dtype, int n) {
    const std::size_t size = static_cast<std::size_t>(n);
    const std::size_t type = static_cast<std::size_t>(dtype);
    const Weights weights(dtype, size);
    const std::vector<float> x = random(size);
    std::vector<float> y = x;
    double total = 0;
    for (std::size_t i = 0; i < size; ++i) {
        total += static_cast<double>(weights.floats[i]) * x[i];
    }
    expect("dot", kernels.dot[type](weights.bytes.data(), x.data(), n, weights.bytes.data()), total, 1e-3);
    kernels.axpy[type](weights.bytes.data(), 0.5f, y.data(), n, nullptr);
    for (std::size_t i = 0; i < size; ++i) {
        expect("axpy", y[i], x[i] + 0.5 * weights.floats[i], 1e-5);
    }
    kernels.unpack[type](weights.bytes.data(), 2.0f, y.data(), n);
    for (std::size_t i = 0; i < size; ++i) {
        expect("unpack", y[i], 2.0 * weights.floats[i], 1e-6);
    }
}

void test_rows(const Kernels& kernels, int n) {
    const std::size_t size = static_cast<std::size_t>(n);
    const std::vector<float> x = random(size);
    const std::vector<float> gain = random(size);
    const std::vector<float> bias = random(size);
    std::vector<float> y(size);
    double mean = 0, squares = 0, variance = 0, largest = x[0], total = 0, sum = 0;
    for (const float value : x) {
        sum += value;
        mean += value / static_cast<double>(n);
        squares += static_cast<double>(value) * value / n;
        largest = std::max(largest, static_cast<double>(value));
    }
    for (const float value : x) {
        variance += (value - mean) * (value - mean) / n;
        total += std::exp(value - largest);
    }
    kernels.layer_norm(x.data(), gain.data(), bias.data(), 1e-3f, y.data(), n);
    for (std::size_t i = 0; i < size; ++i) {
        expect("layer_norm", y[i], (x[i] - mean) / std::sqrt(variance + 1e-3) * gain[i] + bias[i], 1e-4);
    }
    kernels.rms_norm(x.data(), gain.data(), 1e-3f, y.data(), n);
    for (std::size_t i = 0; i < size; ++i) {
        expect("rms_norm", y[i], x[i] / std::sqrt(squares + 1e-3) * gain[i], 1e-4);
    }
    y = x;
    kernels.softmax(y.data(), n);
    for (std::size_t i = 0; i < size; ++i) {
        expect("softmax", y[i], std::exp(x[i] - largest) / total, 1e-6);
    }
    y = x;
    kernels.gelu(y.data(), n);
    for (std::size_t i = 0; i < size; ++i) {
        expect("gelu", y[i], 0.5 * x[i] * (1 + std::erf(x[i] / std::sqrt(2.0))), 1e-5);
    }
    y = bias;
    kernels.silu_multiply(x.data(), y.data(), n);
    for (std::size_t i = 0; i < size; ++i) {
        expect("silu_multiply", y[i], bias[i] * x[i] / (1 + std::exp(-static_cast<double>(x[i]))), 1e-5);
    }
    kernels.multiply(x.data(), gain.data(), y.data(), n);
    for (std::size_t i = 0; i < size; ++i) {
        expect("multiply", y[i], static_cast<double>(x[i]) * gain[i], 1e-6);
    }
    expect("sum", kernels.sum(x.data(), size, nullptr), sum, 1e-4);
    y = x;
    y[size / 2] = y[size - 1] = 9;
    expect("argmax", kernels.argmax(y.data(), n), static_cast<double>(size / 2), 0);
    y[0] = std::numeric_limits<float>::quiet_NaN();
    const int any = kernels.argmax(y.data(), n);
    expect("argmax with NaN is a place", any >= 0 && any < n, 1, 0);
}

}  // namespace

int main() {
    for (const terse::Isa isa : terse::supported_isas()) {
        const Kernels& kernels = terse::kernels_of(isa);
        for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::int8}) {
            for (const int rows : {1, 2, 3, 5, 6, 7, 11, 12, 13, 25}) {
                for (const int outputs : {1, 15, 16, 17, 33, 48}) {
                    if (dtype == Dtype::int8) {
                        test_quantised_matmul(kernels, rows, 7 + outputs, 1, outputs);
                        test_quantised_matmul(kernels, rows, 13, 3, outputs);
                        continue;
                    }
                    test_matmul(kernels, dtype, rows, 7, 1, outputs, rows % 2 == 0, outputs % 2 == 0);
                    test_matmul(kernels, dtype, rows, 13, 3, outputs, rows % 2 == 1, false);
                }
            }
            for (const int n : {1, 3, 8, 16, 31, 64, 65, 200}) {
                test_vectors(kernels, dtype, n);
            }
        }
        for (const int n : {1, 2, 7, 16, 17, 64, 100}) {
            test_rows(kernels, n);
        }
        std::printf("%s: the kernels are right\n", std::string(terse::name(isa)).c_str());
    }
}
