// The Python side: the only file that knows Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "cores.h"
#include "engine.h"
#include "floors.h"
#include "isa.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Array = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using Tokens = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Mask = nb::ndarray<const bool, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

terse::Dtype dtype_of(const std::string& name, const Array& array) {
    if (array.dtype() == nb::dtype<float>()) {
        return terse::Dtype::f32;
    }
    if (array.dtype() == nb::dtype<std::uint16_t>()) {
        return terse::Dtype::bf16;
    }
    if (array.dtype() == nb::dtype<std::int8_t>()) {
        return terse::Dtype::int8;
    }
    throw std::invalid_argument("the weights' " + name + " is neither float32, uint16 (for bfloat16) nor int8");
}

// A model with the arrays that its weights lie in.
struct LoadedModel {
    LoadedModel(std::map<std::string, terse::Options::Value> options, std::map<std::string, Array> arrays_)
        : arrays(std::move(arrays_)), model(std::make_shared<terse::Model>(terse::Options(std::move(options)), view())) {}

    const terse::Tensors& view() {
        for (const auto& [name, array] : arrays) {
            std::vector<std::int64_t> shape;
            for (std::size_t i = 0; i < array.ndim(); ++i) {
                shape.push_back(static_cast<std::int64_t>(array.shape(i)));
            }
            const terse::Dtype dtype = dtype_of(name, array);
            if (reinterpret_cast<std::uintptr_t>(array.data()) % terse::size_of(dtype) != 0) {
                throw std::invalid_argument("the weights' " + name + " do not begin at a multiple of their size");
            }
            tensors.add(name, {array.data(), dtype, std::move(shape)});
        }
        return tensors;
    }

    std::map<std::string, Array> arrays;
    terse::Tensors tensors;
    std::shared_ptr<const terse::Model> model;
};

nb::object numpy(std::vector<float> values) {
    auto* const kept = new std::vector<float>(std::move(values));
    nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<float>*>(p); });
    return nb::cast(nb::ndarray<nb::numpy, float, nb::ndim<1>>(kept->data(), {kept->size()}, owner));
}

// [tokens][choices of a token][index and active]
nb::object numpy(terse::Touched touched) {
    auto* const kept = new terse::Touched(std::move(touched));
    nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<terse::Touched*>(p); });
    static_assert(sizeof(terse::Choice) == 2 * sizeof(std::int32_t));
    return nb::cast(nb::ndarray<nb::numpy, std::int32_t, nb::ndim<3>>(kept->choices.data(),
                                                                      {kept->tokens, kept->each, 2}, owner));
}

void require_size(const Floats& logits, std::size_t vocab_size) {
    if (logits.size() != vocab_size) {
        throw std::invalid_argument("there must be " + std::to_string(vocab_size) + " logits, not " +
                                    std::to_string(logits.size()));
    }
}

// The bytes of each token.
struct Pieces {
    std::vector<std::string> bytes;
};

const char* name_of(terse::Finish finish) {
    switch (finish) {
        case terse::Finish::no: return "";
        case terse::Finish::stop: return "stop";
        case terse::Finish::eos: return "eos";
        case terse::Finish::length: return "length";
        case terse::Finish::not_finite: return "not_finite";
        case terse::Finish::repeats: return "repeats";
    }
    return "";
}

}  // namespace

NB_MODULE(_native, m) {
    m.def("isa", [] { return terse::name(terse::active_isa()); });
    m.def("supported_isas", [] {
        std::vector<std::string_view> names;
        for (const terse::Isa isa : terse::supported_isas()) {
            names.push_back(terse::name(isa));
        }
        return names;
    });
    m.def("physical_cores", &terse::physical_cores, "root"_a = "/");

    nb::class_<LoadedModel>(m, "Model")
        .def(nb::init<std::map<std::string, terse::Options::Value>, std::map<std::string, Array>>(), "options"_a,
             "tensors"_a);

    nb::class_<terse::Session>(m, "Session")
        .def("__init__",
             [](terse::Session* self, const LoadedModel& model, int capacity, bool poison, int source_length) {
                 if (capacity < 1 || capacity > model.model->max_positions()) {
                     throw std::invalid_argument("a session's capacity must lie in [1, " +
                                                 std::to_string(model.model->max_positions()) + "], not " +
                                                 std::to_string(capacity));
                 }
                 const int longest = model.model->encoder_shape() != nullptr ? model.model->max_positions() : 0;
                 if (source_length < std::min(longest, 1) || source_length > longest) {
                     throw std::invalid_argument("there is no session for a source of " +
                                                 std::to_string(source_length) + " tokens");
                 }
                 new (self) terse::Session(model.model->session_shape(), capacity, poison, source_length);
             },
             "model"_a, "capacity"_a, "poison"_a = false, "source_length"_a = 0)
        .def("fork",
             [](terse::Session& self) {
                 const terse::Session::Use use(self);
                 const nb::gil_scoped_release released;
                 return std::make_unique<terse::Session>(self);
             })
        .def("save",
             [](terse::Session& self) {
                 const terse::Session::Use use(self);
                 std::vector<float> saved;
                 {
                     const nb::gil_scoped_release released;
                     saved = self.save();
                 }
                 return numpy(std::move(saved));
             })
        .def("restore",
             [](terse::Session& self, const Floats& saved, int length) {
                 const terse::Session::Use use(self);
                 const nb::gil_scoped_release released;
                 self.restore(saved.data(), saved.size(), length);
             },
             "saved"_a, "length"_a)
        .def_prop_ro("length", &terse::Session::length)
        .def_prop_ro("capacity", &terse::Session::capacity)
        .def_prop_ro("logits", [](terse::Session& self) {
            const terse::Session::Use use(self);
            return numpy({self.logits(), self.logits() + self.shape().vocab_size});
        });

    nb::class_<terse::Sampling>(m, "Sampling")
        .def("__init__",
             [](terse::Sampling* self, float temperature, int top_k, float top_p, float min_p, float repetition_penalty,
                int no_repeat_ngram_size, std::uint64_t seed) {
                 new (self) terse::Sampling{temperature,        top_k,                top_p, min_p,
                                            repetition_penalty, no_repeat_ngram_size, seed};
             },
             nb::kw_only(), "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "repetition_penalty"_a,
             "no_repeat_ngram_size"_a, "seed"_a);

    nb::class_<terse::Search>(m, "Search")
        .def("__init__",
             [](terse::Search* self, int num_beams, double length_penalty, bool early_stopping, int no_repeat_ngram_size,
                float repetition_penalty, int max_tokens) {
                 if (num_beams < 1 || max_tokens < 1) {
                     throw std::invalid_argument("num_beams and max_tokens must be at least 1");
                 }
                 new (self) terse::Search{num_beams,          length_penalty, early_stopping, no_repeat_ngram_size,
                                          repetition_penalty, max_tokens};
             },
             nb::kw_only(), "num_beams"_a, "length_penalty"_a, "early_stopping"_a, "no_repeat_ngram_size"_a,
             "repetition_penalty"_a, "max_tokens"_a);

    nb::class_<terse::Sampler>(m, "Sampler")
        .def(nb::init<const terse::Sampling&, int>(), "sampling"_a, "vocab_size"_a)
        .def("see", &terse::Sampler::see, "token"_a)
        .def("next",
             [](terse::Sampler& self, const Floats& logits) {
                 require_size(logits, self.vocab_size());
                 return self.next(logits.data());
             },
             "logits"_a)
        .def("distribution",
             [](terse::Sampler& self, const Floats& logits) -> nb::object {
                 require_size(logits, self.vocab_size());
                 std::vector<float> probabilities(logits.size());
                 return self.distribution(logits.data(), probabilities.data()) ? numpy(std::move(probabilities))
                                                                              : nb::none();
             },
             "logits"_a);

    nb::class_<terse::Floors>(m, "Floors")
        .def(nb::init<int>(), "threads"_a)
        .def("read",
             [](terse::Floors& self, const Floats& data) {
                 const nb::gil_scoped_release released;
                 return self.read(data.data(), data.size());
             },
             "data"_a)
        .def("read_records",
             [](terse::Floors& self, const Floats& data, std::size_t record, const Tokens& order) {
                 for (std::size_t i = 0; i < order.size(); ++i) {
                     const std::int32_t at = order.data()[i];
                     if (at < 0 || (static_cast<std::size_t>(at) + 1) * record > data.size()) {
                         throw std::invalid_argument("there is no record " + std::to_string(at));
                     }
                 }
                 const nb::gil_scoped_release released;
                 return self.read_records(data.data(), record, order.data(), static_cast<int>(order.size()));
             },
             "data"_a, "record"_a, "order"_a)
        .def("multiply",
             [](terse::Floors& self, int rounds) {
                 const nb::gil_scoped_release released;
                 const auto [seconds, multiply_adds] = self.multiply(rounds);
                 return std::vector<double>{seconds, multiply_adds};
             },
             "rounds"_a);

    nb::class_<Pieces>(m, "Pieces")
        .def("__init__", [](Pieces* self, const std::vector<nb::bytes>& pieces) {
            new (self) Pieces();
            for (const nb::bytes& piece : pieces) {
                self->bytes.emplace_back(piece.c_str(), piece.size());
            }
        });

    nb::class_<terse::Writer>(m, "Writer")
        .def("__init__",
             [](terse::Writer* self, terse::Session& session, const terse::Sampling& sampling, int max_tokens,
                std::vector<std::int32_t> stop_ids, const std::vector<nb::bytes>& stops, const Pieces& pieces,
                bool trace) {
                 std::vector<std::string> bytes;
                 for (const nb::bytes& stop : stops) {
                     bytes.emplace_back(stop.c_str(), stop.size());
                 }
                 if (max_tokens < 1) {
                     throw std::invalid_argument("max_tokens must be at least 1, not " + std::to_string(max_tokens));
                 }
                 if (!bytes.empty() && pieces.bytes.size() != static_cast<std::size_t>(session.shape().vocab_size)) {
                     throw std::invalid_argument("stop strings need the bytes of every token");
                 }
                 new (self) terse::Writer(session, sampling, max_tokens, std::move(stop_ids), std::move(bytes),
                                          pieces.bytes, trace);
             },
             nb::keep_alive<1, 2>(), nb::keep_alive<1, 7>(), "session"_a, "sampling"_a, "max_tokens"_a, "stop_ids"_a,
             "stops"_a, "pieces"_a, "trace"_a = false)
        .def("see",
             [](terse::Writer& self, const Tokens& tokens) {
                 self.see(tokens.data(), static_cast<int>(tokens.size()));
             },
             "tokens"_a)
        .def("allow",
             [](terse::Writer& self, const Mask& allowed) {
                 self.allow({allowed.data(), allowed.data() + allowed.size()});
             },
             "allowed"_a)
        .def("take_touched", [](terse::Writer& self) { return numpy(self.take_touched()); })
        .def_prop_ro("finish", [](const terse::Writer& self) { return name_of(self.finish()); });

    nb::class_<terse::Reading>(m, "Reading");

    nb::class_<terse::Engine>(m, "Engine")
        .def("__init__",
             [](terse::Engine* self, const LoadedModel& model, int threads, int rows, int runs, bool poison) {
                 if (runs < 1 || rows < runs) {
                     throw std::invalid_argument("there must be at least one run, and a row for each");
                 }
                 new (self) terse::Engine(model.model, threads, rows, runs, poison);
             },
             nb::keep_alive<1, 2>(), "model"_a, "threads"_a, "rows"_a, "runs"_a, "poison"_a = false)
        .def_prop_ro("threads", &terse::Engine::threads)
        .def("begin_source",
             [](terse::Engine& self, terse::Session& session, const Tokens& tokens) {
                 return self.begin_source(session, tokens.data(), static_cast<int>(tokens.size()));
             },
             nb::keep_alive<0, 1>(), nb::keep_alive<0, 2>(), "session"_a, "tokens"_a)
        .def("read_source",
             [](terse::Engine& self, terse::Reading& reading, double seconds) {
                 const nb::gil_scoped_release released;
                 return self.read_source(reading, std::chrono::microseconds(static_cast<std::int64_t>(seconds * 1e6)));
             },
             "reading"_a, "seconds"_a)
        .def("read",
             [](terse::Engine& self, terse::Session& session, const Tokens& tokens) {
                 const nb::gil_scoped_release released;
                 self.read(session, tokens.data(), static_cast<int>(tokens.size()));
             },
             "session"_a, "tokens"_a)
        .def("read_logits",
             [](terse::Engine& self, terse::Session& session, const Tokens& tokens, const Rows& logits) {
                 if (logits.shape(0) != tokens.size() ||
                     logits.shape(1) != static_cast<std::size_t>(self.model().vocab_size())) {
                     throw std::invalid_argument("the logits' array must be [tokens, vocab_size]");
                 }
                 const nb::gil_scoped_release released;
                 self.read(session, tokens.data(), static_cast<int>(tokens.size()), logits.data());
             },
             "session"_a, "tokens"_a, "logits"_a)
        .def("search",
             [](terse::Engine& self, terse::Session& session, const terse::Search& search,
                std::vector<std::int32_t> before, std::vector<std::int32_t> stop_ids) {
                 const terse::Found found = [&] {
                     const nb::gil_scoped_release released;
                     return self.search(session, search, std::move(before), std::move(stop_ids));
                 }();
                 return std::pair(found.tokens, std::string(name_of(found.finish)));
             },
             "session"_a, "search"_a, "before"_a, "stop_ids"_a)
        .def("write",
             [](terse::Engine& self, const std::vector<terse::Writer*>& writers, int steps, double seconds) {
                 const nb::gil_scoped_release released;
                 return self.write(writers, steps,
                                   std::chrono::microseconds(static_cast<std::int64_t>(seconds * 1e6)));
             },
             "writers"_a, "steps"_a, "seconds"_a);
}
