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

Streams Stack::apply(Worker& worker, Workspace& work, const std::vector<Batch>& blocks, Streams streams,
                     int size) const {
    for (const Step& step : steps_) {
        for (const Batch& block : blocks) {
            Context context{worker, block, work};
            step.layer->prepare(context, streams.at(block, size).second);
        }
        for (const Batch& block : blocks) {
            Context context{worker, block, work};
            const Streams rows = streams.at(block, size);
            step.layer->apply(context, rows.second, rows.first);
        }
        if (step.swap) {
            std::swap(streams.first, streams.second);
        }
    }
    return streams;
}

void average(Context& context, Streams streams, float* mean, int size) {
    const Range part = context.worker.share(context.rows() * size);
    for (int i = part.begin; i < part.end; ++i) {
        mean[i] = (streams.first[i] + streams.second[i]) / 2;
    }
    context.worker.barrier();
}

}  // namespace terse
