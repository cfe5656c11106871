// A source on its way through a model, a block at a time, so that others need not wait until all of it is read.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "model.h"

namespace terse {

// A session's next tokens in consecutive batches of `rows` at most.
std::vector<Batch> blocks(Session& session, const std::int32_t* tokens, int count, int rows);

class Reading {
public:
    // `session` waits for a source of `count` known tokens and must outlive this; `rows` pass through the model together.
    Reading(std::shared_ptr<const Model> model, Session& session, const std::int32_t* tokens, int count, int rows,
            bool poison);

    const Model& model() const { return *model_; }
    Session& session() const { return session_; }
    bool done() const { return stage_ > model_->source_stages().size(); }

    // Passes a block through a stage; all workers call it together, and then one of them `next`, with a barrier before
    // and behind that.
    void apply(Worker& worker, Workspace& work) const;
    void next();

    SourceRows& rows() { return rows_; }

private:
    std::shared_ptr<const Model> model_;
    Session& session_;
    Session encoder_;
    std::vector<Batch> encoding_, decoding_;  // of the stages, and of what follows them
    SourceRows rows_;
    std::size_t stage_ = 0;
    std::size_t block_ = 0;
};

}  // namespace terse
