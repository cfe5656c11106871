// Feed-forward layers, and the recurrent branch beside them.
#pragma once

#include <memory>
#include <optional>

#include "layers.h"

namespace terse {

class FeedForward {
public:
    virtual ~FeedForward() = default;

    // Adds the layer's output for the normalised rows `x` to the stream `y`, for all workers to see.
    virtual void apply(Context& context, const float* x, float* y) const = 0;
};

std::unique_ptr<FeedForward> make_feed_forward(Builder& builder, const std::string& name, int size);

// Dense to a narrow width, simple recurrent units there, and dense back.
class RecurrentBranch {
public:
    RecurrentBranch(Builder& builder, const std::string& name, int size, int width, int layers);

    // Writes the branch's output for the normalised rows `x` into `work.branch`, for all workers to see.
    void apply(Context& context, const float* x) const;

private:
    int width_;
    Dense down_, up_;
    std::vector<Dense> gates_;
    std::vector<int> carries_;
};

// The two of them, each behind a norm of its own.
class FeedForwardLayer : public Sublayer {
public:
    FeedForwardLayer(Builder& builder, const std::string& name);
    void apply(Context& context, const float* in, float* out) const override;

private:
    int size_;
    Norm norm_;
    std::unique_ptr<FeedForward> feed_forward_;
    std::optional<Norm> recurrent_norm_;
    std::optional<RecurrentBranch> recurrent_;
};

}  // namespace terse
