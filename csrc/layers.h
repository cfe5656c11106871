// Replacements of a dense layer, in their decoding form. Each keeps the name that it has in layers/projection.py.
//
// All workers call a layer together. They must see its input before; its output is theirs to see after the next
// barrier.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "context.h"
#include "kernels.h"
#include "options.h"
#include "tensors.h"

namespace terse {

// What the layers of a model are made from, and what they ask for while they are made.
struct Builder {
    const Tensors& tensors;
    const Options& options;
    Dtype dtype;  // of the large matrices
    Sizes& sizes;
    SessionShape& shape;

    // A slot of `size` floats in every session's memory.
    int new_memory(std::size_t size) {
        shape.memories.push_back(size);
        return static_cast<int>(shape.memories.size()) - 1;
    }

    // The first of `groups` places among a token's choices.
    int new_choices(int groups) {
        shape.choices += groups;
        return shape.choices - groups;
    }
};

// A part of a matrix product: panels of the matrix times rows of the input.
struct Share {
    Range panels;
    Range rows;
};

// A worker's share: of the panels where these are many, so that each weight is read once, else of the rows.
Share share(const Worker& worker, int panels, int rows);

// A matrix in panels, with scales where it is int8, and a bias.
struct Matrix {
    Matrix(const Builder& builder, const std::string& name, int inputs, int outputs, bool bias, int segments = 1);

    // The product with some rows, to be completed where it differs from y = x W + b.
    MatmulTask task(const float* x, std::ptrdiff_t x_row, float* y, std::ptrdiff_t y_row) const;
    void multiply(Context& context, MatmulTask task, const Share& share) const;

    Dtype dtype;
    const void* weights;
    const float* scale = nullptr;
    const float* sums = nullptr;  // of int8 weights, for each segment and output
    const float* bias = nullptr;
    int inputs;  // of a segment
    int outputs;
    int segments;
};

struct Norm {
    Norm(const Builder& builder, const std::string& name, int size);

    // The normalised rows, visible to this worker: all workers compute a few rows each, or the single one for itself.
    const float* apply(Context& context, const float* x) const;
    void row(const float* x, float* y) const;

    const float* gain;
    const float* bias = nullptr;  // null: RMS norm
    float eps;
    int size;
};

// y = layer(x), or y += layer(x); x [rows][inputs], y [rows][outputs]. But for the last one of a model, `rows` are all
// rows of the batch.
class Layer {
public:
    virtual ~Layer() = default;
    virtual void apply(Context& context, const float* x, int rows, float* y, bool add = false) const = 0;
};

// What adds to a stream: out += f(norm(in)), all rows of the batch. Both may be the same stream, and are for all workers
// to see.
class Sublayer {
public:
    virtual ~Sublayer() = default;

    // What it has to know of all rows of a source before it is applied to the first of them.
    virtual void prepare(Context&, const float* /* in */) const {}

    virtual void apply(Context& context, const float* in, float* out) const = 0;
};

class Dense : public Layer {
public:
    Dense(const Builder& builder, const std::string& name, int inputs, int outputs, bool bias)
        : matrix_(builder, name, inputs, outputs, bias) {}
    void apply(Context& context, const float* x, int rows, float* y, bool add = false) const override;

private:
    Matrix matrix_;
};

class LowRank : public Layer {
public:
    LowRank(const Builder& builder, const std::string& name, int inputs, int outputs, int rank);
    void apply(Context& context, const float* x, int rows, float* y, bool add = false) const override;

private:
    Dense down_, up_;
};

class Multiplicative : public Layer {
public:
    Multiplicative(const Builder& builder, const std::string& name, int inputs, int outputs, int modules,
                   bool bias = true);
    void apply(Context& context, const float* x, int rows, float* y, bool add = false) const override;

    // The same with outputs that lie `y_row` floats apart.
    void apply(Context& context, const float* x, int rows, float* y, std::ptrdiff_t y_row, bool add) const;

private:
    bool wide() const { return panels(width_) > modules_; }

    const float* gates_;  // D [modules][inputs]
    Matrix features_;     // E
    const float* bias_ = nullptr;
    int inputs_, modules_, width_;
};

// A convolution over modules and time. Its frames lie in the workspace: those of each run behind its past ones, each
// with zeros on both sides for the modules beyond the edges.
class LocalConvolution : public Layer {
public:
    LocalConvolution(Builder& builder, const std::string& name, int module_in, int module_out, int modules,
                     int module_kernel, int length_kernel, bool has_memory = true);

    void apply(Context& context, const float* x, int rows, float* y, bool add = false) const override;

    // The three steps of `apply`, with a barrier between each: where the frame of a run's first token lies (its
    // features begin `pad()` floats later); the past frames copied before it; the convolution of all runs, `skip`
    // floats into each frame; the last frames kept as the next past.
    float* frame(const Context& context, const Run& run) const;
    void recall(Context& context) const;
    void convolve(Context& context, float* y, bool add, int skip = 0) const;
    void remember(Context& context) const;

    std::ptrdiff_t frame_size() const { return frame_; }
    int pad() const { return pad_; }

    // Lets another layer's frames, which hold what this one needs, serve this one.
    void share_frames(const LocalConvolution& other) { frame_ = other.frame_; }

private:
    void write(Context& context, const float* x) const;

    Matrix kernel_;
    int module_in_, module_out_, modules_, past_;
    int pad_;
    std::ptrdiff_t frame_;
    int memory_ = -1;
};

// Matrices of their own for each of some modules, whose inputs may overlap.
class Modules {
public:
    Modules(const Builder& builder, const std::string& name, const float* bias, int modules, int inputs, int outputs,
            int input_step);
    void apply(Context& context, const float* x, int rows, std::ptrdiff_t x_row, float* y, bool add) const;

private:
    std::vector<Matrix> matrices_;
    const float* bias_;
    int outputs_, input_step_;
};

class LocallyConnected : public Layer {
public:
    LocallyConnected(const Builder& builder, const std::string& name, int size, int modules, int module_kernel);
    void apply(Context& context, const float* x, int rows, float* y, bool add = false) const override;

private:
    int size_, width_, pad_, padded_;
    Modules modules_;
};

class MultiplicativeModular : public Layer {
public:
    MultiplicativeModular(const Builder& builder, const std::string& name, int size, int modules);
    void apply(Context& context, const float* x, int rows, float* y, bool add = false) const override;

private:
    int size_;
    Multiplicative first_;
    Modules second_;
};

}  // namespace terse
