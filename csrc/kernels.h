// The inner loops. They are compiled once for each instruction set; `kernels()` gives the set in use.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace terse {

enum class Dtype { f32, bf16, int8 };
constexpr int kDtypes = 3;

constexpr std::size_t size_of(Dtype dtype) {
    return dtype == Dtype::f32 ? 4 : dtype == Dtype::bf16 ? 2 : 1;
}

// A matrix is stored in panels of 16 outputs: in a panel, the 16 weights of one input lie side by side. One token
// reads a panel as one stream, several rows share each weight that was read, and no sum is taken across a vector.
constexpr int kPanel = 16;

constexpr int panels(int outputs) { return (outputs + kPanel - 1) / kPanel; }

// An int8 matrix has four inputs of an output side by side, [panels][inputs / 4][kPanel][4], and is multiplied by inputs
// of 8 bits too, which `quantise` makes of each piece of a row.
constexpr int quads(int inputs) { return (inputs + 3) / 4; }

struct Quantised {
    const std::int8_t* x;      // [rows][segments][4 * quads(inputs)]
    const float* scales;       // [rows][segments]
    const float* weight_sums;  // [segments][panels * kPanel], over the inputs
};

// y[r][o] = scale[o] * sum over i of x[r][i] w[i][o], + bias[o], for some rows and panels.
struct MatmulTask {
    const void* weights;          // [panels][inputs][kPanel]
    const float* scale = nullptr;  // [panels * kPanel], of int8 weights
    const float* bias = nullptr;   // [panels * kPanel], may be null
    const float* x;
    std::ptrdiff_t x_row;            // floats between rows
    int inputs;                      // of one segment
    int segments = 1;                // a row is made of so many pieces (a convolution's frames)
    std::ptrdiff_t x_segment = 0;    // floats between them
    std::size_t panel_inputs;        // inputs * segments, or more where a panel holds room to grow
    float* y;
    std::ptrdiff_t y_row;
    int outputs;       // of all panels; those beyond are not stored
    bool add = false;  // y += instead of y =
    bool relu = false;
    Quantised quantised{};  // of int8 weights, in place of x
};

struct Kernels {
    using Matmul = void (*)(const MatmulTask&, int first_panel, int last_panel, int first_row, int last_row);
    // `next` is read soon: as many bytes from there on are asked for meanwhile, a few at a time.
    using Dot = float (*)(const void* weights, const float* x, int n, const void* next);
    using Axpy = void (*)(const void* weights, float factor, float* y, int n, const void* next);

    std::array<Matmul, kDtypes> matmul;
    float (*quantise)(const float* x, int n, std::int8_t* out);  // a row and zeros up to a multiple of 4; its scale
    std::array<Dot, kDtypes> dot;    // sum of w[i] x[i]
    std::array<Axpy, kDtypes> axpy;  // y[i] += factor * w[i]
    void (*unpack[kDtypes])(const void* weights, float factor, float* y, int n);  // y[i] = factor * w[i]
    void (*multiply)(const float* a, const float* b, float* y, int n);            // y[i] = a[i] b[i]
    void (*layer_norm)(const float* x, const float* gain, const float* bias, float eps, float* y, int n);
    void (*rms_norm)(const float* x, const float* gain, float eps, float* y, int n);
    void (*softmax)(float* x, int n);  // in place
    void (*gelu)(float* x, int n);     // in place, x Phi(x)
    void (*silu_multiply)(const float* gate, float* y, int n);  // y[i] *= gate[i] sigmoid(gate[i])
    int (*argmax)(const float* x, int n);                       // the first of equals

    // For the floors: a sum at the speed of memory, and multiply-adds at the speed of registers.
    float (*sum)(const float* x, std::size_t n, const float* next);
    float (*multiply_adds)(int rounds);
    int multiply_adds_of_a_round;
};

// Those of an instruction set that is supported, and those of the active one.
const Kernels& kernels_of(Isa isa);
const Kernels& kernels();

}  // namespace terse
