#include "stack.h"

namespace terse {

Streams Stack::apply(Context& context, Streams streams) const {
    for (const Step& step : steps_) {
        step.layer->apply(context, streams.second, streams.first);
        if (step.swap) {
            std::swap(streams.first, streams.second);
        }
    }
    return streams;
}

bool Stack::add_stages(std::vector<Stage>& stages) const {
    bool swapped = false;
    for (const Step& step : steps_) {
        const Sublayer* const layer = step.layer.get();
        stages.push_back([layer, swapped](Context& context, Streams streams) {
            layer->prepare(context, swapped ? streams.first : streams.second);
        });
        stages.push_back([layer, swapped](Context& context, Streams streams) {
            if (swapped) {
                std::swap(streams.first, streams.second);
            }
            layer->apply(context, streams.second, streams.first);
        });
        swapped ^= step.swap;
    }
    return swapped;
}

void average(Context& context, Streams streams, float* mean, int size) {
    const Range part = context.worker.share(context.rows() * size);
    for (int i = part.begin; i < part.end; ++i) {
        mean[i] = (streams.first[i] + streams.second[i]) / 2;
    }
    context.worker.barrier();
}

}  // namespace terse
