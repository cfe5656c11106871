#include "engine.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "kernels.h"

namespace terse {

Writer::Writer(Session& session, const Sampling& sampling, int max_tokens, std::vector<std::int32_t> stop_ids,
               std::vector<std::string> stops, const std::vector<std::string>& pieces, bool trace)
    : session_(session),
      sampler_(sampling, session.shape().vocab_size),
      stops_(std::move(stops), pieces),
      stop_ids_(stop_ids.begin(), stop_ids.end()),
      left_(max_tokens),
      trace_(trace),
      touched_{0, index(session.shape().choices), {}} {}

void Writer::see(const std::int32_t* tokens, int count) {
    std::for_each(tokens, tokens + count, [this](std::int32_t token) { sampler_.see(token); });
}

void Writer::allow(std::vector<std::uint8_t> allowed) {
    const Session::Use use(session_);
    if (allowed.size() != sampler_.vocab_size()) {
        throw std::invalid_argument("the model has " + std::to_string(sampler_.vocab_size()) + " tokens, not " +
                                    std::to_string(allowed.size()));
    }
    allowed_ = std::move(allowed);
}

void Writer::draw() {
    const std::int32_t token = sampler_.next(session_.logits(), allowed_.empty() ? nullptr : allowed_.data());
    allowed_.clear();
    if (token < 0) {
        finish_ = sampler_.failure();
        return;
    }
    sampler_.see(token);
    tokens_.push_back(token);
    pending_ = token;
    --left_;
    if (stop_ids_.contains(token)) {
        finish_ = Finish::eos;
    } else if (stops_.push(token)) {
        finish_ = Finish::stop;
    } else if (left_ == 0 || session_.length() + 1 >= session_.limit()) {
        finish_ = Finish::length;
    }
}

Choice* Writer::note() {
    if (!trace_) {
        return nullptr;
    }
    touched_.choices.resize(++touched_.tokens * touched_.each);
    return touched_.choices.data() + touched_.choices.size() - touched_.each;
}

Touched Writer::take_touched() {
    const Session::Use use(session_);
    return std::exchange(touched_, {0, touched_.each, {}});
}

Engine::Engine(std::shared_ptr<const Model> model, int threads, int rows, int runs, bool poison)
    : model_(std::move(model)),
      team_(threads),
      work_(model_->sizes(), model_->hidden_size(), model_->max_places(), rows, runs, threads, poison),
      poison_(poison) {
    kernels();  // an instruction set that is not there is refused here, and not in the midst of the team's work
}

void Engine::check(const Session& session) const {
    if (session.shape() != model_->session_shape()) {
        throw std::invalid_argument("the session was made for another model");
    }
}

void Engine::check_tokens(const std::int32_t* tokens, int count) const {
    for (int i = 0; i < count; ++i) {
        if (tokens[i] < 0 || tokens[i] >= model_->vocab_size()) {
            throw std::invalid_argument("the token " + std::to_string(tokens[i]) + " at place " + std::to_string(i) +
                                        " is not in [0, " + std::to_string(model_->vocab_size()) + ")");
        }
    }
}

std::unique_ptr<Reading> Engine::begin_source(Session& session, const std::int32_t* tokens, int count) {
    const Session::Use use(session);
    check(session);
    if (!session.waits_for_source() || count != session.source_length()) {
        throw std::invalid_argument("the session has no room for a source of " + std::to_string(count) + " tokens");
    }
    check_tokens(tokens, count);
    return std::make_unique<Reading>(model_, session, tokens, count, work_.rows, poison_);
}

bool Engine::read_source(Reading& reading, std::chrono::microseconds time) {
    const Session::Use use(reading.session());
    const std::lock_guard lock(callers_);
    if (&reading.model() != model_.get()) {
        throw std::invalid_argument("the source was begun by another model");
    }
    if (!reading.done() && !reading.session().waits_for_source()) {
        throw std::invalid_argument("the session has read its source another time");
    }
    const auto end = std::chrono::steady_clock::now() + time;
    bool stopped = reading.done();
    if (!stopped) {
        work_.source = &reading.rows();
        team_.run([&](Worker& worker) {
            do {
                reading.apply(worker, work_);
                worker.barrier();
                if (worker.index() == 0) {
                    reading.next();
                    stopped = reading.done() || std::chrono::steady_clock::now() >= end;
                }
                worker.barrier();
            } while (!stopped);
        });
        work_.source = nullptr;
        if (reading.done()) {
            reading.session().end_source();
        }
    }
    return reading.done();
}

void Engine::read(Session& session, const std::int32_t* tokens, int count, float* logits) {
    const Session::Use use(session);
    const std::lock_guard lock(callers_);
    check(session);
    if (session.waits_for_source()) {
        throw std::invalid_argument("the session waits for its source");
    }
    if (count > session.capacity() - session.length()) {
        throw std::invalid_argument(std::to_string(count) + " more tokens do not fit the session: it holds " +
                                    std::to_string(session.length()) + " of " + std::to_string(session.capacity()));
    }
    check_tokens(tokens, count);
    int start = 0;
    for (const Batch& batch : blocks(session, tokens, count, work_.rows)) {
        const int rows = batch.rows();
        float* const kept = logits == nullptr ? nullptr : logits + index(start) * index(model_->vocab_size());
        start += rows;
        team_.run([&](Worker& worker) {
            Context context{worker, batch, work_};
            model_->forward(context);
            if (kept != nullptr) {
                model_->logits(context, 0, rows, kept);
            }
            if (start == count) {
                model_->logits(context, rows - 1, rows, session.logits());
            }
        });
        session.advance(rows);
    }
}

// Reads a token of each session, whose logits are then those of the next. Those of several rows go by way of `logits`.
void Engine::read_each(Context& context, float* logits) const {
    const std::size_t vocab_size = index(model_->vocab_size());
    const std::vector<Run>& runs = context.batch.runs;
    const int rows = context.rows();
    model_->forward(context);
    float* const out = rows == 1 ? runs[0].session->logits() : logits;
    model_->logits(context, 0, rows, out);
    for (int row = context.worker.index(); rows > 1 && row < rows; row += context.worker.count()) {
        std::copy_n(out + index(row) * vocab_size, vocab_size, runs[index(row)].session->logits());
    }
    context.worker.barrier();
}

Found Engine::search(Session& session, const Search& search, std::vector<std::int32_t> before,
                     std::vector<std::int32_t> stop_ids) {
    const Session::Use use(session);
    const std::lock_guard lock(callers_);
    check(session);
    check_tokens(before.data(), static_cast<int>(before.size()));
    if (session.length() == 0 || search.max_tokens > session.limit() - session.length()) {
        throw std::invalid_argument("the session has read nothing, or has no room for " +
                                    std::to_string(search.max_tokens) + " more tokens");
    }
    BeamSearch beams(session, search, std::move(before), std::move(stop_ids), work_.runs);
    Buffer logits(index(work_.runs) * index(model_->vocab_size()));
    team_.run([&](Worker& worker) {
        for (;;) {
            beams.rank(worker);
            worker.barrier();
            if (worker.index() == 0) {
                beams.choose();
            }
            worker.barrier();
            if (beams.done()) {
                return;
            }
            beams.take(worker);
            worker.barrier();
            for (const Batch& batch : beams.batches()) {
                if (batch.rows() > 0) {
                    Context context{worker, batch, work_};
                    read_each(context, logits.data());
                }
            }
        }
    });
    return beams.best();
}

std::vector<std::vector<std::int32_t>> Engine::write(const std::vector<Writer*>& writers, int steps,
                                                     std::chrono::microseconds time) {
    std::vector<Session::Use> uses;
    for (Writer* const writer : writers) {
        check(writer->session_);
        uses.emplace_back(writer->session_);
    }
    if (writers.size() > index(work_.runs)) {
        throw std::invalid_argument("the engine writes " + std::to_string(work_.runs) + " texts together, not " +
                                    std::to_string(writers.size()));
    }
    const std::lock_guard lock(callers_);
    const auto end = std::chrono::steady_clock::now() + time;
    std::vector<Writer*> active;
    for (Writer* const writer : writers) {
        if (writer->pending_ >= 0 && writer->session_.length() >= writer->session_.capacity()) {
            writer->finish_ = Finish::length;  // the caller has read something else in the meantime
        }
        if (writer->finish_ == Finish::no) {
            active.push_back(writer);
        }
    }
    Batch batch;
    bool done = active.empty() || steps == 0;
    int step = 0;
    Buffer logits(active.size() > 1 ? active.size() * index(model_->vocab_size()) : 0);
    if (!done) {
        team_.run([&](Worker& worker) {
            Context context{worker, batch, work_};
            for (;;) {
                if (worker.index() == 0) {  // what was drawn and not read, one row each
                    batch.runs.clear();
                    batch.tokens.clear();
                    batch.positions.clear();
                    batch.touched.clear();
                    for (Writer* const writer : active) {
                        if (writer->pending_ >= 0) {
                            batch.runs.push_back({&writer->session_, batch.rows(), 1});
                            batch.positions.push_back(writer->session_.length());
                            batch.tokens.push_back(writer->pending_);
                            batch.touched.push_back(writer->note());
                        }
                    }
                }
                worker.barrier();
                if (batch.rows() > 0) {
                    read_each(context, logits.data());
                }
                for (std::size_t i = index(worker.index()); i < active.size(); i += index(worker.count())) {
                    if (active[i]->pending_ >= 0) {
                        active[i]->session_.advance(1);
                    }
                    active[i]->draw();
                }
                worker.barrier();
                if (worker.index() == 0) {
                    std::erase_if(active, [](const Writer* writer) { return writer->finish_ != Finish::no; });
                    done = active.empty() || ++step == steps || std::chrono::steady_clock::now() >= end;
                }
                worker.barrier();
                if (done) {
                    return;
                }
            }
        });
    }
    std::vector<std::vector<std::int32_t>> written;
    for (Writer* const writer : writers) {
        written.push_back(std::move(writer->tokens_));
        writer->tokens_.clear();
    }
    return written;
}

}  // namespace terse
