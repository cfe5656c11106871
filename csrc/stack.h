// The layers of an encoder or of a decoder, one after another.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "layers.h"

namespace terse {

// Each layer adds to the first stream what it makes of the second; then, where `swap` says so, they change places.
class Stack {
public:
    void add(std::unique_ptr<Sublayer> layer, bool swap = false) { steps_.push_back({std::move(layer), swap}); }

    // Passes a batch through all layers; gives where the streams lie then.
    Streams apply(Context& context, Streams streams) const;

    // The same for a whole source in consecutive blocks, whose streams lie one behind the other.
    Streams apply(Worker& worker, Workspace& work, const std::vector<Batch>& blocks, Streams streams, int size) const;

private:
    struct Step {
        std::unique_ptr<Sublayer> layer;
        bool swap;
    };

    std::vector<Step> steps_;
};

// Writes the mean of two streams, for all workers to see.
void average(Context& context, Streams streams, float* mean, int size);

}  // namespace terse
