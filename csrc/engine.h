// Reads prompts and writes text: the token loop over a model, a team and a workspace.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_set>
#include <vector>

#include "beam.h"
#include "model.h"
#include "reading.h"
#include "sampler.h"

namespace terse {

// The choices of some tokens' sparse feed-forward layers, in the order of the layers.
struct Touched {
    std::size_t tokens;
    std::size_t each;             // choices of a token
    std::vector<Choice> choices;  // [tokens][each]
};

// A text that is being written.
class Writer {
public:
    // `pieces`, the bytes of each token, is needed for stop strings alone. Both pointers must outlive the writer. With
    // `trace`, the choices of each token that is read while the text is written are kept until they are taken.
    Writer(Session& session, const Sampling& sampling, int max_tokens, std::vector<std::int32_t> stop_ids,
           std::vector<std::string> stops, const std::vector<std::string>& pieces, bool trace);

    Finish finish() const { return finish_; }
    void see(const std::int32_t* tokens, int count);

    // Only tokens whose `allowed`, [vocab_size], is not 0 may be drawn next; those after it are free again.
    // Throws std::invalid_argument when it has another length.
    void allow(std::vector<std::uint8_t> allowed);

    // What the tokens read since the last call have touched.
    Touched take_touched();

private:
    friend class Engine;

    // Draws a token from the session's logits and says whether it is the last.
    void draw();

    // Where the choices of the next token that is read are noted; null: nowhere.
    Choice* note();

    Session& session_;
    Sampler sampler_;
    StopStrings stops_;
    std::unordered_set<std::int32_t> stop_ids_;
    int left_;
    std::int32_t pending_ = -1;  // drawn but not read yet
    Finish finish_ = Finish::no;
    std::vector<std::uint8_t> allowed_;  // empty: all
    std::vector<std::int32_t> tokens_;  // drawn since the caller last took them
    bool trace_;
    Touched touched_;
};

class Engine {
public:
    // `rows` tokens at most pass through the model together, of `runs` sessions at most.
    Engine(std::shared_ptr<const Model> model, int threads, int rows, int runs, bool poison);

    const Model& model() const { return *model_; }
    int threads() const { return team_.size(); }

    // Begins to read a source into a session that has room for it and has read nothing yet. Throws std::invalid_argument
    // when the model has no source, the source is of another length, or a token is unknown.
    std::unique_ptr<Reading> begin_source(Session& session, const std::int32_t* tokens, int count);

    // Goes on reading a source until all is read or a step ends after `time`; says whether all is read.
    bool read_source(Reading& reading, std::chrono::microseconds time);

    // Reads tokens into a session; its logits are then those of the next token. With `logits`, [count][vocab_size], all
    // of them are kept. Throws std::invalid_argument when a token is unknown or the session is full.
    void read(Session& session, const std::int32_t* tokens, int count, float* logits = nullptr);

    // The likeliest text after what a session has read, which goes on where it is. `before` and `stop_ids` as those of
    // BeamSearch.
    Found search(Session& session, const Search& search, std::vector<std::int32_t> before,
                 std::vector<std::int32_t> stop_ids);

    // Writes on, a token for every unfinished writer at each step, until all are finished or `steps` are done, or a
    // step ends after `time`. Gives what each has written.
    std::vector<std::vector<std::int32_t>> write(const std::vector<Writer*>& writers, int steps,
                                                 std::chrono::microseconds time);

private:
    void check(const Session& session) const;
    void check_tokens(const std::int32_t* tokens, int count) const;
    void read_each(Context& context, float* logits) const;

    std::shared_ptr<const Model> model_;
    Team team_;
    Workspace work_;
    bool poison_;
    std::mutex callers_;
};

}  // namespace terse
