#include "reading.h"

#include <algorithm>
#include <utility>

namespace terse {

std::vector<Batch> blocks(Session& session, const std::int32_t* tokens, int count, int rows) {
    std::vector<Batch> blocks;
    const int most = std::min(rows, session.longest_run());
    for (int start = 0; start < count; start += most) {
        const int size = std::min(most, count - start);
        blocks.push_back({{{&session, 0, size}}, {tokens + start, tokens + start + size}, {}, {}});
        for (int i = 0; i < size; ++i) {
            blocks.back().positions.push_back(session.length() + start + i);
        }
    }
    return blocks;
}

Reading::Reading(std::shared_ptr<const Model> model, Session& session, const std::int32_t* tokens, int count, int rows,
                 bool poison)
    : model_(std::move(model)),
      session_(session),
      encoder_(*model_->encoder_shape(), count, poison),
      encoding_(blocks(encoder_, tokens, count, rows)),
      decoding_(blocks(session, tokens, count, rows)) {
    const std::size_t size = index(count) * index(model_->hidden_size());
    rows_.first = Buffer(size, poison);
    rows_.second = Buffer(model_->sizes().second == 0 ? 0 : size, poison);
    rows_.queries = Buffer(size, poison);
}

void Reading::apply(Worker& worker, Workspace& work) const {
    const std::vector<Stage>& stages = model_->source_stages();
    const bool is_last = stage_ == stages.size();
    Context context{worker, (is_last ? decoding_ : encoding_)[block_], work};
    const Streams streams =
        Streams{rows_.first.data(), (rows_.second.size() == 0 ? rows_.first : rows_.second).data()}.at(
            context.batch, model_->hidden_size());
    if (is_last) {
        model_->decode_source(context, streams);
    } else {
        stages[stage_](context, streams);
    }
}

void Reading::next() {
    const bool is_last = stage_ == model_->source_stages().size();
    if (++block_ == (is_last ? decoding_ : encoding_).size()) {
        block_ = 0;
        ++stage_;
    }
}

}  // namespace terse
