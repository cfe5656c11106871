// The layers of an encoder or of a decoder, one after another.
#pragma once

#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "layers.h"

namespace terse {

// What is done with each block of a source before the first one goes through the next stage. All workers call it together
// and see what it has done.
using Stage = std::function<void(Context&, Streams)>;

// Each layer adds to the first stream what it makes of the second; then, where `swap` says so, they change places.
class Stack {
public:
    void add(std::unique_ptr<Sublayer> layer, bool swap = false) { steps_.push_back({std::move(layer), swap}); }

    // Passes a batch through all layers; gives where the streams lie then.
    Streams apply(Context& context, Streams streams) const;

    // The same in stages, for the blocks of a source; says whether the streams have changed places at the end.
    bool add_stages(std::vector<Stage>& stages) const;

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
